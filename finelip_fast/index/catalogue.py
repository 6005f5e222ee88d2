"""The catalogue of an index: one SQLite database that says what the index is and which item lies where.

A row is written only after the segment that holds the item is safely on disk, so the transaction here is the one moment
at which items come to exist, or cease to. Every change makes a new version; what goes stays readable at older versions until
the index is compacted.

An item's position is the order of insertion, and that of its segment's first item plus its row: so a segment of a million
items is one line to read. Compaction closes gaps, and never changes the order.

Every row carries a checksum, which is compared whenever the row is read; rows that are gone show in the tally of segments and
of dead items, and in the numbers of the items that are left. What a filter passes over is not compared, but by :meth:`check`.
"""

from __future__ import annotations

import json
import math
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finelip_fast._files import plain_name
from finelip_fast._json import MAX_DEPTH, check_value, parse_json
from finelip_fast.errors import StoreError
from finelip_fast.index import remedies, schema
from finelip_fast.index.database import Connection, Database
from finelip_fast.index.filters import compile_filter
from finelip_fast.index.lists import write_list
from finelip_fast.index.schema import FORMAT, field_index, seal, seal_item

# Of a query, and of a list of positions in one: below the least limit of any SQLite.
_AT_ONCE = 900
_ITEM = "position, id, crc, metadata, died, seal"
_MOST = 1 << 48  # positions, rows, versions
_TALLY = "tally"
_MIXERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
# What a row that is not as it was written leads to.
_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, struct.error)


class SegmentRow(NamedTuple):
    """A segment: a file of ``rows`` items, the first at position ``first``."""

    name: str
    first: int
    rows: int


class Item(NamedTuple):
    """What the catalogue knows of an item; ``crc`` is the checksum of its embedding, if it has one."""

    position: int
    id: str
    crc: int | None
    metadata: dict[str, Any]


class Layout(NamedTuple):
    """Which segments make a version, in order of insertion, and which positions in them are no items (any more), ascending."""

    version: int
    segments: list[SegmentRow]
    dead: list[int]


class Catalogue:
    """``catalogue.sqlite`` in an index folder, or one in memory.

    May be used from several threads; who reads waits for no one who writes. In a folder that cannot be written to it can be
    read.

    Args:
        path: The file, made if missing; None: in memory.
        spec: What the index must be: written when new, compared when not.
        source: What the checkpoint was opened as; kept for messages and for the next opening, not compared.
        lists: Folder of the segments, where each gets a list of its items, see :mod:`finelip_fast.index.lists`; None: they
            get none.

    Raises:
        StoreError: Not a catalogue, of another format, or of another spec; both are named.
    """

    def __init__(self, path: Path | None, spec: dict[str, Any], *, source: str, lists: Path | None = None) -> None:
        self.path, self._lists = path, lists
        self._wanted = {"format": FORMAT, **spec}
        self._database = Database(path, schema.prepare)
        try:
            self._open(source)
        except BaseException:
            self._database.close()
            raise

    def _open(self, source: str) -> None:
        stored = read_spec(self.path) if self.path is not None else None
        if stored is None:
            if self.path is not None:
                self._database.create()
            with self._database.writing() as connection:
                if schema.prepare(connection) is None:  # no other process has made it meanwhile
                    schema.create(connection)
                    nothing = {"segments": [0, 0], "dead": [0, 0]}
                    self._set(**self._wanted, source=source, version=0, oldest=0, **{_TALLY: nothing})
        with self._database.reading():
            stored = self._stored()
        # Of this very index: another one is refused as it is. What older formats did not tell is taken over.
        is_old = stored.get("format") in range(1, FORMAT)
        wanted = {key: value for key, value in self._wanted.items() if key != "format"}
        different = [key for key in wanted if stored.get(key, wanted[key] if is_old else None) != wanted[key]]
        if not is_old and stored.get("format") != FORMAT:
            different.append("format")
        if different:
            was, now = ({key: side.get(key) for key in different} for side in (stored, self._wanted))
            raise StoreError(
                f"the index at {self._folder} was written by checkpoint {stored.get('source')!r:.200} with {was}, "
                f"and is opened by checkpoint {source!r:.200} with {now}: open it with the checkpoint that wrote it, "
                "or index the pictures again into another folder"
            )
        if is_old and stored["format"] < 3:  # older ones cannot be read as they are
            with self._changed():
                pass

    @property
    def _folder(self) -> str:
        return self._database.folder

    @property
    def read_only(self) -> bool:
        """Whether the folder cannot be written to."""
        return self._database.read_only

    # Reading -----------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Counts the changes so far."""
        return self._number("version")

    @property
    def oldest(self) -> int:
        """The oldest version that can still be read."""
        return self._number("oldest")

    def _number(self, key: str) -> int:
        value = self.note(key)
        if type(value) is not int or not 0 <= value < _MOST:
            raise self._damaged(f"its {key} is {value!r:.40}")
        return value

    def note(self, key: str) -> Any:
        """What is kept under this name; None: nothing."""
        with self._database.reading() as connection:
            rows = connection.run("SELECT key, value, seal FROM spec WHERE key = ?", key)
            return _unsealed(rows[0], connection.sealed, self.path) if rows else None

    def layout(self, version: int | None = None) -> Layout:
        """A version, None: the newest; all of it as of one moment.

        Raises:
            StoreError: A version that is no more, or not yet there.
        """
        with self._database.reading() as connection:
            oldest, newest = self.oldest, self.version
            version = newest if version is None else version
            if not oldest <= version <= newest:
                raise StoreError(f"expected a version of {self._folder} from {oldest} to {newest}, got {version}")
            segments = self._segments(connection, newest)
            dead = self._dead(connection)
        end = segments[-1][0].first + segments[-1][0].rows if segments else 0
        gone = dead[dead[:, 1] <= version, 0]
        if len(dead) and not (dead[0, 0] >= 0 and dead[-1, 0] < end and (dead[:, 1] <= newest).all()):
            raise self._damaged("items are gone that never were there")
        return Layout(version, [row for row, born in segments if born <= version], gone.tolist())

    def _segments(self, connection: Connection, newest: int) -> list[tuple[SegmentRow, int]]:
        """All segments, in order, each with the version that it came with."""
        segments: list[tuple[SegmentRow, int]] = []
        total, end = 0, 0
        for first, name, rows, born, sealed in connection.run(
            "SELECT first, name, rows, born, seal FROM segment ORDER BY first"
        ):
            try:
                if connection.sealed and sealed != seal(first, name, rows, born):
                    raise ValueError("not what was written")
                name = plain_name(name.decode(), self.path or "the catalogue", error=StoreError)
                if not (end <= first < _MOST and 0 < rows < _MOST and 0 <= born <= newest):
                    raise ValueError(f"{rows} rows from {first} on, of version {born}")
            except _DAMAGE as error:
                raise self._damaged(f"a segment is {error}") from None
            end = first + rows
            total += sealed or 0
            segments.append((SegmentRow(name, first, rows), born))
        self._compare_tally(connection, "segments", len(segments), total)
        return segments

    def _dead(self, connection: Connection) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions of all that is gone, ascending, and the versions that it went with: int64 ``[N, 2]``."""
        rows = connection.run("SELECT position, died FROM item WHERE died IS NOT NULL ORDER BY position")
        try:
            dead = np.array(rows, dtype=object).reshape(-1, 2)
            if not all(type(number) is int for number in dead.flat):
                raise ValueError
            dead = dead.astype(np.int64)
        except _DAMAGE:
            raise self._damaged("an item is gone at no version") from None
        self._compare_tally(connection, "dead", len(dead), _mixed(dead))
        return dead

    def _compare_tally(self, connection: Connection, kind: str, count: int, total: int) -> None:
        if connection.sealed and (expected := self._tally(kind)) != [count, total % (1 << 64)]:
            raise self._damaged(f"expected {expected[0]} {kind}, found {count} or other ones")

    def _tally(self, kind: str) -> list[int]:
        try:
            count, total = self.note(_TALLY)[kind]
            return [int(count), int(total)]
        except _DAMAGE:
            raise self._damaged(f"it does not tell how many {kind} there are") from None

    def count(self, version: int) -> int:
        """How many items a version has."""
        layout = self.layout(version)
        return sum(row.rows for row in layout.segments) - len(layout.dead)

    def items(self, version: int | None = None, *, within: SegmentRow | None = None) -> Iterator[Item]:
        """The items of a version, None: of now, in order of insertion; ``within`` a segment, or all of them.

        A generator that reads as it goes, some thousands of items at a time.

        Raises:
            StoreError: Another process compacts the index meanwhile, or an item is not what was written.
        """
        version = self.version if version is None else version
        segments = [within] if within is not None else None
        if segments is None:
            with self._database.reading():
                self._refuse_forgotten(version)
                segments = self.layout(version).segments
        for row in segments:
            position = row.first
            while position < row.first + row.rows:
                rows, is_sealed = self._some_rows(version, position, row.first + row.rows)
                position += len(rows)
                # One by one: thousands of dictionaries at once would keep Python's collector busy.
                for values in rows:
                    item = self._item(values, is_sealed)
                    if values[4] is None or values[4] > version:
                        yield item

    def _refuse_forgotten(self, version: int) -> None:
        if self.oldest > version:
            raise StoreError(f"the index at {self._folder} was compacted while it was read: read it again")

    def _some_rows(self, version: int, start: int, stop: int) -> tuple[list[tuple[Any, ...]], bool]:
        with self._database.reading() as connection:
            self._refuse_forgotten(version)
            rows = connection.run(
                f"SELECT {_ITEM} FROM item WHERE position >= ? AND position < ? ORDER BY position LIMIT 4096",
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
            if not (died is None or 0 < died < _MOST):
                raise ValueError(f"gone with version {died}")
            value = json.loads(metadata)
            if type(value) is not dict:
                raise ValueError(f"no dictionary but {value!r:.40}")
            if metadata.count(b"{") + metadata.count(b"[") > MAX_DEPTH:
                check_value(value, surrogates=True)
            return Item(position, _from_text(name), None if crc is None else int(crc), value)
        except _DAMAGE as error:
            raise self._damaged(f"the item at position {position!r:.20} is {error}") from None

    def _damaged(self, reason: str) -> StoreError:
        return StoreError(
            f"the catalogue of the index at {self._folder} is damaged: {reason:.200}; {remedies.restore(self._folder)}"
        )

    def at(self, positions: Iterable[int], version: int) -> dict[int, Item] | None:
        """What lies at positions of a version; None: that version is no more.

        Raises:
            StoreError: An item is not what was written.
        """
        found: dict[int, Item] = {}
        with self._database.reading() as connection:
            if self.oldest > version:
                return None
            for some in _batches(set(positions)):
                marks = ", ".join("?" * len(some))
                for row in connection.run(f"SELECT {_ITEM} FROM item WHERE position IN ({marks})", *some):
                    found[row[0]] = self._item(row, connection.sealed)
                    if row[4] is not None and row[4] <= version:
                        raise self._damaged(f"the item at position {row[0]} is gone and is not")
        return found

    def find(self, ids: Iterable[str]) -> dict[str, int]:
        """The positions of those ids that are there now."""
        found: dict[str, int] = {}
        with self._database.reading() as connection:
            for some in _batches(ids):
                marks = ", ".join(["CAST(? AS TEXT)"] * len(some))
                rows = connection.run(
                    f"SELECT {_ITEM} FROM item WHERE died IS NULL AND id IN ({marks})", *map(_to_text, some)
                )
                for row in rows:
                    item = self._item(row, connection.sealed)
                    found[item.id] = item.position
        return found

    def matching(self, where: str, version: int) -> list[int]:
        """Positions of the items of a version that a filter lets through, ascending.

        Raises:
            InputError: An expression that cannot be read, see :mod:`finelip_fast.index.filters`.
            StoreError: The database refuses, or takes too long.
        """
        condition, values = compile_filter(where)
        with self._database.reading() as connection:
            try:
                rows = connection.run(
                    f"SELECT position FROM item WHERE ({condition}) AND (died IS NULL OR died > ?)", *values, version
                )
            except sqlite3.Error as error:
                raise self._database.failure(error, f"the filter {where!r:.80} cannot be evaluated") from None
            layout = self.layout(version) if self.oldest <= version else None
        end = layout.segments[-1].first + layout.segments[-1].rows if layout and layout.segments else 0
        return sorted(position for (position,) in rows if position < end)

    def refuse_damaged(self) -> None:
        """Read all of the file by SQLite's own check, and the rows that are no items'.

        Raises:
            StoreError: Something is wrong with it.
        """
        stray = "SELECT position FROM item WHERE position >= ? AND position < ? LIMIT 20"
        with self._database.reading() as connection:
            rows = connection.run("PRAGMA integrity_check(20)", seconds=math.inf)
            faults = [fault.decode("utf-8", "replace") for (fault,) in rows if fault != b"ok"]
            self._stored()
            self._dead(connection)
            strays, end = connection.run(stray, -_MOST, 0), 0
            for row, _ in self._segments(connection, self.version):
                strays += connection.run(stray, end, row.first)
                end = row.first + row.rows
            strays += connection.run(stray, end, _MOST)
        faults += [f"the item at position {position} lies in no segment" for (position,) in strays]
        if faults:
            raise self._damaged("; ".join(faults))

    # Changing ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[int]:
        """A change, which makes the version that is given; seen by others at its end, all of it or nothing.

        Other writers wait meanwhile, from before the first byte of a new segment: so no segment is ever taken for a stray.

        Raises:
            StoreError: Another process is changing the index all the time, the disk refuses, or the folder was removed or
                replaced.
        """
        with self._changed():
            version = self.version + 1
            self._set(version=version)
            yield version

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """No one writes meanwhile."""
        with self._database.writing():
            yield

    @contextmanager
    def _changed(self) -> Iterator[Connection]:
        """A transaction on a catalogue of this format, made so if it is not."""
        with self._database.writing() as connection:
            was_sealed = connection.sealed
            if not was_sealed:
                schema.migrate(connection, self._wanted | self._stored())
                self._set(**{_TALLY: {"segments": [0, 0], "dead": [0, 0]}})
                self._count_again(connection)
            yield connection
        if not was_sealed:
            self._database.forget_readers()

    def _count_again(self, connection: Connection) -> None:
        seals = connection.run("SELECT seal FROM segment")
        dead = np.array(connection.run("SELECT position, died FROM item WHERE died IS NOT NULL"), dtype=np.int64)
        tally = {"segments": [len(seals), sum(value for (value,) in seals)], "dead": [len(dead), _mixed(dead)]}
        self._set(**{_TALLY: tally})

    def _count(self, kind: str, count: int, total: int) -> None:
        """Add to the tally."""
        before = self._tally(kind)
        tally = {**self.note(_TALLY), kind: [before[0] + count, (before[1] + total) % (1 << 64)]}
        self._set(**{_TALLY: tally})

    def add(self, ids: Sequence[str], segment: str, crcs: Sequence[int | None], metadata: Sequence[str]) -> None:
        """Inside a change: the rows of a segment that is on disk, in order, behind all that is there; metadata as JSON."""
        with self._database.writing() as connection:
            segments = self._segments(connection, self.version)
            first = segments[-1][0].first + segments[-1][0].rows if segments else 0
            self._put_segment(connection, first, segment, len(ids))
            self._write_list(segment, zip(ids, crcs, metadata, strict=True))
            rows = zip(range(first, first + len(ids)), map(_to_text, ids), crcs, map(_to_text, metadata), strict=True)
            connection.run_each(
                "INSERT INTO item VALUES (?, CAST(? AS TEXT), ?, CAST(? AS TEXT), NULL, ?)",
                ((at, item, crc, text, seal_item(at, item, crc, text, None)) for at, item, crc, text in rows),
            )

    def _write_list(self, segment: str, rows: Iterable[tuple[str, int | None, str]]) -> None:
        if self._lists is not None:
            stored = self._stored()
            spec = {key: stored[key] for key in (*self._wanted, "source", "version") if key != "format"}
            write_list(self._lists, segment, spec, rows)

    def _put_segment(self, connection: Connection, first: int, name: str, rows: int) -> None:
        version = self.version
        sealed = seal(first, _to_text(name), rows, version)
        connection.run("INSERT INTO segment VALUES (?, ?, ?, ?, ?)", first, name, rows, version, sealed)
        self._count("segments", 1, sealed)

    def remove(self, positions: Iterable[int]) -> None:
        """Inside a change: items go; older versions still have them."""
        with self._database.writing() as connection:
            died = self.version
            for some in _batches(positions):
                marks = ", ".join("?" * len(some))
                rows = connection.run(f"SELECT {_ITEM} FROM item WHERE died IS NULL AND position IN ({marks})", *some)
                for row in rows:
                    self._item(row, connection.sealed)  # a new checksum would hide what is wrong with it
                connection.run_each(
                    "UPDATE item SET died = ?, seal = ? WHERE position = ?",
                    ((died, seal_item(at, item, crc, text, died), at) for at, item, crc, text, *_ in rows),
                )
                dead = np.array([(row[0], died) for row in rows], dtype=np.int64)
                self._count("dead", len(dead), _mixed(dead))

    def forget(self) -> None:
        """Inside a change: older versions are no more, nor the items that only they have."""
        with self._database.writing() as connection:
            connection.run("DELETE FROM item WHERE died IS NOT NULL", seconds=math.inf)
            self._set(oldest=self.version)
            self._count_again(connection)

    def replace(self, old: Sequence[SegmentRow], name: str | None, crcs: Sequence[int]) -> None:
        """Inside a change, after :meth:`forget`: the items of neighbouring segments are those of one; None: there are none.

        Their order stays.
        """
        first, stop = old[0].first, old[-1].first + old[-1].rows
        with self._database.writing() as connection:
            connection.run("DELETE FROM segment WHERE first >= ? AND first < ?", first, stop)
            self._count_again(connection)
            if name is None:
                return
            self._put_segment(connection, first, name, len(crcs))
            rows = connection.run(
                f"SELECT {_ITEM} FROM item WHERE position >= ? AND position < ? ORDER BY position", first, stop
            )
            for row in rows:
                self._item(row, connection.sealed)
            listed = ((_from_text(row[1]), crc, row[3].decode()) for crc, row in zip(crcs, rows, strict=True))
            self._write_list(name, listed)
            # Ascending, and never to a higher position: so none is taken when it is needed.
            connection.run_each(
                "UPDATE item SET position = ?, crc = ?, seal = ? WHERE position = ?",
                (
                    (first + at, crc, seal_item(first + at, row[1], crc, row[3], None), row[0])
                    for at, (crc, row) in enumerate(zip(crcs, rows, strict=True))
                ),
            )

    def keep(self, key: str, value: Any) -> None:
        """Keep a note beside the spec; not a change of the items.

        Raises:
            StoreError: The disk refuses.
        """
        with self._changed():
            self._set(**{key: value})

    def speed_up(self, field: str) -> None:
        """Make filters that compare a field fast, from now on and for every later opening.

        Raises:
            InputError: Not the name of a field, see :mod:`finelip_fast.index.filters`.
            StoreError: The disk refuses.
        """
        statement = field_index(field)
        with self._changed() as connection:
            connection.run(statement, seconds=math.inf)

    def copy(self, path: Path, before: Callable[[], object] = lambda: None) -> None:
        """Write the catalogue as it is into a new file; what ``before`` does comes first, and no writer is in between.

        Of a folder that cannot be written to, writers are not kept away: what ``before`` meets may change under it.

        Raises:
            StoreError: The disk refuses.
        """
        assert self.path is not None
        try:
            with self._database.reading() if self.read_only else self._database.writing() as connection:
                before()
                # By another connection where this one may write: such cannot be copied from.
                source = nullcontext(connection) if self.read_only else closing(sqlite3.connect(self.path))
                with source as reader, closing(sqlite3.connect(path)) as target:
                    reader.backup(target)
        except sqlite3.Error as error:
            raise StoreError(f"the catalogue cannot be copied to {path}: {error}") from None

    def close(self) -> None:
        self._database.close()

    def _stored(self) -> dict[str, Any]:
        with self._database.reading() as connection:
            return _spec_of(connection, self.path)

    def _set(self, **values: Any) -> None:
        with self._database.writing() as connection:
            rows = [(key, json.dumps(value)) for key, value in values.items()]
            connection.run_each(
                "INSERT OR REPLACE INTO spec VALUES (?, ?, ?)",
                ((key, value, seal(key.encode(), value.encode())) for key, value in rows),
            )


def _spec_of(connection: Connection, path: Path | None) -> dict[str, Any]:
    rows = connection.run("SELECT key, value, seal FROM spec LIMIT 1000")
    return {row[0].decode(): _unsealed(row, connection.sealed, path) for row in rows}


def _unsealed(row: tuple[Any, ...], is_sealed: bool, path: Path | None) -> Any:
    key, value, sealed = row
    where = f"{path or 'the catalogue'}, {key!r:.40}"
    try:
        if not is_sealed or sealed == seal(key, value):
            # The checkpoint may lie where names are no UTF-8.
            return parse_json(value, where, error=StoreError, expected="a value of the catalogue", surrogates=True)
    except _DAMAGE:
        pass
    raise StoreError(f"{where}: the catalogue is damaged: {remedies.restore(path and path.parent)}")


def read_spec(path: Path) -> dict[str, Any] | None:
    """What the catalogue at ``path`` says of itself, ``source`` among it; None where there is no catalogue.

    Raises:
        StoreError: It cannot be read, or says what no index can be.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # the latter of a name with NUL
        raise StoreError(f"{str(path)!r:.200} cannot be opened as an index catalogue: {error!s:.80}") from None
    database = Database(path, schema.prepare)
    try:
        with database.reading() as connection:
            # A process killed while it made the catalogue leaves one without tables.
            if connection.run("SELECT 1 FROM main.sqlite_master WHERE name = 'spec'"):
                return _spec_of(connection, path)
            return None
    finally:
        database.close()


def _mixed(dead: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    """A sum over positions and versions in which no one of them can be another unseen."""
    numbers = dead.reshape(-1, 2).astype(np.uint64)
    return int((numbers[:, 0] * _MIXERS[0] ^ numbers[:, 1] * _MIXERS[1]).sum(dtype=np.uint64))


def _batches(values: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(values)
    while some := list(islice(iterator, _AT_ONCE)):
        yield some


# A path may hold bytes that are no UTF-8; Python has them as lone surrogates, which sqlite3 refuses in a str.


def _to_text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _from_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")
