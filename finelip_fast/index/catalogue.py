"""The catalogue of an index folder: one SQLite file that says what the index is and which item lies where.

A row is written only after the segment that holds the item is safely on disk, so the transaction here is the one moment
at which items come to exist, or cease to. Every change makes a new version; what goes stays readable at older versions until
the index is compacted.
"""

from __future__ import annotations

import json
import sqlite3
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from finelip_fast._errors import StoreError

FORMAT = 2

_SPEC = "CREATE TABLE spec (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT"
_ITEM = (
    """CREATE TABLE item (
    position INTEGER PRIMARY KEY,  -- order of insertion
    id TEXT NOT NULL,
    segment TEXT NOT NULL,
    row INTEGER NOT NULL,  -- within the segment
    crc INTEGER,  -- CRC-32 of the row's bytes; NULL: written before there were any
    metadata TEXT NOT NULL,
    born INTEGER NOT NULL,  -- the version that the item came with
    died INTEGER  -- the version that it went with; NULL: it is there
) STRICT""",
    "CREATE UNIQUE INDEX living ON item (id) WHERE died IS NULL",
)
# What a catalogue of an older format needs to become one of the next.
_MIGRATIONS = {
    1: (
        "ALTER TABLE item RENAME TO item_1",
        *_ITEM,
        "INSERT INTO item SELECT position, id, segment, position - MIN(position) OVER (PARTITION BY segment), NULL, metadata, "
        "0, NULL FROM item_1",
        "DROP TABLE item_1",
        "INSERT INTO spec VALUES ('version', '0'), ('oldest', '0')",
    )
}


class Item(NamedTuple):
    """One row: the embedding is row ``row`` of the file ``segment``; ``crc`` is its checksum, if it has one."""

    id: str
    segment: str
    row: int
    crc: int | None
    metadata: dict[str, Any]


class Catalogue:
    """``catalogue.sqlite`` in an index folder.

    Args:
        path: The file; made if missing.
        spec: What the index must be: written when new, compared when not.
        source: What the checkpoint was opened as; kept for messages and for the next opening, not compared.

    Raises:
        StoreError: Not a catalogue, of another format, or of another spec; both are named.
    """

    def __init__(self, path: Path, spec: dict[str, Any], *, source: str) -> None:
        self.path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)
            weakref.finalize(self, self._connection.close)
            self._connection.text_factory = _from_text
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._prepare({"format": FORMAT, **spec}, source)
        except sqlite3.Error as error:
            raise StoreError(f"{path} cannot be opened as an index catalogue: {error}") from None

    def _prepare(self, spec: dict[str, Any], source: str) -> None:
        with self._transaction():
            if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'spec'").fetchone():
                for statement in (_SPEC, *_ITEM):
                    self._connection.execute(statement)
                self._set(**spec, source=source, version=0, oldest=0)
            stored = self._stored()
            # Of this very index: another one is refused as it is.
            if all(stored.get(key) == spec[key] for key in spec if key != "format"):
                while (old := stored.get("format")) in _MIGRATIONS:
                    for statement in _MIGRATIONS[old]:
                        self._connection.execute(statement)
                    self._set(format=old + 1)
                    stored = self._stored()
        different = [key for key in spec if stored.get(key) != spec[key]]
        if different:
            was, now = ({key: one.get(key) for key in different} for one in (stored, spec))
            raise StoreError(
                f"the index at {self.path.parent} was written by checkpoint {stored.get('source')!r} with {was}, "
                f"and is opened by checkpoint {source!r} with {now}: open it with the checkpoint that wrote it, "
                "or index the pictures again into another folder"
            )

    @property
    def version(self) -> int:
        """Counts the changes so far."""
        return self._number("version")

    @property
    def oldest(self) -> int:
        """The oldest version that can still be read."""
        return self._number("oldest")

    def items(self, version: int | None = None) -> Iterator[Item]:
        """The items of a version, None: of now, in order of insertion."""
        rows = self._connection.execute(
            "SELECT id, segment, row, crc, metadata FROM item "
            "WHERE born <= :now AND (died IS NULL OR died > :now) ORDER BY position",
            {"now": self.version if version is None else version},
        )
        for item, segment, row, crc, metadata in rows:
            yield Item(item, segment, row, crc, json.loads(metadata))

    def segments(self) -> set[str]:
        """Names of all files that any version needs."""
        return {name for (name,) in self._connection.execute("SELECT DISTINCT segment FROM item")}

    @contextmanager
    def changing(self, version: int) -> Iterator[None]:
        """A change of an index that is at ``version``: what is done inside happens at its end, all of it or nothing.

        Other writers wait meanwhile, from before the first byte of a new segment: so no segment is ever taken for a stray.

        Raises:
            StoreError: Another process has changed the index since that version, or the disk refuses.
        """
        try:
            with self._transaction():
                if self.version != version:
                    raise StoreError(
                        f"another process has changed the index at {self.path.parent} since it was opened: open it again"
                    )
                yield
                self._set(version=version + 1)
        except sqlite3.Error as error:
            raise StoreError(f"the index at {self.path.parent} cannot be written: {error}") from None

    def copy(self, path: Path, before: Callable[[], object]) -> None:
        """Write the catalogue as it is into a new file; what ``before`` does comes first, and no writer is in between.

        Raises:
            StoreError: The disk refuses.
        """
        try:
            with self._transaction():
                before()
                # By another connection: one that may write cannot be copied from.
                with closing(sqlite3.connect(self.path)) as reader, closing(sqlite3.connect(path)) as target:
                    reader.backup(target)
        except sqlite3.Error as error:
            raise StoreError(f"the catalogue cannot be copied to {path}: {error}") from None

    def add(self, ids: Sequence[str], segment: str, crcs: Sequence[int], metadata: Sequence[dict[str, Any]]) -> None:
        """Inside a change: the rows of a segment that is on disk, in order, behind all that is there."""
        (last,) = self._connection.execute("SELECT COALESCE(MAX(position), -1) FROM item").fetchone()
        born = self.version + 1
        rows = [
            (last + 1 + row, _to_text(item), segment, row, crc, json.dumps(meta), born)
            for row, (item, crc, meta) in enumerate(zip(ids, crcs, metadata, strict=True))
        ]
        self._connection.executemany("INSERT INTO item VALUES (?, CAST(? AS TEXT), ?, ?, ?, ?, ?, NULL)", rows)

    def remove(self, ids: Sequence[str]) -> None:
        """Inside a change: items go; older versions still have them."""
        died = self.version + 1
        statement = "UPDATE item SET died = ? WHERE id = CAST(? AS TEXT) AND died IS NULL"
        self._connection.executemany(statement, [(died, _to_text(item)) for item in ids])

    def compact(self, segment: str, crcs: Sequence[int]) -> None:
        """Inside a change: the items of now are the rows of one segment, and older versions are no more."""
        self._connection.execute("DELETE FROM item WHERE died IS NOT NULL")
        positions = self._connection.execute("SELECT position FROM item ORDER BY position").fetchall()
        self._connection.executemany(
            "UPDATE item SET segment = ?, row = ?, crc = ? WHERE position = ?",
            [(segment, row, crc, at) for row, (crc, (at,)) in enumerate(zip(crcs, positions, strict=True))],
        )
        self._set(oldest=self.version + 1)

    def _stored(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._connection.execute("SELECT key, value FROM spec")}

    def _set(self, **values: Any) -> None:
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        self._connection.executemany("INSERT OR REPLACE INTO spec VALUES (?, ?)", rows)

    def _number(self, key: str) -> int:
        return int(self._connection.execute("SELECT value FROM spec WHERE key = ?", [key]).fetchone()[0])

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection)

    def close(self) -> None:
        self._connection.close()


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


# A path may hold bytes that are no UTF-8; Python has them as lone surrogates, which sqlite3 refuses in a str.


def _to_text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _from_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


class _Transaction:
    """Commits at the end, rolls back on an error; takes the write lock at once so that two writers queue."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._connection.execute("COMMIT" if kind is None else "ROLLBACK")
