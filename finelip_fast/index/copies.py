"""Embeddings of a float16 segment once more in int8, in a file of the folder ``cache``.

What is kept there is never needed: where it cannot be written, and of embeddings that are not what was written, it is made in
memory.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

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
from finelip_fast.kernels import QuantizedItems, quantize_items


class Int8Copies:
    """The copies of one segment.

    Args:
        segment: Name of its file.
        tokens: Its embeddings, float16 ``[n, L, D]``.
        written: The digest of the embeddings when they were written; None: of a time when it was not kept, or in memory.
    """

    def __init__(self, segment: str, tokens: Tensor, digest: str | None) -> None:
        self._name, self._tokens, self._written = cache_name(segment), tokens, digest
        self._mapped: tuple[Path, int] | None = None  # the file, and its length

    @property
    def is_lost(self) -> bool:
        """Whether they are mapped from a file that has become shorter: they must not be read."""
        return self._mapped is not None and is_shorter(*self._mapped)

    def contents(self, cache: Path) -> Contents | None:
        """The contents of the file that is kept, if it says that it was made of these embeddings."""
        try:
            refuse_link(cache)
            contents = read_contents(cache / self._name)
        except (OSError, StoreError):
            return None
        rows, tokens, width = self._tokens.shape
        shapes = {
            "values": (rows, tokens, width),
            "scales": (rows, tokens),
            "terms": (rows, 6),
            "anchors": (rows, 1, width),
        }
        dtypes = {"values": torch.int8, "anchors": torch.float16}
        is_right = {name: (place.dtype, place.shape) for name, place in contents.places.items()} == {
            name: (dtypes.get(name, torch.float32), shape) for name, shape in shapes.items()
        }
        rows_of = contents.notes.get(DIGEST)
        return contents if is_right and rows_of and self._written in (None, rows_of) else None

    def read(self, cache: Path) -> QuantizedItems | None:
        """What is kept, compared with its checksums; None: nothing, or nothing sound."""
        contents = self.contents(cache)
        if contents is None:
            return None
        path = cache / self._name
        try:
            if file_checksums(path, contents) != {name: contents.notes.get(name) for name in contents.places}:
                return None
            arrays = map_arrays(path, contents)
        except (OSError, StoreError):
            return None
        self._mapped = path, contents.size
        return QuantizedItems(*(arrays[name] for name in QuantizedItems._fields))

    def make(self, cache: Path) -> QuantizedItems:
        """The copies, kept from now on where that can be."""
        items = quantize_items(self._tokens)
        rows = digest(checksums({"tokens": self._tokens}))
        if self._written in (None, rows):
            notes = {DIGEST: rows, **array_checksums(items._asdict())}
            with suppress(StoreError, WriteError):
                write_arrays(cache / self._name, items._asdict(), notes)
                items = self.read(cache) or items
        return items

    def drop_foreign(self, cache: Path) -> None:
        """Remove those that were made of other embeddings.

        Raises:
            OSError: They cannot be removed.
        """
        contents = self.contents(cache)
        if contents and contents.notes[DIGEST] != digest(checksums({"tokens": self._tokens})):
            (cache / self._name).unlink(missing_ok=True)


def cache_name(segment: str) -> str:
    """The file in ``cache`` that belongs to a segment."""
    return segment if segment.endswith(".safetensors") else f"{segment}.safetensors"
