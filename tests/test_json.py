"""Untrusted JSON gives a bounded value, or an error that says where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finelip_fast._json import MAX_DEPTH, parse_json, read_json
from finelip_fast.errors import InputError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_what_was_written_is_read(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text, "file", error=InputError) == value
    assert parse_json(text.encode(), "file", error=InputError) == value


@given(st.binary() | st.text() | st.text('[]{}",:0123456789.eE-+\\u dDnulNaItrs', max_size=60))
def test_anything_is_a_value_or_our_error(text: str | bytes) -> None:
    try:
        value = parse_json(text, "file", error=InputError)
    except InputError as error:
        assert str(error).startswith("file: expected JSON: ")  # noqa: PT017 (a value is as good)
    else:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nesting deeper than 64"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nesting deeper than 64"),
        ('{"a": ' * 100_000, "nesting deeper than 64"),
        ("[NaN]", "a number that is not finite, NaN"),
        ("[-Infinity]", "a number that is not finite, -Infinity"),
        ("[1e999]", "a number that is not finite, 1e999"),
        ("[" + "9" * 100_000 + "]", "an integer beyond 64 bits, 99999999999999999999…"),
        (r'{"a": ["\ud800"]}', "half of a surrogate pair"),
        (r'{"\ud800": 1}', "half of a surrogate pair"),
        ('{"a": 1,\n "b": }', "Expecting value at line 2, column 7"),
        (b'"\xff"', "can't decode byte 0xff"),
        ("", "Expecting value at line 1, column 1"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str | bytes, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(text, "file", error=InputError, expected="a list of pairs")
    assert str(caught.value).startswith("file: expected a list of pairs: ")
    assert reason in str(caught.value)


def test_whole_surrogate_pairs_and_the_deepest_nesting_are_read() -> None:
    assert parse_json(r'"\ud83d\ude00"', "file", error=InputError) == "\U0001f600"
    parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "file", error=InputError)


def test_the_kind_of_the_outermost_value_is_held(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    assert read_json(tmp_path / "list.json", error=InputError, kind=list) == [1]
    with pytest.raises(InputError, match=r"list.json: expected settings: found a list instead of an object"):
        read_json(tmp_path / "list.json", error=InputError, expected="settings", kind=dict)
    with pytest.raises(InputError, match=r"list.json: expected at most 2 bytes, found 3"):
        read_json(tmp_path / "list.json", error=InputError, max_bytes=2)


def test_names_that_are_no_utf8_are_passed_where_they_are_expected() -> None:
    assert parse_json(r'"caf\udce9"', "here", error=InputError, surrogates=True) == "caf\udce9"
