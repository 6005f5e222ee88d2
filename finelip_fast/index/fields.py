"""Metadata fields, for user interface controls that filter by them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

from finelip_fast.index.filters import field_name
from finelip_fast.picture_files import HASH, STAMP

Kind = Literal["text", "number", "date", "boolean"]

_MOST_VALUES = 30  # choices that a control offers
_LONGEST_VALUE = 100  # characters of one value
_MOST_FIELDS = 100
_MOST_READ = 1_000_000  # values of the metadata
# File properties that nobody searches for.
_OF_FILES = {*STAMP, HASH, "width", "height", "orientation"}
_DATE = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?")


class Field(NamedTuple):
    """A metadata field.

    Attributes:
        name: Name as used in filters, such as ``place.city``.
        kind: Type of most of its values; a date is text in ISO 8601.
        values: All its values, the most frequent first; None: there are more than 30, or long ones.
        least, greatest: Range of numbers, or of dates in the order of text; None: text or booleans.
    """

    name: str
    kind: Kind
    values: list[Any] | None
    least: float | str | None
    greatest: float | str | None


class _Values:
    """Values of one type that a field was seen with."""

    def __init__(self) -> None:
        self.number, self.least, self.greatest = 0, None, None
        self.are_dates = True
        self._counts: Counter[Any] | None = Counter()

    def add(self, value: Any) -> None:
        self.number += 1
        self.least = value if self.least is None else min(self.least, value)
        self.greatest = value if self.greatest is None else max(self.greatest, value)
        is_text = isinstance(value, str)
        self.are_dates = self.are_dates and is_text and bool(_DATE.fullmatch(value))
        if self._counts is not None:
            self._counts[value] += 1
            if len(self._counts) > _MOST_VALUES or (is_text and len(value) > _LONGEST_VALUE):
                self._counts = None

    @property
    def listed(self) -> list[Any] | None:
        return None if self._counts is None else [value for value, _ in self._counts.most_common()]


def fields_of(metadata: Iterable[Mapping[str, Any]]) -> list[Field]:
    """Fields that filters can compare, the most frequent first; at most 100."""
    known: dict[tuple[str, ...], dict[type, _Values]] = {}
    total = 0
    for values in metadata:
        left_out = _OF_FILES if HASH in values else ()
        for path, value in _leaves({name: value for name, value in values.items() if name not in left_out}):
            kind = float if type(value) is int else type(value)
            known.setdefault(path, {}).setdefault(kind, _Values()).add(value)
            total += 1
        if total > _MOST_READ:
            break
    ranked = sorted(known.items(), key=lambda entry: -sum(values.number for values in entry[1].values()))
    fields = (_field(path, kinds) for path, kinds in ranked)
    return [field for field, _ in zip(filter(None, fields), range(_MOST_FIELDS), strict=False)]


def joined_fields(parts: Sequence[Sequence[Field]]) -> list[Field]:
    """Merge the fields of several collections; a field of two kinds keeps the one that comes first."""
    joined: dict[str, Field] = {}
    for field in chain.from_iterable(parts):
        known = joined.setdefault(field.name, field)
        if known.kind != field.kind:
            continue
        values = None
        if known.values is not None and field.values is not None:
            values = list(dict.fromkeys([*known.values, *field.values]))
            values = values if len(values) <= _MOST_VALUES else None
        ends: list[Any] = [end for end in (known.least, field.least, known.greatest, field.greatest) if end is not None]
        least, greatest = (min(ends), max(ends)) if ends else (None, None)
        joined[field.name] = Field(field.name, field.kind, values, least, greatest)
    return list(joined.values())[:_MOST_FIELDS]


def _leaves(values: Mapping[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, *path, name)
        elif isinstance(value, (str, int, float)):
            yield (*path, name), value


def _field(path: tuple[str, ...], kinds: dict[type, _Values]) -> Field | None:
    name = field_name(path)
    if name is None:
        return None
    kind, values = max(kinds.items(), key=lambda entry: entry[1].number)
    if kind is bool:
        return Field(name, "boolean", values.listed, None, None)
    if kind is str and not values.are_dates:
        return Field(name, "text", values.listed, None, None)
    return Field(name, "number" if kind is float else "date", values.listed, values.least, values.greatest)
