"""The catalogue of an index: one SQLite database that says what the index is and which item lies where.

A row is written only after the segment that holds the item is safely on disk, so the transaction here is the one moment
at which items come to exist, or cease to. Every change makes a new version; what goes stays readable at older versions until
the index is compacted.

An item's position is the order of insertion, and that of its segment's first item plus its row: so a segment of a million
items is one line to read. Compaction closes gaps, and never changes the order.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from finelip_fast._errors import StoreError
from finelip_fast.index.filters import compile_filter, field_expression

FORMAT = 3

_SPEC = "CREATE TABLE spec (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT"
_ITEMS = (
    """CREATE TABLE segment (
    first INTEGER PRIMARY KEY,  -- position of its first item
    name TEXT NOT NULL UNIQUE,
    rows INTEGER NOT NULL,
    born INTEGER NOT NULL  -- the version that it came with
) STRICT""",
    """CREATE TABLE item (
    position INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    crc INTEGER,  -- CRC-32 of the row's bytes; NULL: written before there were any
    metadata TEXT NOT NULL,
    died INTEGER  -- the version that it went with; NULL: it is there
) STRICT""",
    "CREATE UNIQUE INDEX living ON item (id) WHERE died IS NULL",
    "CREATE INDEX dead ON item (died) WHERE died IS NOT NULL",
)
# What a catalogue of an older format needs to become one of the next.
_MIGRATIONS = {
    1: (
        "ALTER TABLE item RENAME TO item_1",
        """CREATE TABLE item (position INTEGER PRIMARY KEY, id TEXT NOT NULL, segment TEXT NOT NULL, row INTEGER NOT NULL,
        crc INTEGER, metadata TEXT NOT NULL, born INTEGER NOT NULL, died INTEGER) STRICT""",
        "INSERT INTO item SELECT position, id, segment, position - MIN(position) OVER (PARTITION BY segment), NULL, metadata, "
        "0, NULL FROM item_1",
        "DROP TABLE item_1",
        "INSERT INTO spec VALUES ('version', '0'), ('oldest', '0')",
    ),
    2: (
        "DROP INDEX IF EXISTS living",
        "ALTER TABLE item RENAME TO item_2",
        *_ITEMS,
        "INSERT INTO segment SELECT MIN(position - row), segment, MAX(row) + 1, MIN(born) FROM item_2 GROUP BY segment",
        "INSERT INTO item SELECT MIN(position - row) OVER (PARTITION BY segment) + row, id, crc, metadata, died FROM item_2",
        "DROP TABLE item_2",
    ),
}
_PATIENCE = 30.0  # seconds
# Of a query, and of a list of positions in one: below the least limit of any SQLite.
_AT_ONCE = 900


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

    May be used from several threads. In a folder that cannot be written to it can be read.

    Args:
        path: The file, made if missing; None: in memory.
        spec: What the index must be: written when new, compared when not.
        source: What the checkpoint was opened as; kept for messages and for the next opening, not compared.

    Raises:
        StoreError: Not a catalogue, of another format, or of another spec; both are named.
    """

    def __init__(self, path: Path | None, spec: dict[str, Any], *, source: str) -> None:
        self.path = path
        self.read_only = path is not None and path.exists() and not _is_writable(path.parent)
        self._lock = threading.RLock()
        try:
            self._connection = self._connect()
            weakref.finalize(self, self._connection.close)
            self._connection.text_factory = _from_text
            if not self.read_only:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
            self._prepare({"format": FORMAT, **spec}, source)
        except sqlite3.Error as error:
            raise StoreError(f"{path} cannot be opened as an index catalogue: {error}") from None

    def _connect(self) -> sqlite3.Connection:
        target = ":memory:" if self.path is None else str(self.path)
        if self.read_only:
            assert self.path is not None
            if any(log.stat().st_size for log in self.path.parent.glob(f"{self.path.name}-wal")):
                raise StoreError(
                    f"{self.path.parent} cannot be written to, and its last changes are still in {self.path.name}-wal: "
                    "open it once where it can be written to"
                )
            target = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
        # Another writer is waited for: one that compacts takes its time.
        return sqlite3.connect(
            target, isolation_level=None, check_same_thread=False, uri=self.read_only, timeout=_PATIENCE
        )

    def _prepare(self, spec: dict[str, Any], source: str) -> None:
        with self._transaction("DEFERRED" if self.read_only else "IMMEDIATE"):
            if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'spec'").fetchone():
                for statement in (_SPEC, *_ITEMS):
                    self._connection.execute(statement)
                self._set(**spec, source=source, version=0, oldest=0)
            stored = self._stored()
            # Of this very index: another one is refused as it is. What older formats did not tell is taken over.
            if all(stored.get(key, spec[key]) == spec[key] for key in spec if key != "format"):
                while (old := stored.get("format")) in _MIGRATIONS:
                    for statement in _MIGRATIONS[old]:
                        self._connection.execute(statement)
                    self._set(**spec)
                    self._set(format=old + 1)
                    stored = self._stored()
        different = [key for key in spec if stored.get(key) != spec[key]]
        if different:
            was, now = ({key: one.get(key) for key in different} for one in (stored, spec))
            raise StoreError(
                f"the index at {self._folder} was written by checkpoint {stored.get('source')!r} with {was}, "
                f"and is opened by checkpoint {source!r} with {now}: open it with the checkpoint that wrote it, "
                "or index the pictures again into another folder"
            )

    @property
    def _folder(self) -> str:
        return "(in memory)" if self.path is None else str(self.path.parent)

    # Reading -----------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Counts the changes so far."""
        return int(self.note("version"))

    @property
    def oldest(self) -> int:
        """The oldest version that can still be read."""
        return int(self.note("oldest"))

    @property
    def changes_of_others(self) -> int:
        """A number that is another one after another connection has changed the catalogue; costs microseconds."""
        return int(self._all("PRAGMA data_version")[0][0])

    def note(self, key: str) -> Any:
        """What is kept under this name; None: nothing."""
        rows = self._all("SELECT value FROM spec WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else None

    def layout(self, version: int | None = None) -> Layout:
        """A version, None: the newest; all of it as of one moment.

        Raises:
            StoreError: A version that is no more, or not yet there.
        """
        with self._transaction():
            oldest, newest = self.oldest, self.version
            version = newest if version is None else version
            if not oldest <= version <= newest:
                raise StoreError(f"expected a version of {self._folder} from {oldest} to {newest}, got {version}")
            segments = self._connection.execute(
                "SELECT name, first, rows FROM segment WHERE born <= ? ORDER BY first", [version]
            )
            dead = self._connection.execute(
                "SELECT position FROM item WHERE died IS NOT NULL AND died <= ? ORDER BY position", [version]
            )
            return Layout(version, [SegmentRow(*row) for row in segments], [position for (position,) in dead])

    def count(self, version: int) -> int:
        """How many items a version has."""
        ((count,),) = self._all(
            "SELECT COUNT(*) FROM item WHERE position < ? AND (died IS NULL OR died > ?)", self._end(version), version
        )
        return int(count)

    def items(self, version: int | None = None, *, within: SegmentRow | None = None) -> Iterator[Item]:
        """The items of a version, None: of now, in order of insertion; ``within`` a segment, or all of them.

        A generator that reads as it goes, some thousands of items at a time.

        Raises:
            StoreError: Another process compacts the index meanwhile.
        """
        version = self.version if version is None else version
        start, stop = (0, self._end(version)) if within is None else (within.first, within.first + within.rows)
        while rows := self._some_items(version, start, stop):
            start = rows[-1][0] + 1
            for position, item, crc, metadata in rows:
                yield Item(position, item, crc, json.loads(metadata))

    def _some_items(self, version: int, start: int, stop: int) -> list[Any]:
        with self._transaction():
            if self.oldest > version:
                raise StoreError(f"the index at {self._folder} was compacted while it was read: read it again")
            return self._all(
                "SELECT position, id, crc, metadata FROM item WHERE position >= ? AND position < ? "
                "AND (died IS NULL OR died > ?) ORDER BY position LIMIT 4096",
                *(start, stop, version),
            )

    def _end(self, version: int) -> int:
        """The position behind all items of a version."""
        (end,) = self._all("SELECT COALESCE(MAX(first + rows), 0) FROM segment WHERE born <= ?", version)[0]
        return int(end)

    def at(self, positions: Iterable[int], version: int) -> dict[int, Item] | None:
        """What lies at positions of a version; None: that version is no more."""
        found: dict[int, Item] = {}
        with self._transaction():
            if self.oldest > version:
                return None
            for some in _batches(set(positions)):
                marks = ", ".join("?" * len(some))
                rows = self._all(f"SELECT position, id, crc, metadata FROM item WHERE position IN ({marks})", *some)
                found |= {row[0]: Item(row[0], row[1], row[2], json.loads(row[3])) for row in rows}
        return found

    def find(self, ids: Iterable[str]) -> dict[str, int]:
        """The positions of those ids that are there now."""
        found: dict[str, int] = {}
        for some in _batches(ids):
            marks = ", ".join(["CAST(? AS TEXT)"] * len(some))
            found |= self._all(
                f"SELECT id, position FROM item WHERE died IS NULL AND id IN ({marks})", *map(_to_text, some)
            )
        return found

    def matching(self, where: str, version: int) -> list[int]:
        """Positions of the items of a version that a filter lets through, ascending.

        Raises:
            InputError: An expression that cannot be read, see :mod:`finelip_fast.index.filters`.
            StoreError: The database refuses.
        """
        condition, values = compile_filter(where)
        try:
            rows = self._all(
                f"SELECT position FROM item WHERE ({condition}) AND position < ? AND (died IS NULL OR died > ?)",
                *(*values, self._end(version), version),
            )
        except sqlite3.Error as error:
            raise StoreError(f"the filter {where!r} cannot be evaluated: {error}") from None
        return sorted(position for (position,) in rows)

    # Changing ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[int]:
        """A change, which makes the version that is given; seen by others at its end, all of it or nothing.

        Other writers wait meanwhile, from before the first byte of a new segment: so no segment is ever taken for a stray.

        Raises:
            StoreError: Another process is changing the index all the time, or the disk refuses.
        """
        try:
            with self._transaction("IMMEDIATE"):
                version = self.version + 1
                self._set(version=version)
                yield version
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise StoreError(
                    f"another process is writing to the index at {self._folder}: wait for it to end and try again"
                ) from None
            raise StoreError(f"the index at {self._folder} cannot be written: {error}") from None
        except sqlite3.Error as error:
            raise StoreError(f"the index at {self._folder} cannot be written: {error}") from None

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """No one writes meanwhile."""
        with self._transaction("IMMEDIATE"):
            yield

    def add(self, ids: Sequence[str], segment: str, crcs: Sequence[int | None], metadata: Sequence[str]) -> None:
        """Inside a change: the rows of a segment that is on disk, in order, behind all that is there; metadata as JSON."""
        first = self._end(self.version)
        self._connection.execute("INSERT INTO segment VALUES (?, ?, ?, ?)", [first, segment, len(ids), self.version])
        rows = zip(range(first, first + len(ids)), map(_to_text, ids), crcs, metadata, strict=True)
        self._connection.executemany("INSERT INTO item VALUES (?, CAST(? AS TEXT), ?, ?, NULL)", rows)

    def remove(self, positions: Iterable[int]) -> None:
        """Inside a change: items go; older versions still have them."""
        died = self.version
        self._connection.executemany("UPDATE item SET died = ? WHERE position = ?", ((died, at) for at in positions))

    def forget(self) -> None:
        """Inside a change: older versions are no more, nor the items that only they have."""
        self._connection.execute("DELETE FROM item WHERE died IS NOT NULL")
        self._set(oldest=self.version)

    def replace(self, old: Sequence[SegmentRow], name: str | None, crcs: Sequence[int]) -> None:
        """Inside a change, after :meth:`forget`: the items of neighbouring segments are those of one; None: there are none.

        Their order stays.
        """
        first, stop = old[0].first, old[-1].first + old[-1].rows
        self._connection.execute("DELETE FROM segment WHERE first >= ? AND first < ?", [first, stop])
        if name is None:
            return
        self._connection.execute("INSERT INTO segment VALUES (?, ?, ?, ?)", [first, name, len(crcs), self.version])
        rows = self._all(
            "SELECT position FROM item WHERE position >= ? AND position < ? ORDER BY position", first, stop
        )
        # Ascending, and never to a higher position: so none is taken when it is needed.
        self._connection.executemany(
            "UPDATE item SET position = ?, crc = ? WHERE position = ?",
            [(first + row, crc, at) for row, (crc, (at,)) in enumerate(zip(crcs, rows, strict=True))],
        )

    def keep(self, key: str, value: Any) -> None:
        """Keep a note beside the spec; not a change of the items.

        Raises:
            StoreError: The disk refuses.
        """
        try:
            with self._transaction("IMMEDIATE"):
                self._set(**{key: value})
        except sqlite3.Error as error:
            raise StoreError(f"the index at {self._folder} cannot be written: {error}") from None

    def speed_up(self, field: str) -> None:
        """Make filters that compare a field fast, from now on and for every later opening.

        Raises:
            InputError: Not the name of a field, see :mod:`finelip_fast.index.filters`.
            StoreError: The disk refuses.
        """
        expression = field_expression(field)
        name = "field " + expression.replace('"', '""')
        try:
            with self._lock:
                self._connection.execute(f'CREATE INDEX IF NOT EXISTS "{name}" ON item ({expression})')
        except sqlite3.Error as error:
            raise StoreError(f"the index at {self._folder} cannot be written: {error}") from None

    def copy(self, path: Path, before: Callable[[], object]) -> None:
        """Write the catalogue as it is into a new file; what ``before`` does comes first, and no writer is in between.

        Raises:
            StoreError: The disk refuses.
        """
        assert self.path is not None
        try:
            with self._transaction("IMMEDIATE"):
                before()
                # By another connection: one that may write cannot be copied from.
                with closing(sqlite3.connect(self.path)) as reader, closing(sqlite3.connect(path)) as target:
                    reader.backup(target)
        except sqlite3.Error as error:
            raise StoreError(f"the catalogue cannot be copied to {path}: {error}") from None

    def close(self) -> None:
        self._connection.close()

    def _stored(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._all("SELECT key, value FROM spec")}

    def _set(self, **values: Any) -> None:
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        self._connection.executemany("INSERT OR REPLACE INTO spec VALUES (?, ?)", rows)

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self, kind: str = "DEFERRED") -> Iterator[None]:
        """Commits at the end, rolls back on an error; one that will write takes the lock at once, so that writers queue.

        Inside another one it is a part of that.
        """
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute(f"BEGIN {kind}")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk has ended it already
                    self._connection.execute("ROLLBACK")
                raise


def read_spec(path: Path) -> dict[str, Any] | None:
    """What the catalogue at ``path`` says of itself, ``source`` among it; None where there is no catalogue."""
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path)) as connection:
            # A process killed while it made the catalogue leaves one without tables.
            made = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'spec'").fetchone()
            rows = connection.execute("SELECT key, value FROM spec").fetchall() if made else []
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be opened as an index catalogue: {error}") from None
    return {key: json.loads(value) for key, value in rows} or None


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _batches(values: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(values)
    while some := list(islice(iterator, _AT_ONCE)):
        yield some


# A path may hold bytes that are no UTF-8; Python has them as lone surrogates, which sqlite3 refuses in a str.


def _to_text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _from_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")
