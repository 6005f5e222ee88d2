"""JSON values are checked against types, and differences are located."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from finelip_fast._typed import typed


@dataclass(frozen=True)
class Point:
    x: float
    name: str
    tags: list[str]
    box: tuple[float, float]
    inner: Point | None


POINT = {"x": 1, "name": "a", "tags": ["b"], "box": [0.5, 1], "inner": None}


def test_objects_become_dataclasses_and_lists_tuples() -> None:
    point = typed(POINT | {"inner": POINT}, Point)
    assert point == Point(1, "a", ["b"], (0.5, 1), Point(1, "a", ["b"], (0.5, 1), None))
    assert typed({"a": [[1, 2], []]}, dict[str, list[tuple[int, ...]]]) == {"a": [(1, 2), ()]}
    assert typed({"a": {"b": object}}, dict[str, Any]) == {"a": {"b": object}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": True}, "expected a finite number as x, found True"),
        ({"x": float("nan")}, "expected a finite number as x, found nan"),
        ({"name": 3}, "expected a text as name, found 3"),
        ({"tags": "b"}, "expected a list as tags, found 'b'"),
        ({"tags": ["b", None]}, r"expected a text as tags\[1\], found None"),
        ({"box": [1]}, r"expected a list of 2 as box, found \[1\]"),
        ({"box": [1, "2"]}, r"expected a finite number as box\[1\], found '2'"),
        ({"inner": 3}, "expected an object as inner, found 3"),
        ({"inner": POINT | {"x": []}}, r"expected a finite number as inner\.x, found \[\]"),
        ({"inner": {}}, "no field 'box' in inner"),
        ({"more": 1}, "an unknown field 'more'"),
    ],
)
def test_another_type_is_named_by_its_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        typed(POINT | changes, Point)


@pytest.mark.parametrize(("value", "kind"), [([True], list[int]), ([1.5], list[int]), ([float("inf")], list[float])])
def test_lists_of_numbers_are_looked_at_too(value: list[Any], kind: Any) -> None:
    with pytest.raises(ValueError, match=r"expected .* as \[0\]"):
        typed(value, kind)
