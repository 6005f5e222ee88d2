"""The catalogue: items exist once its transaction ends, all of a batch or none, and only under their spec."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from finelip_fast.errors import StoreError
from finelip_fast.index import database
from finelip_fast.index.catalogue import Catalogue, Item, SegmentRow, read_spec
from finelip_fast.index.schema import FORMAT, seal

SPEC = {"checkpoint": "abc", "tokens": 3, "width": 4, "alpha": 0.8, "dtype": "float16"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.sqlite"


@pytest.fixture
def catalogue(path: Path) -> Iterator[Catalogue]:
    with closing(Catalogue(path, SPEC, source="mine")) as catalogue:
        yield catalogue


def items_of(catalogue: Catalogue, version: int | None = None) -> list[Item]:
    layout = catalogue.layout(version)
    return [item for row in layout.segments for item in catalogue.items(layout.version, within=row)]


def reopened(path: Path) -> list[Item]:
    with closing(Catalogue(path, SPEC, source="mine")) as catalogue:
        return items_of(catalogue)


def add(catalogue: Catalogue, ids: list[str], segment: str, metadata: list[dict]) -> None:
    with catalogue.changing():
        catalogue.add(ids, segment, range(len(ids)), [json.dumps(item_metadata) for item_metadata in metadata])


def test_items_come_back_in_order_of_insertion(catalogue: Catalogue, path: Path) -> None:
    assert items_of(catalogue) == []
    add(catalogue, ["z", "a"], "first", [{"n": 1}, {}])
    add(catalogue, ["m"], "second", [{"deep": {"list": [1, 2.5, None, True, "é"]}}])
    items = [
        Item(0, "z", 0, {"n": 1}),
        Item(1, "a", 1, {}),
        Item(2, "m", 0, {"deep": {"list": [1, 2.5, None, True, "é"]}}),
    ]
    assert items_of(catalogue) == items
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
    add(catalogue, ["next"], "third", [{}])  # no transaction is left open
    assert [item.id for item in reopened(path)] == ["old", "next"]


def test_changes_of_others_are_seen(catalogue: Catalogue, path: Path) -> None:
    add(catalogue, ["own"], "segment", [{}])
    with closing(Catalogue(path, SPEC, source="mine")) as second_catalogue:
        add(second_catalogue, ["theirs"], "second", [{}])
    assert (catalogue.version, [item.id for item in items_of(catalogue)]) == (2, ["own", "theirs"])


def test_a_change_that_fails_midway_leaves_nothing(catalogue: Catalogue, path: Path) -> None:
    add(catalogue, ["kept"], "segment", [{}])

    def interrupted() -> None:
        with catalogue.changing():
            catalogue.remove([0])
            catalogue.add(["lost"], "other", [0], ["{}"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [item.id for item in reopened(path)] == ["kept"]
    assert catalogue.version == 1


def test_older_versions_stay_until_they_are_forgotten(catalogue: Catalogue) -> None:
    add(catalogue, ["a", "b"], "first", [{}, {}])
    with catalogue.changing() as version:
        assert version == 2
        catalogue.remove(catalogue.find(["a", "x"]).values())
        catalogue.add(["a"], "second", [9], ['{"new": true}'])
    assert [[item.id for item in items_of(catalogue, version)] for version in (0, 1, 2)] == [[], ["a", "b"], ["b", "a"]]
    segments = [SegmentRow("first", 0, 2), SegmentRow("second", 2, 1)]
    assert catalogue.layout(1) == (1, segments[:1], [])
    assert catalogue.layout() == (2, segments, [0])
    assert [catalogue.count(version) for version in (0, 1, 2)] == [0, 2, 2]
    with catalogue.changing():
        catalogue.forget(0)
        catalogue.replace(segments, "third", [4, 5])
    assert (catalogue.oldest, catalogue.version) == (3, 3)
    assert catalogue.layout() == (3, [SegmentRow("third", 0, 2)], [])
    items = [Item(0, "b", 4, {}), Item(1, "a", 5, {"new": True})]
    assert items_of(catalogue) == items
    assert catalogue.at([1, 0, 7], 3) == {0: items[0], 1: items[1]}
    assert catalogue.at([0], 2) is None
    with pytest.raises(StoreError, match=r"expected version from 3 to 3 of .*, got 2"):
        catalogue.layout(2)
    with pytest.raises(StoreError, match="was compacted while it was read"):
        list(catalogue.items(2, within=segments[0]))


def test_a_run_of_segments_is_replaced_and_the_order_stays(catalogue: Catalogue) -> None:
    for number in range(4):
        add(catalogue, [f"{number}-{row}" for row in range(3)], f"segment {number}", [{}] * 3)
    with catalogue.changing():
        catalogue.remove([1, 4, 5, 6, 7, 8])
    segments = catalogue.layout().segments
    with catalogue.changing():
        catalogue.forget(0)
        catalogue.replace(segments[:2], "both", [7, 8, 9])
        catalogue.replace(segments[2:3], None, [])
    assert catalogue.layout().segments == [SegmentRow("both", 0, 3), SegmentRow("segment 3", 9, 3)]
    expected = ["0-0", "0-2", "1-0", "3-0", "3-1", "3-2"]
    assert [item.id for item in items_of(catalogue)] == expected
    assert [item.position for item in items_of(catalogue)] == [0, 1, 2, 9, 10, 11]
    add(catalogue, ["new"], "last", [{}])
    assert [item.id for item in items_of(catalogue)] == [*expected, "new"]


def test_a_filter_sees_its_version_alone(catalogue: Catalogue) -> None:
    add(catalogue, ["a", "b"], "first", [{"n": 1}, {"n": 2}])
    with catalogue.changing():
        catalogue.remove([1])
    add(catalogue, ["c"], "second", [{"n": 3}])
    assert [catalogue.matching("n >= 2", version) for version in (0, 1, 2, 3)] == [[], [1], [], [2]]
    catalogue.speed_up("n")
    catalogue.speed_up("n")
    assert catalogue.matching("n >= 2", 3) == [2]
    with catalogue._database.reading() as connection:
        plan = connection.run(
            "EXPLAIN QUERY PLAN SELECT position FROM item WHERE json_extract(metadata, '$.\"n\"') = 2"
        )
    assert "USING" in str(plan)


def test_a_catalogue_of_the_first_format_becomes_one_of_this(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE spec (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")
        connection.execute(
            "CREATE TABLE item (position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, segment TEXT NOT NULL, "
            "metadata TEXT NOT NULL) STRICT"
        )
        spec = {**SPEC, "format": 1, "source": "mine"}
        connection.executemany(
            "INSERT INTO spec VALUES (?, ?)", [(key, json.dumps(value)) for key, value in spec.items()]
        )
        rows = [(0, "z", "first", "{}"), (1, "a", "first", '{"n": 1}'), (2, "m", "second", "{}")]
        connection.executemany("INSERT INTO item VALUES (?, ?, ?, ?)", rows)
    expected = [Item(0, "z", None, {}), Item(1, "a", None, {"n": 1}), Item(2, "m", None, {})]
    assert reopened(path) == expected
    with closing(Catalogue(path, SPEC, source="mine")) as catalogue:
        add(catalogue, ["new"], "third", [{}])
        assert items_of(catalogue) == [*expected, Item(3, "new", 0, {})]
        assert catalogue.layout(0).segments == [SegmentRow("first", 0, 2), SegmentRow("second", 2, 1)]
        stored = read_spec(path)
        assert stored == SPEC | {
            "format": FORMAT,
            "source": "mine",
            "version": 1,
            "oldest": 0,
            "tally": stored["tally"],
        }


def test_a_catalogue_of_the_second_format_becomes_one_of_this(path: Path) -> None:
    """The catalogue was compacted, so its positions have gaps, but its rows do not."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE spec (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")
        connection.execute(
            "CREATE TABLE item (position INTEGER PRIMARY KEY, id TEXT NOT NULL, segment TEXT NOT NULL, row INTEGER NOT NULL, "
            "crc INTEGER, metadata TEXT NOT NULL, born INTEGER NOT NULL, died INTEGER) STRICT"
        )
        connection.execute("CREATE UNIQUE INDEX living ON item (id) WHERE died IS NULL")
        old = {key: SPEC[key] for key in ("checkpoint", "tokens", "width")}
        spec = {**old, "format": 2, "source": "mine", "version": 5, "oldest": 3}
        connection.executemany(
            "INSERT INTO spec VALUES (?, ?)", [(key, json.dumps(value)) for key, value in spec.items()]
        )
        rows = [(1, "a", "compacted", 0, 7, "{}", 1, None), (4, "b", "compacted", 1, 8, "{}", 2, None)]
        rows += [(5, "c", "new", 0, 9, "{}", 4, 5), (6, "d", "new", 1, 10, "{}", 4, None)]
        connection.executemany("INSERT INTO item VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    with closing(Catalogue(path, SPEC, source="mine")) as catalogue:
        assert catalogue.layout() == (5, [SegmentRow("compacted", 1, 2), SegmentRow("new", 5, 2)], [5])
        assert [item[:3] for item in items_of(catalogue)] == [(1, "a", 7), (2, "b", 8), (6, "d", 10)]
        assert [item.id for item in items_of(catalogue, 4)] == ["a", "b", "c", "d"]
        assert [item.id for item in items_of(catalogue, 3)] == ["a", "b"]
        assert catalogue.find(["c", "d"]) == {"d": 6}


def test_the_first_format_of_another_index_is_left_as_it_is(catalogue: Catalogue, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE spec SET value = '1', seal = ? WHERE key = 'format'", [seal(b"format", b"1")])
    with pytest.raises(StoreError, match="opened by checkpoint"):
        Catalogue(path, SPEC | {"checkpoint": "xyz"}, source="yours")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT value FROM spec WHERE key = 'format'").fetchone() == ("1",)


@pytest.mark.parametrize(
    "change",
    [{"checkpoint": "xyz"}, {"tokens": 5}, {"width": 8}, {"alpha": 1.0}],
    ids=lambda change: next(iter(change)),
)
def test_another_spec_is_refused_and_both_are_named(catalogue: Catalogue, path: Path, change: dict) -> None:
    with pytest.raises(StoreError) as caught:
        Catalogue(path, SPEC | change, source="yours")
    (key, value), *_ = change.items()
    message = str(caught.value)
    assert f"written by checkpoint 'mine' ({key} {SPEC[key]!r})" in message
    assert f"opened by checkpoint 'yours' ({key} {value!r})" in message
    assert "index the pictures again into another folder" in message


def test_another_format_of_the_embeddings_is_named_alone(catalogue: Catalogue, path: Path) -> None:
    with pytest.raises(StoreError, match="stores float16, got dtype='int8': leave dtype out, or pass dtype='float16'"):
        Catalogue(path, SPEC | {"dtype": "int8"}, source="mine")


def test_the_bundled_model_is_named_in_words(catalogue: Catalogue, path: Path) -> None:
    with pytest.raises(StoreError, match=r"written by checkpoint 'mine' .* opened by the bundled model"):
        Catalogue(path, SPEC | {"checkpoint": "xyz"}, source="")


def test_another_weight_of_the_same_scores_is_no_other_spec(catalogue: Catalogue, path: Path) -> None:
    Catalogue(path, SPEC | {"alpha": 0.3}, source="mine").close()
    assert read_spec(path)["alpha"] == SPEC["alpha"]


def test_the_source_is_kept_and_not_compared(catalogue: Catalogue, path: Path) -> None:
    assert read_spec(path)["source"] == "mine"
    Catalogue(path, SPEC, source="the same by another name").close()
    assert read_spec(path)["source"] == "mine"


def test_a_catalogue_of_another_format_is_refused(catalogue: Catalogue, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        newer = str(FORMAT + 1)
        values = [newer, seal(b"format", newer.encode())]
        connection.execute("UPDATE spec SET value = ?, seal = ? WHERE key = 'format'", values)
    with pytest.raises(StoreError, match=f"of format {FORMAT} or older, got format {FORMAT + 1}; .* update"):
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


def test_a_writer_waits_for_another_and_says_so_in_the_end(
    catalogue: Catalogue, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_PATIENCE", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process is writing to the index"):
            add(catalogue, ["a"], "segment", [{}])
        connection.execute("ROLLBACK")
    add(catalogue, ["a"], "segment", [{}])
    assert [item.id for item in reopened(path)] == ["a"]
