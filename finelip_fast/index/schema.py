"""Schema of a catalogue's database: its format, migrations from older formats, and the checksums of its rows."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import struct
import zlib
from typing import Any

from finelip_fast.errors import InputError
from finelip_fast.index.database import Connection

FORMAT = 4

_TABLES = (
    """CREATE TABLE spec (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL,
    seal INTEGER NOT NULL  -- the checksum of all of the row, here and below
) STRICT""",
    """CREATE TABLE segment (
    first INTEGER PRIMARY KEY,  -- position of its first item
    name TEXT NOT NULL UNIQUE,
    rows INTEGER NOT NULL,
    born INTEGER NOT NULL,  -- the version that it came with
    seal INTEGER NOT NULL
) STRICT""",
    """CREATE TABLE item (
    position INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    crc INTEGER,  -- CRC-32 of the row's bytes; NULL: written before there were any
    metadata TEXT NOT NULL,
    died INTEGER,  -- the version that it went with; NULL: it is there
    seal INTEGER NOT NULL
) STRICT""",
)
_INDEXES = (
    "CREATE UNIQUE INDEX living ON item (id) WHERE died IS NULL",
    "CREATE INDEX dead ON item (died) WHERE died IS NOT NULL",
)
_SPEC_1 = "CREATE TABLE spec (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT"
_ITEM_1 = """CREATE TABLE item (position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, segment TEXT NOT NULL,
    metadata TEXT NOT NULL) STRICT"""
_ITEM_2 = """CREATE TABLE item (position INTEGER PRIMARY KEY, id TEXT NOT NULL, segment TEXT NOT NULL, row INTEGER NOT NULL,
    crc INTEGER, metadata TEXT NOT NULL, born INTEGER NOT NULL, died INTEGER) STRICT"""
_TABLES_3 = (
    """CREATE TABLE segment (first INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, rows INTEGER NOT NULL,
    born INTEGER NOT NULL) STRICT""",
    """CREATE TABLE item (position INTEGER PRIMARY KEY, id TEXT NOT NULL, crc INTEGER, metadata TEXT NOT NULL,
    died INTEGER) STRICT""",
)
# Objects in a database of each format; some of the second format lack the index.
_CONTENTS = {
    1: (_SPEC_1, _ITEM_1),
    2: (_SPEC_1, _ITEM_2, _INDEXES[0]),
    3: (_SPEC_1, *_TABLES_3, *_INDEXES),
    4: (*_TABLES, *_INDEXES),
}
# Statements that migrate a catalogue of an older format to the next format.
_MIGRATIONS = {
    1: (
        "ALTER TABLE item RENAME TO item_1",
        _ITEM_2,
        "INSERT INTO item SELECT position, id, segment, position - MIN(position) OVER (PARTITION BY segment), NULL, metadata, "
        "0, NULL FROM item_1",
        "DROP TABLE item_1",
        "INSERT INTO spec VALUES ('version', '0'), ('oldest', '0')",
    ),
    2: (
        "DROP INDEX IF EXISTS living",
        "ALTER TABLE item RENAME TO item_2",
        *_TABLES_3,
        *_INDEXES,
        "INSERT INTO segment SELECT MIN(position - row), segment, MAX(row) + 1, MIN(born) FROM item_2 GROUP BY segment",
        "INSERT INTO item SELECT MIN(position - row) OVER (PARTITION BY segment) + row, id, crc, metadata, died FROM item_2",
        "DROP TABLE item_2",
    ),
    3: (
        *(f"ALTER TABLE {name} RENAME TO {name}_3" for name in ("spec", "segment", "item")),
        *_TABLES,
        "INSERT INTO spec SELECT key, value, seal(CAST(key AS BLOB), CAST(value AS BLOB)) FROM spec_3",
        "INSERT INTO segment SELECT first, name, rows, born, seal(first, CAST(name AS BLOB), rows, born) FROM segment_3",
        "INSERT INTO item SELECT position, id, crc, metadata, died, seal_item(position, CAST(id AS BLOB), crc, "
        "CAST(metadata AS BLOB), died) FROM item_3",
        *(f"DROP TABLE {name}_3" for name in ("spec", "segment", "item")),
        *_INDEXES,
    ),
}
# A database of the third format is read as one of the current format without seals; of older ones, only the spec is read.
_AS_NOW = (
    "CREATE TEMP VIEW spec AS SELECT key, value, NULL AS seal FROM main.spec",
    "CREATE TEMP VIEW segment AS SELECT first, name, rows, born, NULL AS seal FROM main.segment",
    "CREATE TEMP VIEW item AS SELECT position, id, crc, metadata, died, NULL AS seal FROM main.item",
)
_MOST_FIELDS = 1000
_FIELD = re.compile(rb"json_extract\(metadata, '\$(?:[^']|'')*'\)", re.DOTALL)
_INTEGER, _NUMBERS = struct.Struct("<q"), struct.Struct("<5q")


def seal(*values: Any) -> int:
    """The checksum of any row but an item's: CRC-32 of its values, which are integers, bytes and None."""
    crc = 0
    for value in values:
        if value is None:
            crc = zlib.crc32(b"\0", crc)
        elif isinstance(value, bytes):
            crc = zlib.crc32(value, zlib.crc32(_INTEGER.pack(len(value)), crc))
        else:
            crc = zlib.crc32(_INTEGER.pack(value), crc)
    return crc


def seal_item(position: int, name: bytes, crc: int | None, metadata: bytes, died: int | None) -> int:
    """The checksum of an item's row; a function of its own, since there are many such rows."""
    numbers = _NUMBERS.pack(
        position, -1 if crc is None else crc, -1 if died is None else died, len(name), len(metadata)
    )
    return zlib.crc32(metadata, zlib.crc32(name, zlib.crc32(numbers)))


def create(connection: Connection) -> None:
    for statement in (*_TABLES, *_INDEXES):
        connection.run(statement)


def prepare(connection: Connection) -> int | None:
    """Check that a database has the schema of a catalogue, before anything in it is used.

    Returns:
        Its format; None: it is empty.

    Raises:
        sqlite3.DatabaseError: It has any other schema.
    """
    objects = connection.run("SELECT type, name, sql FROM main.sqlite_master LIMIT ?", _MOST_FIELDS + 16)
    if not objects:
        return None
    held, fields = set(), 0
    for kind, name, sql in objects:
        if sql is None and kind == b"index" and name.startswith(b"sqlite_autoindex_"):
            continue  # created by a UNIQUE or PRIMARY KEY in its table's definition
        if _is_field(name, sql):
            fields += 1
        else:
            held.add(_plain(sql))
    for number, expected in _EXPECTED.items():
        if fields <= _MOST_FIELDS and (held == expected or (number == 2 and held == expected - _OPTIONAL)):
            connection.sealed = number >= 4
            if number < FORMAT:
                for view in _AS_NOW if number == 3 else _AS_NOW[:1]:
                    connection.run(view)
            return number
    raise sqlite3.DatabaseError("its tables are not those of an index, or a newer version of this library made them")


def add_field(connection: Connection, expression: str) -> None:
    """Within a change, create an index on a metadata field, if there is none yet.

    Args:
        connection: Connection to a catalogue of the current format.
        expression: Expression of the field, from :func:`finelip_fast.index.filters.field_expression`.

    Raises:
        InputError: As many fields as :func:`prepare` accepts have an index.
    """
    name = f"field {expression}"
    names = connection.run("SELECT name FROM main.sqlite_master WHERE type = 'index' AND name LIKE 'field %'")
    if (name.encode(),) in names:
        return
    if len(names) >= _MOST_FIELDS:
        raise InputError(
            f"expected at most {_MOST_FIELDS} fields to speed up, and the index has as many; filters can compare this field "
            "without it, but take longer"
        )
    quoted = name.replace('"', '""')
    connection.run(f'CREATE INDEX "{quoted}" ON item ({expression})', seconds=math.inf)


def _is_field(name: Any, sql: Any) -> bool:
    """Whether it was created by :func:`add_field`."""
    expression = name[len(b"field ") :] if isinstance(name, bytes) and name.startswith(b"field ") else b""
    if not _FIELD.fullmatch(expression):
        return False
    return bool(sql == b'CREATE INDEX "field %b" ON item (%b)' % (expression.replace(b'"', b'""'), expression))


def _plain(sql: Any) -> str:
    """A statement without comments and white space."""
    if not isinstance(sql, (str, bytes)):
        return repr(sql)
    text = sql if isinstance(sql, str) else sql.decode("utf-8", "replace")
    return re.sub(r"--[^\n]*\n|\s", "", text)


_EXPECTED = {number: frozenset(map(_plain, contents)) for number, contents in _CONTENTS.items()}
_OPTIONAL = {_plain(_INDEXES[0])}


def migrate(connection: Connection, spec: dict[str, Any]) -> None:
    """Within a change, migrate a catalogue of an older format to the current one.

    Args:
        connection: Connection to the file, checked by :func:`prepare`.
        spec: Spec of the catalogue, with the values that the older format lacks.
    """
    fields = connection.run("SELECT sql FROM main.sqlite_master WHERE type = 'index' AND name LIKE 'field %'")
    for view in ("spec", "segment", "item"):
        connection.run(f"DROP VIEW IF EXISTS temp.{view}")
    connection.create_function("seal", -1, seal, deterministic=True)
    connection.create_function("seal_item", 5, seal_item, deterministic=True)
    for number in range(spec["format"], FORMAT):
        if number == FORMAT - 1:
            rows = [(key, json.dumps(value)) for key, value in {**spec, "format": FORMAT}.items()]
            connection.run_each("INSERT OR REPLACE INTO spec VALUES (?, ?)", rows)
        for statement in _MIGRATIONS[number]:
            connection.run(statement, seconds=math.inf)
    for (statement,) in fields:
        connection.run(statement.decode(), seconds=math.inf)
    connection.sealed = True
