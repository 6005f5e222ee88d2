"""Read the catalogue of an index: items, segments and versions, verified by their checksums as they are read.

Positions follow the order of insertion. An item's position is that of its segment's first item plus its row, so a segment of a
million items is one row to read.

Every row carries a checksum, which is verified whenever the row is read. Missing rows show in the tallies of segments and of
dead items, and in the positions of the remaining items. :meth:`CatalogueReader.refuse_damaged` checks the file as a whole.
"""

from __future__ import annotations

import json
import math
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finelip_fast._files import plain_name
from finelip_fast._json import MAX_DEPTH, check_value, parse_json
from finelip_fast.errors import InputError, StoreError
from finelip_fast.index import remedies, schema
from finelip_fast.index.database import Connection, Database
from finelip_fast.index.filters import compile_filter
from finelip_fast.index.pages import Cursor
from finelip_fast.index.schema import seal, seal_item

# Values bound in one query; below the lowest limit of any SQLite.
_AT_ONCE = 900
ITEM = "position, id, crc, metadata, died, seal"
MOST = 1 << 48  # limit of positions, rows and versions
TALLY = "tally"
_MIXERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
# Errors that a damaged row leads to.
_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, struct.error)


class SegmentRow(NamedTuple):
    """A segment: a file of ``rows`` items, the first at position ``first``."""

    name: str
    first: int
    rows: int


class Item(NamedTuple):
    """Catalogue entry of an item; ``crc`` is the checksum of its embedding, if it has one."""

    position: int
    id: str
    crc: int | None
    metadata: dict[str, Any]


class Layout(NamedTuple):
    """Segments of a version, in order of insertion, and the positions in them that are not, or no longer, items, ascending."""

    version: int
    segments: list[SegmentRow]
    dead: list[int]

    @property
    def end(self) -> int:
        """Position after the last item."""
        return self.segments[-1].first + self.segments[-1].rows if self.segments else 0


class CatalogueReader:
    """The contents of a catalogue.

    Args:
        path: Path of the file; None: in memory.
        database: Connections to the database.
    """

    def __init__(self, path: Path | None, database: Database) -> None:
        self.path, self._database = path, database

    @property
    def _folder(self) -> str:
        return self._database.folder

    @property
    def read_only(self) -> bool:
        """Whether the folder cannot be written to."""
        return self._database.read_only

    @property
    def version(self) -> int:
        """Number of changes so far."""
        return self._number("version")

    @property
    def oldest(self) -> int:
        """The oldest version that can still be read."""
        return self._number("oldest")

    def _number(self, key: str) -> int:
        value = self.note(key)
        if type(value) is not int or not 0 <= value < MOST:
            raise self._damaged(f"its {key} is {value!r:.40}")
        return value

    def note(self, key: str) -> Any:
        """The value stored under a key; None: there is none."""
        with self._database.reading() as connection:
            rows = connection.run("SELECT key, value, seal FROM spec WHERE key = ?", key)
            return _unsealed(rows[0], connection.sealed, self.path) if rows else None

    def layout(self, version: int | None = None) -> Layout:
        """The layout of a version (None: the newest), read as one consistent snapshot.

        Raises:
            StoreError: The version no longer exists, or does not exist yet.
        """
        with self._database.reading() as connection:
            oldest, newest = self.oldest, self.version
            version = newest if version is None else version
            if not oldest <= version <= newest:
                raise StoreError(f"expected version from {oldest} to {newest} of {self._folder}, got {version}")
            segments = self._segments(connection, newest)
            dead = self._dead(connection)
        end = segments[-1][0].first + segments[-1][0].rows if segments else 0
        deleted = dead[dead[:, 1] <= version, 0]
        if len(dead) and not (dead[0, 0] >= 0 and dead[-1, 0] < end and (dead[:, 1] <= newest).all()):
            raise self._damaged("it deletes items that were never added")
        return Layout(version, [row for row, born in segments if born <= version], deleted.tolist())

    def segment_names(self) -> set[str]:
        """Names of all segments of all versions."""
        with self._database.reading() as connection:
            return {row.name for row, _ in self._segments(connection, self.version)}

    def _segments(self, connection: Connection, newest: int) -> list[tuple[SegmentRow, int]]:
        """All segments, in order, each with the version that added it."""
        segments: list[tuple[SegmentRow, int]] = []
        total, end = 0, 0
        for first, name, rows, born, sealed in connection.run(
            "SELECT first, name, rows, born, seal FROM segment ORDER BY first"
        ):
            try:
                if connection.sealed and sealed != seal(first, name, rows, born):
                    raise ValueError("not what was written")
                name = plain_name(name.decode(), self.path or "the catalogue", error=StoreError)
                if not (end <= first < MOST and 0 < rows < MOST and 0 <= born <= newest):
                    raise ValueError(f"{rows} rows from {first} on, of version {born}")
            except _DAMAGE as error:
                raise self._damaged(f"a segment is {error}") from None
            end = first + rows
            total += sealed or 0
            segments.append((SegmentRow(name, first, rows), born))
        self._compare_tally(connection, "segments", len(segments), total)
        return segments

    def _dead(self, connection: Connection) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions of all removed items, ascending, and the versions that removed them: int64 ``[N, 2]``."""
        rows = connection.run("SELECT position, died FROM item WHERE died IS NOT NULL ORDER BY position")
        try:
            dead = np.array(rows, dtype=object).reshape(-1, 2)
            if not all(type(number) is int for number in dead.flat):
                raise ValueError
            dead = dead.astype(np.int64)
        except _DAMAGE:
            raise self._damaged("an item was deleted at no version") from None
        self._compare_tally(connection, "dead", len(dead), mixed(dead))
        return dead

    def _compare_tally(self, connection: Connection, kind: str, count: int, total: int) -> None:
        if connection.sealed and (expected := self._tally(kind)) != [count, total % (1 << 64)]:
            raise self._damaged(f"expected {expected[0]} {kind}, found {count} or other ones")

    def _tally(self, kind: str) -> list[int]:
        try:
            count, total = self.note(TALLY)[kind]
            return [int(count), int(total)]
        except _DAMAGE:
            raise self._damaged(f"the number of {kind} is missing") from None

    def count(self, version: int) -> int:
        """Number of items in a version."""
        layout = self.layout(version)
        return sum(row.rows for row in layout.segments) - len(layout.dead)

    def items(self, version: int, *, within: SegmentRow) -> Iterator[Item]:
        """Yield the items of a version in one segment, in order of insertion.

        Items are read as needed, a few thousand at a time.

        Raises:
            StoreError: Another process compacts the index meanwhile, or an item is not what was written.
        """
        position, stop = within.first, within.first + within.rows
        while position < stop:
            rows, is_sealed = self._some_rows(version, position, stop)
            position += len(rows)
            # One by one: thousands of dictionaries at once would keep Python's garbage collector busy.
            for values in rows:
                item = self._item(values, is_sealed)
                if values[4] is None or values[4] > version:
                    yield item

    def _some_rows(self, version: int, start: int, stop: int) -> tuple[list[tuple[Any, ...]], bool]:
        with self._database.reading() as connection:
            if self.oldest > version:
                raise StoreError(f"the index at {self._folder} was compacted while it was read; read it again")
            rows = connection.run(
                f"SELECT {ITEM} FROM item WHERE position >= ? AND position < ? ORDER BY position LIMIT 4096",
                start,
                stop,
            )
            if [row[0] for row in rows] != list(range(start, min(start + 4096, stop))):
                raise self._damaged(f"items are missing among the positions {start} to {stop - 1}")
            return rows, connection.sealed

    def _item(self, row: tuple[Any, ...], is_sealed: bool) -> Item:
        position, name, crc, metadata, died, sealed = row
        try:
            if is_sealed and sealed != seal_item(position, name, crc, metadata, died):
                raise ValueError("not what was written")
            if not (died is None or 0 < died < MOST):
                raise ValueError(f"deleted at version {died}")
            value = json.loads(metadata)
            if type(value) is not dict:
                raise ValueError(f"not a dictionary but {value!r:.40}")
            if metadata.count(b"{") + metadata.count(b"[") > MAX_DEPTH:
                check_value(value, surrogates=True)
            return Item(position, from_text(name), None if crc is None else int(crc), value)
        except _DAMAGE as error:
            raise self._damaged(f"the item at position {position!r:.20} is {error}") from None

    def _damaged(self, reason: str) -> StoreError:
        return StoreError(
            f"the catalogue of the index at {self._folder} is damaged: {reason:.200}; {remedies.restore(self._folder)}"
        )

    def at(self, positions: Iterable[int], version: int) -> dict[int, Item] | None:
        """Items at the given positions of a version; None: the version no longer exists.

        Raises:
            StoreError: An item is not what was written.
        """
        items: dict[int, Item] = {}
        with self._database.reading() as connection:
            if self.oldest > version:
                return None
            for batch in batches(set(positions)):
                marks = ", ".join("?" * len(batch))
                for row in connection.run(f"SELECT {ITEM} FROM item WHERE position IN ({marks})", *batch):
                    items[row[0]] = self._item(row, connection.sealed)
                    if row[4] is not None and row[4] <= version:
                        raise self._damaged(f"the item at position {row[0]} is marked both deleted and present")
        return items

    def find(self, ids: Iterable[str], version: int | None = None) -> dict[str, int]:
        """Positions of the given ids that a version has (None: the newest).

        Raises:
            StoreError: The version no longer exists, or does not exist yet.
        """
        present: dict[str, int] = {}
        with self._database.reading() as connection:
            conditions, end = ["died IS NULL"], MOST
            if version is not None and version != self.version:
                # A second query, since each has its own index.
                conditions.append(f"died > {version:d}")
                end = self.layout(version).end
            for batch, condition in product(batches(ids), conditions):
                marks = ", ".join(["CAST(? AS TEXT)"] * len(batch))
                rows = connection.run(
                    f"SELECT {ITEM} FROM item WHERE {condition} AND id IN ({marks})", *map(to_text, batch)
                )
                for row in rows:
                    item = self._item(row, connection.sealed)
                    if item.position < end:
                        present[item.id] = item.position
        return present

    def living(self, ids: Iterable[str], version: int) -> dict[int, Item] | None:
        """Items of the given ids in a version, by position; None: the version no longer exists."""
        with self._database.reading():
            return None if self.oldest > version else self.at(self.find(ids, version).values(), version)

    def page(
        self, where: str | None, limit: int, after: Cursor | None, version: int | None
    ) -> tuple[list[Item], Cursor | None]:
        """Items after a cursor in order of insertion, and the cursor of the last one if there are more.

        Args:
            where: Filter on the metadata; None: all items.
            limit: Maximum number of items.
            after: End of the previous page; None: the first page.
            version: Version to list; None: the newest.

        Raises:
            InputError: The filter cannot be parsed, or the index was compacted since the previous page, and its last item is
                gone.
            StoreError: The version no longer exists, an item is not what was written, or the database reports an error.
        """
        condition, values = ("1", []) if where is None else compile_filter(where)
        with self._database.reading() as connection:
            end = MOST if version is None else self.layout(version).end
            start = -1 if after is None else self._position_of(after)
            try:
                rows = connection.run(
                    f"SELECT {ITEM} FROM item WHERE position > ? AND position < ? AND (died IS NULL OR died > ?) "
                    f"AND {condition} ORDER BY position LIMIT ?",
                    *(start, end, self.version if version is None else version, *values, limit + 1),
                )
            except sqlite3.Error as error:
                raise self._database.failure(error, f"the filter {where!r:.80} cannot be evaluated") from None
            items = [self._item(row, connection.sealed) for row in rows[:limit]]
            if len(rows) <= limit:
                return items, None
            return items, Cursor(self.oldest, items[-1].position, items[-1].id)

    def _position_of(self, cursor: Cursor) -> int:
        """Current position of the end of a page: compaction lowers positions and keeps their order."""
        if cursor.oldest == self.oldest:
            return cursor.position
        position = self.find([cursor.id]).get(cursor.id) if cursor.id else None
        if position is None or position > cursor.position:  # gone, or added again at the end
            raise InputError(
                "the last item of the page before after was deleted and the index compacted since; list from the beginning"
            )
        return position

    def matching(self, where: str, version: int) -> list[int]:
        """Positions of the items of a version that match a filter, ascending.

        Raises:
            InputError: The filter cannot be parsed, see :mod:`finelip_fast.index.filters`.
            StoreError: The database reports an error, or takes too long.
        """
        condition, values = compile_filter(where)
        with self._database.reading() as connection:
            try:
                rows = connection.run(
                    f"SELECT position FROM item WHERE ({condition}) AND (died IS NULL OR died > ?)", *values, version
                )
            except sqlite3.Error as error:
                raise self._database.failure(error, f"the filter {where!r:.80} cannot be evaluated") from None
            end = self.layout(version).end if self.oldest <= version else 0
        return sorted(position for (position,) in rows if position < end)

    def refuse_damaged(self) -> None:
        """Check the whole file with SQLite's own check, and verify all rows except those of items.

        Raises:
            StoreError: Something is wrong with the file.
        """
        stray = "SELECT position FROM item WHERE position >= ? AND position < ? LIMIT 20"
        with self._database.reading() as connection:
            rows = connection.run("PRAGMA integrity_check(20)", seconds=math.inf)
            faults = [fault.decode("utf-8", "replace") for (fault,) in rows if fault != b"ok"]
            self._stored()
            self._dead(connection)
            strays, end = connection.run(stray, -MOST, 0), 0
            for row, _ in self._segments(connection, self.version):
                strays += connection.run(stray, end, row.first)
                end = row.first + row.rows
            strays += connection.run(stray, end, MOST)
        faults += [f"the item at position {position} lies in no segment" for (position,) in strays]
        if faults:
            raise self._damaged("; ".join(faults))

    def _stored(self) -> dict[str, Any]:
        with self._database.reading() as connection:
            return _spec_of(connection, self.path)


def _spec_of(connection: Connection, path: Path | None) -> dict[str, Any]:
    rows = connection.run("SELECT key, value, seal FROM spec LIMIT 1000")
    return {row[0].decode(): _unsealed(row, connection.sealed, path) for row in rows}


def _unsealed(row: tuple[Any, ...], is_sealed: bool, path: Path | None) -> Any:
    key, value, sealed = row
    where = f"{path or 'the catalogue'}, {key!r:.40}"
    try:
        if not is_sealed or sealed == seal(key, value):
            # The path of the checkpoint may not be UTF-8.
            return parse_json(value, where, error=StoreError, expected="a value of the catalogue", surrogates=True)
    except _DAMAGE:
        pass
    raise StoreError(f"{where}: the catalogue is damaged: {remedies.restore(path and path.parent)}")


def spec_differences(stored: Mapping[str, Any], opening: Mapping[str, Any]) -> list[str]:
    """Names of the fields in which a stored spec differs from the opening one.

    A different ``alpha`` does not count, unless it is 1 on one side: it weights the scores of the same embeddings, and an
    index follows the checkpoint that it is opened with.
    """
    alphas = stored.get("alpha"), opening.get("alpha")
    return [
        name
        for name in opening
        if stored.get(name) != opening[name] and (name != "alpha" or None in alphas or 1 in alphas)
    ]


def read_spec(path: Path) -> dict[str, Any] | None:
    """The spec stored in the catalogue at ``path``, including ``source``; None if there is no catalogue.

    Raises:
        StoreError: The catalogue cannot be read, or is invalid.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # the latter for a name with NUL
        raise StoreError(f"{str(path)!r:.200} cannot be opened as an index catalogue: {error!s:.80}") from None
    database = Database(path, schema.prepare)
    try:
        with database.reading() as connection:
            # A process killed while it was creating the catalogue leaves one without tables.
            if connection.run("SELECT 1 FROM main.sqlite_master WHERE name = 'spec'"):
                return _spec_of(connection, path)
            return None
    finally:
        database.close()


def mixed(dead: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    """A sum over positions and versions that shows if any one of them is replaced by another."""
    numbers = dead.reshape(-1, 2).astype(np.uint64)
    return int((numbers[:, 0] * _MIXERS[0] ^ numbers[:, 1] * _MIXERS[1]).sum(dtype=np.uint64))


def batches(values: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(values)
    while batch := list(islice(iterator, _AT_ONCE)):
        yield batch


# A path may hold bytes that are not UTF-8; Python represents them as lone surrogates, which sqlite3 rejects in a str.


def to_text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def from_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")
