"""Escaping of text for pages and Markdown: captions, names and ids are shown, and never act as markup.

Line breaks are kept where a page lays out text by itself. Control characters, marks that reverse the writing direction and
lone surrogates, which UTF-8 cannot encode, become Python's escapes.
"""

from __future__ import annotations

import re

from finelip_fast._terminal import printable

_UNSEEN = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*<|]|(?<=\])[(\[]")


def visible(text: str) -> str:
    """Make every character of a text visible; HTML is escaped by the templates (:mod:`finelip_fast._pages`)."""
    return _UNSEEN.sub(lambda match: printable(match[0]), text)


def in_markdown(text: str) -> str:
    """Escape a text for a line or a table cell of Markdown: no code, emphasis, HTML or link."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))
