"""Text on its way to a page or to Markdown: what captions, names and ids hold is shown, and is never markup.

Line breaks stay where a page lays text out by itself. Control characters, marks that reverse the direction of writing and
halves of surrogate pairs, which UTF-8 cannot hold, become escapes, as Python writes them.
"""

from __future__ import annotations

import re

from finelip_fast._terminal import printable

_UNSEEN = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*<|]|(?<=\])[(\[]")


def visible(text: str) -> str:
    """A text whose every character can be seen; what it means to HTML, templates escape (:mod:`finelip_fast._pages`)."""
    return _UNSEEN.sub(lambda match: printable(match[0]), text)


def in_markdown(text: str) -> str:
    """A text on one line of Markdown, in a cell of a table too; no code, emphasis, HTML or link."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))
