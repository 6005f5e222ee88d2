"""The catalogue: items exist from the moment its transaction ends, all of a batch or none, and only under their spec."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from finelip_fast._errors import StoreError
from finelip_fast.index.catalogue import FORMAT, Catalogue, Item, read_spec

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


def add(catalogue: Catalogue, ids: list[str], segment: str, metadata: list[dict]) -> None:
    with catalogue.changing(catalogue.version):
        catalogue.add(ids, segment, range(len(ids)), metadata)


def test_items_come_back_in_order_of_insertion(catalogue: Catalogue, path: Path) -> None:
    assert list(catalogue.items()) == []
    add(catalogue, ["z", "a"], "first", [{"n": 1}, {}])
    add(catalogue, ["m"], "second", [{"deep": {"list": [1, 2.5, None, True, "é"]}}])
    items = [
        Item("z", "first", 0, 0, {"n": 1}),
        Item("a", "first", 1, 1, {}),
        Item("m", "second", 0, 0, {"deep": {"list": [1, 2.5, None, True, "é"]}}),
    ]
    assert list(catalogue.items()) == items
    assert reopened(path) == items


@pytest.mark.parametrize(
    "name", ["", "a b", "猫/ñ 🏠.png", "'; DROP TABLE item; --", "caf\udce9.jpg", "nul\0byte", "\ud800"]
)
def test_any_string_is_an_id(catalogue: Catalogue, path: Path, name: str) -> None:
    add(catalogue, [name], "segment", [{}])
    assert [item.id for item in reopened(path)] == [name]


def test_a_batch_that_collides_leaves_nothing(catalogue: Catalogue, path: Path) -> None:
    add(catalogue, ["old"], "segment", [{}])
    with pytest.raises(StoreError, match=r"cannot be written: UNIQUE constraint failed"):
        add(catalogue, ["new", "old"], "other", [{}, {}])
    assert [item.id for item in reopened(path)] == ["old"]
    add(catalogue, ["next"], "third", [{}])  # no transaction was left open
    assert [item.id for item in reopened(path)] == ["old", "next"]


def test_a_change_of_an_older_version_is_refused(catalogue: Catalogue, path: Path) -> None:
    with closing(Catalogue(path, SPEC, source="mine")) as other:
        add(other, ["theirs"], "segment", [{}])
    with pytest.raises(StoreError, match="another process has changed the index"), catalogue.changing(0):
        pytest.fail("it was let in")
    assert [item.id for item in reopened(path)] == ["theirs"]


def test_a_change_that_fails_midway_leaves_nothing(catalogue: Catalogue, path: Path) -> None:
    add(catalogue, ["kept"], "segment", [{}])

    def interrupted() -> None:
        with catalogue.changing(1):
            catalogue.remove(["kept"])
            catalogue.add(["lost"], "other", [0], [{}])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [item.id for item in reopened(path)] == ["kept"]
    assert catalogue.version == 1


def test_older_versions_stay_until_they_are_compacted(catalogue: Catalogue) -> None:
    add(catalogue, ["a", "b"], "first", [{}, {}])
    with catalogue.changing(1):
        catalogue.remove(["a"])
        catalogue.add(["a"], "second", [9], [{"new": True}])
    assert [[item.id for item in catalogue.items(version)] for version in (0, 1, 2)] == [[], ["a", "b"], ["b", "a"]]
    assert catalogue.segments() == {"first", "second"}
    with catalogue.changing(2):
        catalogue.compact("third", [4, 5])
    assert (catalogue.oldest, catalogue.version) == (3, 3)
    assert list(catalogue.items()) == [Item("b", "third", 0, 4, {}), Item("a", "third", 1, 5, {"new": True})]


def test_a_catalogue_of_the_first_format_becomes_one_of_this(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE spec (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")
        connection.execute(
            "CREATE TABLE item (position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, segment TEXT NOT NULL, "
            "metadata TEXT NOT NULL) STRICT"
        )
        spec = {**SPEC, "format": 1, "source": "mine"}
        connection.executemany("INSERT INTO spec VALUES (?, ?)", [(key, json.dumps(one)) for key, one in spec.items()])
        rows = [(0, "z", "first", "{}"), (1, "a", "first", '{"n": 1}'), (2, "m", "second", "{}")]
        connection.executemany("INSERT INTO item VALUES (?, ?, ?, ?)", rows)
    expected = [
        Item("z", "first", 0, None, {}),
        Item("a", "first", 1, None, {"n": 1}),
        Item("m", "second", 0, None, {}),
    ]
    assert reopened(path) == expected
    with closing(Catalogue(path, SPEC, source="mine")) as catalogue:
        add(catalogue, ["new"], "third", [{}])
        assert list(catalogue.items()) == [*expected, Item("new", "third", 0, 0, {})]
        assert read_spec(path)["source"] == "mine"


def test_the_first_format_of_another_index_is_left_as_it_is(catalogue: Catalogue, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE spec SET value = '1' WHERE key = 'format'")
    with pytest.raises(StoreError, match="opened by checkpoint"):
        Catalogue(path, SPEC | {"checkpoint": "xyz"}, source="yours")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT value FROM spec WHERE key = 'format'").fetchone() == ("1",)


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
    assert read_spec(path)["source"] == "mine"
    Catalogue(path, SPEC, source="the same by another name").close()
    assert read_spec(path)["source"] == "mine"


def test_a_catalogue_of_another_format_is_refused(catalogue: Catalogue, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE spec SET value = ? WHERE key = 'format'", [json.dumps(FORMAT + 1)])
    with pytest.raises(StoreError, match=f"'format': {FORMAT + 1}.*'format': {FORMAT}"):
        Catalogue(path, SPEC, source="mine")


def test_a_file_that_is_no_database_is_refused_and_untouched(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to look into" * 40)
    before = path.read_bytes()
    for attempt in (lambda: Catalogue(path, SPEC, source=""), lambda: read_spec(path)):
        with pytest.raises(
            StoreError, match=r"catalogue\.sqlite cannot be opened as an index catalogue: .*not a database"
        ):
            attempt()
    assert path.read_bytes() == before


def test_there_is_no_source_where_there_is_no_catalogue(path: Path) -> None:
    assert read_spec(path) is None
    assert not path.exists()


def test_a_catalogue_whose_making_was_interrupted_is_made_again(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    assert path.stat().st_size
    assert read_spec(path) is None
    assert reopened(path) == []
    assert read_spec(path)["source"] == "mine"


def test_a_writer_waits_for_another_and_says_so_in_the_end(catalogue: Catalogue, path: Path) -> None:
    catalogue._connection.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"cannot be written: database is locked"):
            add(catalogue, ["a"], "segment", [{}])
        other.execute("ROLLBACK")
    add(catalogue, ["a"], "segment", [{}])
    assert [item.id for item in reopened(path)] == ["a"]
