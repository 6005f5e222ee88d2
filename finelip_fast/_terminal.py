"""Text on its way to a person's terminal."""

from __future__ import annotations


def printable(text: object) -> str:
    """A text on one line that a terminal shows as it is, and never obeys.

    Names of files and ids of items come from strangers: control characters, line breaks, marks that reverse the direction of
    writing and bytes that are no UTF-8 become escapes, as Python writes them; all else stays.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )


def printable_lines(text: object) -> str:
    """A text of several lines, each as :func:`printable`: for tables, whose values have been made printable themselves."""
    return "\n".join(map(printable, str(text).split("\n")))


def paragraph(text: object) -> str:
    """A message of one or several lines, all but the first indented: none can be taken for a message of its own."""
    first, *rest = (printable(line.strip()) for line in str(text).split("\n"))
    return "\n  ".join([first, *filter(None, rest)])
