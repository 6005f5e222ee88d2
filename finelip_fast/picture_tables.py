"""Tables of pictures in JSON Lines or CSV: each row has the path of a picture and any other fields."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finelip_fast._files import read_text
from finelip_fast._json import read_json_lines
from finelip_fast.errors import InputError

# Columns that may hold the picture's path if none is specified.
IMAGE_FIELDS = ("image", "file", "path", "filename", "file_name", "image_path")

_LINES, _SEPARATORS = (".jsonl", ".jsonlines", ".ndjson"), {".csv": ",", ".tsv": "\t"}
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,15})(?:\.[0-9]+)?")  # as in JSON: 007 and +49 are strings
_ADDRESS = re.compile(r"(?i)[a-z][a-z0-9+.-]+://")
_MAX_TABLE = 1 << 32  # bytes


def is_table(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a table of pictures, judged by its name."""
    return Path(path).suffix.lower() in (*_LINES, *_SEPARATORS) and os.path.isfile(path)


def read_rows(table: str | os.PathLike[str], *, image_field: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path of each row's picture, as the table gives it, and the row's other fields.

    Args:
        table: JSON Lines of objects, or CSV (``.csv``, ``.tsv``) whose first line names the columns.
        image_field: Name of the path column; None: the first of :data:`IMAGE_FIELDS` that exists.

    Raises:
        InputError: The table cannot be read, or a row names no picture; the message gives the line.
    """
    for where, row in _rows(Path(table)):
        name = image_field or next((column for column in IMAGE_FIELDS if column in row), "image")
        fields = list(row)
        path = row.pop(name, None)
        if not isinstance(path, str) or not path or "\0" in path:
            if name in fields:
                raise InputError(f"{where}: expected the path of a picture in the column {name!r}, got {path!r:.40}")
            raise InputError(
                f"{where}: found no path of a picture in a column {name!r}, only the columns "
                f"{', '.join(fields) or '(none)':.200}; name it with image_field (--image-field)"
            )
        if _ADDRESS.match(path):
            raise InputError(
                f"{where}: expected the path of a picture, got the address {path!r:.80}; download it first"
            )
        yield path, row


def _rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    separator = _SEPARATORS.get(table.suffix.lower())
    if separator is None:
        yield from read_json_lines(table, error=InputError, expected="an object of fields", max_bytes=_MAX_TABLE)
    else:
        yield from _csv_rows(table, read_text(table, error=InputError, max_bytes=_MAX_TABLE), separator)


def _csv_rows(table: Path, text: str, separator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows, with numbers in columns that hold nothing else; empty values are left out."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        for row in reader:
            where = f"{table}, line {reader.line_num}"
            if None in row or None in row.values():
                raise InputError(
                    f"{where}: expected {len(reader.fieldnames or ())} values, as the first line has names"
                )
            rows.append((where, {name: value for name, value in row.items() if value}))
    except csv.Error as error:
        raise InputError(f"{table}, line {reader.line_num}: {error}") from None
    texts = {name for _, row in rows for name, value in row.items() if not _NUMBER.fullmatch(value)}
    for where, row in rows:
        yield where, {name: value if name in texts else json.loads(value) for name, value in row.items()}
