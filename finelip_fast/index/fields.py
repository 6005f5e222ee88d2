"""Fields of the metadata, for controls that filter by them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Kind = Literal["text", "number", "date", "boolean"]


class Field(NamedTuple):
    """A field of the metadata.

    Attributes:
        name: Name as filters take it, such as ``place.city``.
        kind: What its values are; a date is a text in ISO 8601.
        values: All its values where they are few, the most frequent first; None: they are many.
        least, greatest: Ends of numbers and dates; None: of texts and booleans.
    """

    name: str
    kind: Kind
    values: list[Any] | None
    least: float | str | None
    greatest: float | str | None
