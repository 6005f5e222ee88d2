"""The catalogue: items exist from the moment its transaction ends, all of a batch or none, and only under their spec."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from finelip_fast._errors import StoreError
from finelip_fast.index.catalogue import FORMAT, Catalogue, Item, read_source

SPEC = {"checkpoint": "abc", "tokens": 3, "width": 4}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.sqlite"


@pytest.fixture
def catalogue(path: Path) -> Iterator[Catalogue]:
    with closing(Catalogue(path, SPEC, source="mine")) as one:
        yield one


def reopened(path: Path) -> list[Item]:
    with closing(Catalogue(path, SPEC, source="mine")) as one:
        return list(one.items())


def test_items_come_back_in_order_of_insertion(catalogue: Catalogue, path: Path) -> None:
    assert list(catalogue.items()) == []
    catalogue.add(["z", "a"], "first", [{"n": 1}, {}], after=0)
    catalogue.add(["m"], "second", [{"deep": {"list": [1, 2.5, None, True, "é"]}}], after=2)
    items = [
        Item("z", "first", {"n": 1}),
        Item("a", "first", {}),
        Item("m", "second", {"deep": {"list": [1, 2.5, None, True, "é"]}}),
    ]
    assert list(catalogue.items()) == items
    assert reopened(path) == items


@pytest.mark.parametrize(
    "name", ["", "a b", "猫/ñ 🏠.png", "'; DROP TABLE item; --", "caf\udce9.jpg", "nul\0byte", "\ud800"]
)
def test_any_string_is_an_id(catalogue: Catalogue, path: Path, name: str) -> None:
    catalogue.add([name], "segment", [{}], after=0)
    assert [item.id for item in reopened(path)] == [name]


@pytest.mark.parametrize(("ids", "after"), [(["new", "old"], 1), (["new", "newer"], 0)], ids=["id", "position"])
def test_a_batch_that_collides_leaves_nothing(catalogue: Catalogue, path: Path, ids: list[str], after: int) -> None:
    catalogue.add(["old"], "segment", [{}], after=0)
    with pytest.raises(StoreError, match=r"another process has added to the index at .*: open it again"):
        catalogue.add(ids, "other", [{}, {}], after=after)
    assert [item.id for item in reopened(path)] == ["old"]
    catalogue.add(["next"], "third", [{}], after=1)  # no transaction was left open
    assert [item.id for item in reopened(path)] == ["old", "next"]


@pytest.mark.parametrize(
    "change", [{"checkpoint": "xyz"}, {"tokens": 5}, {"width": 8}], ids=lambda one: next(iter(one))
)
def test_another_spec_is_refused_and_both_are_named(catalogue: Catalogue, path: Path, change: dict) -> None:
    with pytest.raises(StoreError) as caught:
        Catalogue(path, SPEC | change, source="yours")
    (key, value), *_ = change.items()
    message = str(caught.value)
    assert f"written by checkpoint 'mine' with {{{key!r}: {SPEC[key]!r}}}" in message
    assert f"opened by checkpoint 'yours' with {{{key!r}: {value!r}}}" in message
    assert "index the pictures again into another folder" in message


def test_the_source_is_kept_and_not_compared(catalogue: Catalogue, path: Path) -> None:
    assert read_source(path) == "mine"
    Catalogue(path, SPEC, source="the same by another name").close()
    assert read_source(path) == "mine"


def test_a_catalogue_of_another_format_is_refused(catalogue: Catalogue, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE spec SET value = ? WHERE key = 'format'", [json.dumps(FORMAT + 1)])
    with pytest.raises(StoreError, match=f"'format': {FORMAT + 1}.*'format': {FORMAT}"):
        Catalogue(path, SPEC, source="mine")


def test_a_file_that_is_no_database_is_refused_and_untouched(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to look into" * 40)
    before = path.read_bytes()
    for attempt in (lambda: Catalogue(path, SPEC, source=""), lambda: read_source(path)):
        with pytest.raises(
            StoreError, match=r"catalogue\.sqlite cannot be opened as an index catalogue: .*not a database"
        ):
            attempt()
    assert path.read_bytes() == before


def test_there_is_no_source_where_there_is_no_catalogue(path: Path) -> None:
    assert read_source(path) is None
    assert not path.exists()


def test_a_catalogue_whose_making_was_interrupted_is_made_again(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    assert path.stat().st_size
    assert read_source(path) is None
    assert reopened(path) == []
    assert read_source(path) == "mine"


def test_a_writer_waits_for_another_and_says_so_in_the_end(catalogue: Catalogue, path: Path) -> None:
    catalogue._connection.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"cannot be written: database is locked"):
            catalogue.add(["a"], "segment", [{}], after=0)
        other.execute("ROLLBACK")
    catalogue.add(["a"], "segment", [{}], after=0)
    assert [item.id for item in reopened(path)] == ["a"]
