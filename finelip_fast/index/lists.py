"""Lists: beside every segment ``NAME.safetensors``, the file ``NAME.items`` repeats what the catalogue holds of its items.

A list is on disk before the catalogue names its segment, so acknowledged items survive the loss of their records, see
:mod:`finelip_fast.index.recovery`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from finelip_fast._files import read_bytes
from finelip_fast._json import parse_json
from finelip_fast.errors import StoreError, WriteError
from finelip_fast.index.arrays import write_locked

_LARGEST = 1 << 32  # bytes of a list


class Listed(NamedTuple):
    """A list: the spec of the index, the version that added the segment, ids, checksums, and metadata as JSON."""

    spec: dict[str, Any]
    version: int
    ids: list[str]
    crcs: list[int | None]
    texts: list[str]


def list_path(folder: Path, segment: str) -> Path:
    return folder / f"{segment.partition('.')[0]}.items"


def write_list(folder: Path, segment: str, spec: dict[str, Any], rows: Iterable[tuple[str, int | None, str]]) -> None:
    """
    Args:
        folder, segment: Folder and name of the segment's file.
        spec: Spec from the catalogue.
        rows: Id, checksum, and metadata as JSON of each item.

    Raises:
        StoreError: Writing fails.
    """
    lines = [f"[{json.dumps(item)}, {json.dumps(crc)}, {text}]\n" for item, crc, text in rows]
    content = "".join(lines).encode("utf-8", "surrogatepass")
    head = json.dumps({"spec": spec, "rows": len(lines), "crc": zlib.crc32(content)}).encode()
    path = list_path(folder, segment)
    try:
        write_locked(path, [head + b"\n", content])
    except WriteError as error:
        raise StoreError(str(error)) from None


def read_list(folder: Path, segment: str) -> Listed:
    """
    Raises:
        StoreError: The list is missing or is not what was written.
    """
    path = list_path(folder, segment)
    head, _, content = read_bytes(path, error=StoreError, max_bytes=_LARGEST).partition(b"\n")
    header = parse_json(head, path, error=StoreError, expected="the list of a segment", kind=dict)
    spec, lines = header.get("spec"), content.splitlines()
    version = spec.get("version") if isinstance(spec, dict) else None
    if type(version) is not int or [header.get("rows"), header.get("crc")] != [len(lines), zlib.crc32(content)]:
        raise StoreError(f"{path}: expected the list of a segment as it was written, found other content")
    try:
        rows = [json.loads(line) for line in lines]
        ids, crcs = [str(item) for item, _, _ in rows], [None if crc is None else int(crc) for _, crc, _ in rows]
        texts = [json.dumps(values) for *_, values in rows if isinstance(values, dict)]
    except (ValueError, TypeError, RecursionError):
        ids, crcs, texts = [], [], []
    if len(texts) != len(lines):
        raise StoreError(f"{path}: expected [id, checksum, metadata] in each line of the list of a segment")
    return Listed(spec, version, ids, crcs, texts)


def remove_segment(folder: Path, segment: str) -> None:
    for path in (folder / segment, list_path(folder, segment)):
        with suppress(OSError):
            path.unlink(missing_ok=True)
