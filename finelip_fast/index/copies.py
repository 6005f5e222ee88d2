"""Data derived from a segment's embeddings and kept in files of the folder ``cache``: int8 copies and sketches.

These files are never required: if they cannot be written, or the embeddings are not what was written, the data is computed
in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from finelip_fast.errors import StoreError, WriteError
from finelip_fast.index.arrays import (
    DIGEST,
    Contents,
    array_checksums,
    checksums,
    digest,
    file_checksums,
    is_shorter,
    map_arrays,
    read_contents,
    refuse_link,
    write_arrays,
)


class Kind(NamedTuple):
    """Expected contents of a file of copies.

    Attributes:
        name: Name of the file.
        arrays: Dtype and shape of each array, by name.
        notes: Notes required in addition to the checksums.
    """

    name: str
    arrays: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    notes: dict[str, str]


class Copies:
    """Copies of one kind for one segment.

    Args:
        kind: Kind of the copies.
        embeddings: Arrays of the segment that the copies are made from.
        digest_written: Digest of the embeddings when they were written; None: in memory, or written before digests were kept.
    """

    def __init__(self, kind: Kind, embeddings: Mapping[str, Tensor], digest_written: str | None) -> None:
        self.kind, self._embeddings, self._written = kind, dict(embeddings), digest_written
        self._mapped: tuple[Path, int] | None = None  # the file, and its length

    @property
    def is_lost(self) -> bool:
        """Whether they are mapped from a file that has become shorter, so that they must not be read."""
        return self._mapped is not None and is_shorter(*self._mapped)

    def contents(self, cache: Path) -> Contents | None:
        """Contents of the cached file, if its notes say that it was made from these embeddings."""
        try:
            refuse_link(cache)
            contents = read_contents(cache / self.kind.name)
        except (OSError, StoreError):
            return None
        rows_of = contents.notes.get(DIGEST)
        is_right = {name: (place.dtype, place.shape) for name, place in contents.places.items()} == self.kind.arrays
        is_right &= self.kind.notes.items() <= contents.notes.items()
        return contents if is_right and rows_of and self._written in (None, rows_of) else None

    def read(self, cache: Path) -> dict[str, Tensor] | None:
        """Map the cached file after verifying its checksums; None: it is missing or damaged."""
        contents = self.contents(cache)
        if contents is None:
            return None
        path = cache / self.kind.name
        try:
            if file_checksums(path, contents) != {name: contents.notes.get(name) for name in contents.places}:
                return None
            arrays = map_arrays(path, contents)
        except (OSError, StoreError):
            return None
        self._mapped = path, contents.size
        return arrays

    def keep(self, cache: Path, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Store new copies and return them as mapped from the file, or unchanged if they cannot be stored."""
        rows = digest(checksums(self._embeddings))
        if self._written in (None, rows):
            notes = {**self.kind.notes, DIGEST: rows, **array_checksums(arrays)}
            with suppress(StoreError, WriteError):
                write_arrays(cache / self.kind.name, arrays, notes)
                arrays = self.read(cache) or arrays
        return arrays


def drop_foreign(cache: Path, segment: str, embeddings: dict[str, Tensor]) -> None:
    """Remove the copies of a segment that were made from other embeddings.

    Raises:
        OSError: They cannot be removed.
    """
    rows = None
    for name in (cache_name(segment), sketch_name(segment)):
        try:
            refuse_link(cache)
            made_of = read_contents(cache / name).notes.get(DIGEST)
        except (OSError, StoreError):
            continue
        rows = rows or digest(checksums(embeddings))
        if made_of != rows:
            (cache / name).unlink(missing_ok=True)


def cache_name(segment: str) -> str:
    """Name of the file in ``cache`` that holds a segment in int8."""
    return segment if segment.endswith(".safetensors") else f"{segment}.safetensors"


def sketch_name(segment: str) -> str:
    """Name of the file in ``cache`` that holds a segment's sketch."""
    return f"{cache_name(segment).removesuffix('.safetensors')}.sketch.safetensors"


def int8_kind(segment: str, rows: int, tokens: int, width: int) -> Kind:
    """Copies in int8: the fields of :class:`finelip_fast.kernels.QuantizedItems`."""
    arrays: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "values": (torch.int8, (rows, tokens, width)),
        "scales": (torch.float32, (rows, tokens)),
        "terms": (torch.float32, (rows, 6)),
        "anchors": (torch.float16, (rows, 1, width)),
    }
    return Kind(cache_name(segment), arrays, {})
