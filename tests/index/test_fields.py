"""Metadata fields and the filters that they offer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.index import Field, Index, IndexSpec, contents

SPEC = IndexSpec(checkpoint="abc", tokens=1, width=8)


def filled(metadata: list[dict[str, Any]], index: Index | None = None) -> Index:
    index = Index(SPEC) if index is None else index
    values = torch.nn.functional.normalize(torch.randn(len(metadata), 1, 8), dim=-1)
    start = len(index)
    index.add([str(start + at) for at in range(len(metadata))], values, metadata)
    return index


def test_fields_say_what_they_can_be_compared_with() -> None:
    index = filled(
        [
            {
                "camera": "front",
                "year": 2024,
                "night": False,
                "taken": "2024-05-01T10:00:00",
                "place": {"city": "Lima"},
            },
            {"camera": "rear", "year": 2022.5, "night": True, "taken": "2023-05-01T10:00:00+02:00", "tags": ["a"]},
            {"camera": "rear", "year": 2023, "night": True, "shot at": 5, "place": {"city": None, "note": {}}},
        ]
    )
    assert {field.name: field[1:] for field in index.fields()} == {
        "camera": ("text", ["rear", "front"], None, None),
        "year": ("number", [2024, 2022.5, 2023], 2022.5, 2024),
        "night": ("boolean", [True, False], None, None),
        "taken": (
            "date",
            ["2024-05-01T10:00:00", "2023-05-01T10:00:00+02:00"],
            "2023-05-01T10:00:00+02:00",
            "2024-05-01T10:00:00",
        ),
        "place.city": ("text", ["Lima"], None, None),
        '"shot at"': ("number", [5], 5, 5),
    }


def test_an_empty_index_has_no_fields() -> None:
    assert Index(SPEC).fields() == []


def test_many_and_long_values_are_not_listed() -> None:
    index = filled(
        [{"number": at, "few": at % 30, "caption": f"{at} " + "x" * 200, "constant": "y" * 200} for at in range(31)]
    )
    fields = {field.name: field for field in index.fields()}
    assert fields["number"] == Field("number", "number", None, 0, 30)
    assert sorted(fields["few"].values) == list(range(30))
    assert fields["few"].values[0] == 0
    assert fields["caption"].values is fields["constant"].values is None


def test_a_field_is_of_the_kind_that_most_of_its_values_are() -> None:
    index = filled([{"x": 1}, {"x": "a"}, {"x": "b"}, {"x": True}, {"y": "2024-01-01"}, {"y": "2024-01-01 or so"}])
    assert [field[:3] for field in index.fields()] == [
        ("x", "text", ["a", "b"]),
        ("y", "text", ["2024-01-01", "2024-01-01 or so"]),
    ]


def test_what_files_say_and_nobody_looks_for_is_left_out() -> None:
    file = {"bytes": 5, "modified": "2024-01-01", "sha256": "ab", "width": 3, "height": 4, "orientation": 6}
    assert [field.name for field in filled([{**file, "camera": "X100"}]).fields()] == ["camera"]
    assert [field.name for field in filled([{"width": 3}]).fields()] == ["width"]  # not from a file


def test_fields_follow_the_index(tmp_path: Path) -> None:
    with Index(SPEC, tmp_path / "index") as index, Index(SPEC, tmp_path / "index") as another:
        filled([{"a": 1}], index)
        fields = index.fields()
        assert index.fields() is fields
        filled([{"b": "x"}], another)
        assert [field.name for field in index.fields()] == ["a", "b"]
        index.delete(["0"])
        index.maintain()
        assert [field.name for field in index.fields()] == ["b"]


def test_a_large_index_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_MOST_SAMPLED", 11)
    index = filled([{"n": at, f"x{at}": 1} for at in range(101)])
    fields = index.fields()
    assert len(fields) == 12
    assert fields[0][1:] == ("number", list(range(0, 101, 10)), 0, 100)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(settings.get_profile("fuzz"))
@given(
    metadata=st.dictionaries(st.text(max_size=5) | st.sampled_from(["id", "in", "NOT", "a b", "ü"]), JSON, max_size=4)
)
def test_every_field_can_be_filtered_by(metadata: dict[str, Any]) -> None:
    index = filled([metadata])
    for field in index.fields():
        assert "\0" in field.name or [item.id for item in index.items(where=f"{field.name} is not null")] == ["0"]
