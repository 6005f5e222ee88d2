"""The spec of an index: what all its embeddings have in common, and how a folder's catalogue stores it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from finelip_fast._arguments import folder_path, one_of, share, whole_number
from finelip_fast.errors import InputError, StoreError
from finelip_fast.index.catalogue import read_spec
from finelip_fast.index.segments import DTYPES

# Contents of an index folder.
CATALOGUE, SEGMENTS, CACHE, INCOMING = "catalogue.sqlite", "segments", "cache", "incoming"

StoredDtype = Literal["float16", "int8"]

_LARGEST_SIZE = 1 << 20  # of L and D


@dataclass(frozen=True)
class IndexSpec:
    """Properties that all embeddings of an index have in common.

    Attributes:
        checkpoint: Fingerprint of the checkpoint that produced the embeddings.
        tokens: ``L``; 1 for a checkpoint without trained aggregators.
        width: ``D``.
        alpha: Weight of the global cosine that the checkpoint specifies; 1 without trained aggregators.
        dtype: Format of stored embeddings: ``"float16"``, or ``"int8"`` with one scale per row, at half the size.
    """

    checkpoint: str
    tokens: int
    width: int
    alpha: float = 0.8
    dtype: StoredDtype = "float16"

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, str):
            raise InputError(f"expected checkpoint as a fingerprint, got {self.checkpoint!r:.80}")
        for name in ("tokens", "width"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), most=_LARGEST_SIZE))
        object.__setattr__(self, "alpha", share("alpha", self.alpha))
        one_of("dtype", self.dtype, DTYPES)

    @property
    def is_global(self) -> bool:
        """Whether only the global rows are meaningful, as with a checkpoint without trained aggregators."""
        return self.tokens == 1 or self.alpha == 1

    def as_stored(self, folder: str | PathLike[str]) -> IndexSpec:
        """This spec with the ``L`` of an index folder of the same checkpoint, if only the global rows count.

        Folders of checkpoints without trained aggregators used to hold rows of untrained ones, and keep that number.

        Raises:
            StoreError: The folder's catalogue cannot be read, or its spec is invalid.
        """
        stored = stored_spec(folder) if self.is_global else None
        is_same = stored is not None and stored[0].is_global and stored[0].checkpoint == self.checkpoint
        return replace(self, tokens=stored[0].tokens) if stored is not None and is_same else self

    def filled(self, embeddings: Tensor) -> Tensor:
        """Expand ``[n, 1, D]`` to ``[n, L, D]``, if only the global rows count and the index has more rows.

        The row is repeated: late interaction of equal rows is that of one of them. Other embeddings are returned unchanged.
        """
        if self.is_global and embeddings.ndim == 3 and embeddings.shape[1] == 1:
            return embeddings.expand(-1, self.tokens, -1)
        return embeddings


def stored_spec(folder: str | PathLike[str]) -> tuple[IndexSpec, str] | None:
    """The spec of an index folder, and the checkpoint that it was written with; None if there is no index.

    Raises:
        InputError: ``folder`` is not a path.
        StoreError: The folder's catalogue cannot be read, or its spec is invalid.
    """
    stored = read_spec(folder_path("folder", folder) / CATALOGUE)
    return None if stored is None else _checked_spec(stored, folder)


def _checked_spec(stored: dict[str, Any], folder: str | PathLike[str]) -> tuple[IndexSpec, str]:
    values = {field.name: stored[field.name] for field in fields(IndexSpec) if field.name in stored}
    sizes, alpha, source = (values.get("tokens"), values.get("width")), values.get("alpha", 0.8), stored.get("source")
    if not (
        isinstance(values.get("checkpoint"), str)
        and isinstance(source, str)
        and all(type(size) is int and 0 < size <= _LARGEST_SIZE for size in sizes)
        and type(alpha) in (int, float)
        and 0 <= alpha <= 1
        and values.get("dtype", DTYPES[0]) in DTYPES
    ):
        raise StoreError(
            f"{Path(folder) / CATALOGUE}: expected the spec of an index, got {values!r:.200} of {source!r:.80}; restore it "
            "from a snapshot"
        )
    return IndexSpec(**values), source


def stored_source(folder: str | PathLike[str]) -> str | None:
    """Name or path that an index folder's checkpoint was opened with: empty for the bundled one, None without an index.

    Raises:
        InputError: ``folder`` is not a path.
        StoreError: The folder's catalogue cannot be read.
    """
    stored = stored_spec(folder)
    return None if stored is None else stored[1]


def stored_dtype(folder: str | PathLike[str]) -> StoredDtype | None:
    """Format in which an index folder stores embeddings; None: there is no index, or it is from when all were float16.

    Raises:
        InputError: ``folder`` is not a path.
        StoreError: The folder's catalogue cannot be read.
    """
    stored = read_spec(folder_path("folder", folder) / CATALOGUE)
    return None if stored is None or "dtype" not in stored else _checked_spec(stored, folder)[0].dtype
