"""The catalogue of an index folder: one SQLite file that says what the index is and which item lies where.

A row is written only after the segment that holds the item is safely on disk, so the transaction here is the one moment
at which items come to exist.
"""

from __future__ import annotations

import json
import sqlite3
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from finelip_fast._errors import StoreError

FORMAT = 1

_SCHEMA = """
CREATE TABLE spec (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE item (
    position INTEGER PRIMARY KEY,  -- order of insertion, from 0
    id TEXT NOT NULL UNIQUE,
    segment TEXT NOT NULL,
    metadata TEXT NOT NULL
) STRICT;
"""


class Item(NamedTuple):
    """One row: ``segment`` names the file that holds the embedding, rows there being in order of insertion."""

    id: str
    segment: str
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
                for statement in _SCHEMA.split(";"):
                    self._connection.execute(statement)
                rows = [(key, json.dumps(value)) for key, value in {**spec, "source": source}.items()]
                self._connection.executemany("INSERT INTO spec VALUES (?, ?)", rows)
        stored = {key: json.loads(value) for key, value in self._connection.execute("SELECT key, value FROM spec")}
        different = [key for key in spec if stored.get(key) != spec[key]]
        if different:
            was, now = ({key: one.get(key) for key in different} for one in (stored, spec))
            raise StoreError(
                f"the index at {self.path.parent} was written by checkpoint {stored.get('source')!r} with {was}, "
                f"and is opened by checkpoint {source!r} with {now}: open it with the checkpoint that wrote it, "
                "or index the pictures again into another folder"
            )

    def items(self) -> Iterator[Item]:
        """All items in order of insertion."""
        for row in self._connection.execute("SELECT id, segment, metadata FROM item ORDER BY position"):
            yield Item(row[0], row[1], json.loads(row[2]))

    def add(self, ids: Sequence[str], segment: str, metadata: Sequence[dict[str, Any]], *, after: int) -> None:
        """Items of a segment that is on disk, placed behind the first ``after``; when it returns, they are kept.

        Raises:
            StoreError: An id that is there already, another writer in between, or a disk that refuses.
        """
        rows = [
            (after + row, _to_text(item), segment, json.dumps(meta))
            for row, (item, meta) in enumerate(zip(ids, metadata, strict=True))
        ]
        try:
            with self._transaction():
                self._connection.executemany("INSERT INTO item VALUES (?, CAST(? AS TEXT), ?, ?)", rows)
        except sqlite3.IntegrityError:
            raise StoreError(
                f"another process has added to the index at {self.path.parent} since it was opened: open it again"
            ) from None
        except sqlite3.Error as error:
            raise StoreError(f"the index at {self.path.parent} cannot be written: {error}") from None

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection)

    def close(self) -> None:
        self._connection.close()


def read_source(path: Path) -> str | None:
    """What the checkpoint of the catalogue at ``path`` was opened as; None where there is no catalogue."""
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path)) as connection:
            # A process killed while it made the catalogue leaves one without tables.
            made = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'spec'").fetchone()
            row = made and connection.execute("SELECT value FROM spec WHERE key = 'source'").fetchone()
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be opened as an index catalogue: {error}") from None
    return json.loads(row[0]) if row else None


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
