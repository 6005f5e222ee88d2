"""What is made of a segment's embeddings and kept in a file of the folder ``cache``: copies in int8, sketches.

What is kept there is never needed: where it cannot be written, and of embeddings that are not what was written, it is made in
memory.
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
    """What a file of copies must be.

    Attributes:
        name: Name of the file.
        arrays: Dtype and shape of each array, by name.
        notes: Notes that it must have beside its checksums.
    """

    name: str
    arrays: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    notes: dict[str, str]


class Copies:
    """Copies of one kind of one segment.

    Args:
        kind: What they are.
        embeddings: What they are made of, arrays of the segment.
        digest_written: The digest of the embeddings when they were written; None: of a time when it was not kept, or in
            memory.
    """

    def __init__(self, kind: Kind, embeddings: Mapping[str, Tensor], digest_written: str | None) -> None:
        self.kind, self._embeddings, self._written = kind, dict(embeddings), digest_written
        self._mapped: tuple[Path, int] | None = None  # the file, and its length

    @property
    def is_lost(self) -> bool:
        """Whether they are mapped from a file that has become shorter: they must not be read."""
        return self._mapped is not None and is_shorter(*self._mapped)

    def contents(self, cache: Path) -> Contents | None:
        """The contents of the file that is kept, if it says that it was made of these embeddings."""
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
        """What is kept, compared with its checksums; None: nothing, or nothing sound."""
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
        """Copies that were made, from now on as they are kept, where that can be."""
        rows = digest(checksums(self._embeddings))
        if self._written in (None, rows):
            notes = {**self.kind.notes, DIGEST: rows, **array_checksums(arrays)}
            with suppress(StoreError, WriteError):
                write_arrays(cache / self.kind.name, arrays, notes)
                arrays = self.read(cache) or arrays
        return arrays


def drop_foreign(cache: Path, segment: str, embeddings: dict[str, Tensor]) -> None:
    """Remove the copies of a segment that were made of other embeddings.

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
    """The file in ``cache`` that holds a segment in int8."""
    return segment if segment.endswith(".safetensors") else f"{segment}.safetensors"


def sketch_name(segment: str) -> str:
    """The file in ``cache`` that holds a segment's sketch."""
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
