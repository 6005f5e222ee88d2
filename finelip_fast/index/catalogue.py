"""The catalogue of an index: one SQLite database with the spec of the index and the location of each item.

A row is written only after the segment that holds the item is safely on disk, so the transaction here is the one moment
at which items begin or cease to exist. Every change makes a new version; removed items stay readable at older versions until
the index is compacted.

See :mod:`finelip_fast.index.reader` for how it is read and how damage is detected. Compaction closes gaps between positions,
and never changes the order.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from finelip_fast.errors import StoreError
from finelip_fast.index import schema
from finelip_fast.index.database import Connection, Database
from finelip_fast.index.filters import field_expression
from finelip_fast.index.lists import write_list
from finelip_fast.index.reader import (
    ITEM,
    TALLY,
    CatalogueReader,
    Item,
    Layout,
    SegmentRow,
    batches,
    from_text,
    mixed,
    read_spec,
    spec_differences,
    to_text,
)
from finelip_fast.index.schema import FORMAT, seal, seal_item

__all__ = ["Catalogue", "Item", "Layout", "SegmentRow", "read_spec"]

_NO_TALLY = {"segments": [0, 0], "dead": [0, 0]}


def _checkpoint(source: Any) -> str:
    return f"checkpoint {source!r:.200}" if source else "the bundled model"


def _another_checkpoint(stored: dict[str, Any], opening: dict[str, Any]) -> str:
    """Advice on an index of another checkpoint, and the reason why there is no other way."""
    remedy = "open it with the checkpoint that wrote it"
    if stored.get("alpha") == 1 and opening.get("alpha") != 1:
        return f"it holds global embeddings alone, since that checkpoint had no trained aggregators; {remedy}"
    return remedy


class Catalogue(CatalogueReader):
    """``catalogue.sqlite`` in an index folder, or one in memory.

    It may be used from several threads; readers never wait for writers. It can be read in a folder that cannot be written to.

    Args:
        path: Path of the file, created if missing; None: in memory.
        spec: Expected spec: written to a new catalogue, compared with that of an existing one.
        source: Name or path that the checkpoint was opened with; stored for messages and for the next opening, not compared.
        lists: Folder of the segments, where each gets a list of its items, see :mod:`finelip_fast.index.lists`; None: they
            get none.

    Raises:
        StoreError: The file is not a catalogue, or has another format or another spec; the message names both.
    """

    def __init__(self, path: Path | None, spec: dict[str, Any], *, source: str, lists: Path | None = None) -> None:
        super().__init__(path, Database(path, schema.prepare))
        self.lists = lists
        self._wanted = {"format": FORMAT, **spec}
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
                if schema.prepare(connection) is None:  # no other process has created it meanwhile
                    schema.create(connection)
                    self._set(**self._wanted, source=source, version=0, oldest=0, **{TALLY: _NO_TALLY})
        with self._database.reading():
            stored = self._stored()
        # Another index is refused before it is migrated. Values that older formats lack are taken from the expected spec.
        is_old = stored.get("format") in range(1, FORMAT)
        expected = {key: value for key, value in self._wanted.items() if key != "format"}
        different = spec_differences(expected | stored if is_old else stored, expected)
        if not is_old and stored.get("format") != FORMAT:
            raise StoreError(
                f"{self._folder}: expected an index of format {FORMAT} or older, got format {stored.get('format')!r:.20}; it "
                "was made by a newer finelip_fast: update this one"
            )
        if different == ["dtype"]:
            has, expects = stored.get("dtype"), self._wanted["dtype"]
            raise StoreError(
                f"the index at {self._folder} stores {has}, got dtype={expects!r}: leave dtype out, or pass dtype={has!r}, or "
                "use another folder"
            )
        if different:
            was, current = (
                ", ".join(f"{key} {side.get(key)!r:.20}" for key in different) for side in (stored, self._wanted)
            )
            raise StoreError(
                f"the index at {self._folder} was written by {_checkpoint(stored.get('source'))} ({was}), "
                f"and is opened by {_checkpoint(source)} ({current}): "
                f"{_another_checkpoint(stored, self._wanted)}, or index the pictures again into another folder"
            )
        if is_old and stored["format"] < 3:  # formats before 3 cannot be read as they are
            with self._changed():
                pass

    @contextmanager
    def changing(self) -> Iterator[int]:
        """Make a change and yield the version that it makes; others see all of it at its end, or nothing.

        Other writers wait from before the first byte of a new segment is written, so no segment is ever mistaken for a stray.

        Raises:
            StoreError: Another process keeps changing the index, writing fails, or the folder was removed or replaced.
        """
        with self._changed():
            version = self.version + 1
            self._set(version=version)
            yield version

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Keep all other writers waiting."""
        with self._database.writing():
            yield

    @contextmanager
    def _changed(self) -> Iterator[Connection]:
        """A transaction on a catalogue of the current format, to which it is migrated if needed."""
        with self._database.writing() as connection:
            was_sealed = connection.sealed
            if not was_sealed:
                schema.migrate(connection, self._wanted | self._stored())
                self._set(**{TALLY: _NO_TALLY})
                self._count_again(connection)
            yield connection
        if not was_sealed:
            self._database.forget_readers()

    def _count_again(self, connection: Connection) -> None:
        seals = connection.run("SELECT seal FROM segment")
        dead = np.array(connection.run("SELECT position, died FROM item WHERE died IS NOT NULL"), dtype=np.int64)
        tally = {"segments": [len(seals), sum(value for (value,) in seals)], "dead": [len(dead), mixed(dead)]}
        self._set(**{TALLY: tally})

    def _count(self, kind: str, count: int, total: int) -> None:
        """Add to the tally."""
        before = self._tally(kind)
        tally = {**self.note(TALLY), kind: [before[0] + count, (before[1] + total) % (1 << 64)]}
        self._set(**{TALLY: tally})

    def add(self, ids: Sequence[str], segment: str, crcs: Sequence[int | None], metadata: Sequence[str]) -> None:
        """Within a change, append the rows of a segment that is on disk, in order; metadata as JSON."""
        with self._database.writing() as connection:
            segments = self._segments(connection, self.version)
            first = segments[-1][0].first + segments[-1][0].rows if segments else 0
            self._put_segment(connection, first, segment, len(ids))
            self._write_list(segment, zip(ids, crcs, metadata, strict=True))
            rows = zip(range(first, first + len(ids)), map(to_text, ids), crcs, map(to_text, metadata), strict=True)
            connection.run_each(
                "INSERT INTO item VALUES (?, CAST(? AS TEXT), ?, CAST(? AS TEXT), NULL, ?)",
                ((at, item, crc, text, seal_item(at, item, crc, text, None)) for at, item, crc, text in rows),
            )

    def _write_list(self, segment: str, rows: Iterable[tuple[str, int | None, str]]) -> None:
        if self.lists is not None:
            stored = self._stored()
            spec = {key: stored[key] for key in (*self._wanted, "source", "version") if key != "format"}
            write_list(self.lists, segment, spec, rows)

    def _put_segment(self, connection: Connection, first: int, name: str, rows: int) -> None:
        version = self.version
        sealed = seal(first, to_text(name), rows, version)
        connection.run("INSERT INTO segment VALUES (?, ?, ?, ?, ?)", first, name, rows, version, sealed)
        self._count("segments", 1, sealed)

    def remove(self, positions: Iterable[int]) -> None:
        """Within a change, remove items; older versions still have them."""
        with self._database.writing() as connection:
            died = self.version
            for batch in batches(positions):
                marks = ", ".join("?" * len(batch))
                rows = connection.run(f"SELECT {ITEM} FROM item WHERE died IS NULL AND position IN ({marks})", *batch)
                for row in rows:
                    self._item(row, connection.sealed)  # a new checksum would hide the damage
                connection.run_each(
                    "UPDATE item SET died = ?, seal = ? WHERE position = ?",
                    ((died, seal_item(at, item, crc, text, died), at) for at, item, crc, text, *_ in rows),
                )
                dead = np.array([(row[0], died) for row in rows], dtype=np.int64)
                self._count("dead", len(dead), mixed(dead))

    def forget(self, first: int) -> None:
        """Within a change, drop older versions and, from a position on, the items that only they have."""
        with self._database.writing() as connection:
            connection.run("DELETE FROM item WHERE died IS NOT NULL AND position >= ?", first, seconds=math.inf)
            self._set(oldest=self.version)
            self._count_again(connection)

    def replace(self, old: Sequence[SegmentRow], name: str | None, crcs: Sequence[int]) -> None:
        """Within a change, after :meth:`forget`, move the items of neighbouring segments to one; None: they have no items.

        The order of items does not change.
        """
        first, stop = old[0].first, old[-1].first + old[-1].rows
        with self._database.writing() as connection:
            connection.run("DELETE FROM segment WHERE first >= ? AND first < ?", first, stop)
            self._count_again(connection)
            if name is None:
                return
            self._put_segment(connection, first, name, len(crcs))
            rows = connection.run(
                f"SELECT {ITEM} FROM item WHERE position >= ? AND position < ? ORDER BY position", first, stop
            )
            for row in rows:
                self._item(row, connection.sealed)
            listed = ((from_text(row[1]), crc, row[3].decode()) for crc, row in zip(crcs, rows, strict=True))
            self._write_list(name, listed)
            # Ascending, and never to a higher position, so that each position is free when it is needed.
            connection.run_each(
                "UPDATE item SET position = ?, crc = ?, seal = ? WHERE position = ?",
                (
                    (first + at, crc, seal_item(first + at, row[1], crc, row[3], None), row[0])
                    for at, (crc, row) in enumerate(zip(crcs, rows, strict=True))
                ),
            )

    def keep(self, key: str, value: Any) -> None:
        """Store a note beside the spec; not a change of the items.

        Raises:
            StoreError: Writing fails.
        """
        with self._changed():
            self._set(**{key: value})

    def speed_up(self, field: str) -> None:
        """Speed up filters that compare a field, from now on and for every later opening.

        Raises:
            InputError: ``field`` is not the name of a field, see :mod:`finelip_fast.index.filters`, or too many are sped up.
            StoreError: Writing fails.
        """
        expression = field_expression(field)
        with self._changed() as connection:
            schema.add_field(connection, expression)

    def copy(self, path: Path, before: Callable[[], object] = lambda: None) -> None:
        """Call ``before``, then write the catalogue as it is to a new file, with no writer in between.

        In a folder that cannot be written to, writers are not kept out: what ``before`` reads may change meanwhile.

        Raises:
            StoreError: Writing fails.
        """
        assert self.path is not None
        try:
            with self._database.reading() if self.read_only else self._database.writing() as connection:
                before()
                # A connection inside a write transaction cannot be copied from, so another one is used then.
                source = nullcontext(connection) if self.read_only else closing(sqlite3.connect(self.path))
                with source as reader, closing(sqlite3.connect(path)) as target:
                    reader.backup(target)
        except sqlite3.Error as error:
            raise StoreError(f"the catalogue cannot be copied to {path}: {error}") from None

    def close(self) -> None:
        self._database.close()

    def _set(self, **values: Any) -> None:
        with self._database.writing() as connection:
            rows = [(key, json.dumps(value)) for key, value in values.items()]
            connection.run_each(
                "INSERT OR REPLACE INTO spec VALUES (?, ?, ?)",
                ((key, value, seal(key.encode(), value.encode())) for key, value in rows),
            )
