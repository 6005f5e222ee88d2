"""Escaping of text for terminals."""

from __future__ import annotations


def printable(text: object) -> str:
    """Escape a text to one line that a terminal shows and never interprets.

    File names and item ids may come from strangers: control characters, line breaks, marks that reverse the writing direction
    and bytes that are not UTF-8 become Python's escapes; everything else is kept.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )


def printable_lines(text: object) -> str:
    """Escape each line of a text by :func:`printable`; for tables, whose values have been escaped before."""
    return "\n".join(map(printable, str(text).split("\n")))


def paragraph(text: object) -> str:
    """Escape a message and indent all lines but the first, so that none looks like a message of its own."""
    first, *rest = (printable(line.strip()) for line in str(text).split("\n"))
    return "\n  ".join([first, *filter(None, rest)])
