"""An index: ids, metadata and one float16 matrix ``[L, D]`` an item, in order of insertion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finelip_fast._errors import InputError, StoreError
from finelip_fast.index.catalogue import Catalogue, read_source
from finelip_fast.index.segments import read_segment, write_segment
from finelip_fast.kernels import clim_topk

_CATALOGUE = "catalogue.sqlite"


@dataclass(frozen=True)
class IndexSpec:
    """What every embedding of an index has in common.

    Attributes:
        checkpoint: Fingerprint of the checkpoint that made the embeddings.
        tokens: ``L``.
        width: ``D``.
    """

    checkpoint: str
    tokens: int
    width: int


class Index:
    """Items to search, in memory or kept in a folder.

    Args:
        spec: What the embeddings are.
        folder: Where to keep them; None: nowhere. Made if missing; opened if there.
        source: What the checkpoint was opened as, for messages and :func:`stored_source`.
        device: Where the embeddings are searched.

    Raises:
        StoreError: A folder that holds another index, cannot be read or written, or misses a segment.
    """

    def __init__(
        self,
        spec: IndexSpec,
        folder: str | PathLike[str] | None = None,
        *,
        source: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec, self.source, self.device = spec, source, torch.device(device)
        self.ids: list[str] = []
        self.metadata: list[dict[str, Any]] = []
        self._known: set[str] = set()
        self._blocks: list[Tensor] = []
        self._catalogue: Catalogue | None = None
        self._closed = False
        if folder is not None:
            self._open(Path(folder))

    def _open(self, folder: Path) -> None:
        self._segments = folder / "segments"
        try:
            self._segments.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make the index folder {folder}: {error.strerror}") from None
        self._catalogue = Catalogue(folder / _CATALOGUE, asdict(self.spec), source=self.source)
        for segment, group in groupby(self._catalogue.items(), key=lambda item: item.segment):
            items = list(group)
            shape = (self.spec.tokens, self.spec.width)
            block = read_segment(self._segments, segment, rows=len(items), shape=shape)
            self._append([item.id for item in items], block, [item.metadata for item in items])

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, item: object) -> bool:
        return item in self._known

    def add(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> None:
        """Append items; with a folder they are on disk when this returns.

        Args:
            ids: ``n`` new ids.
            embeddings: ``[n, L, D]``, unit rows; kept as float16.
            metadata: One dictionary of JSON values for each.

        Raises:
            InputError: An id that is there already, embeddings of another shape, or metadata that JSON cannot hold.
            StoreError: The disk refuses, or the index is closed; nothing was added.
        """
        shape = (len(ids), self.spec.tokens, self.spec.width)
        if embeddings.shape != shape or len(metadata) != len(ids):
            raise InputError(f"expected embeddings {list(shape)} with as many metadata, got {list(embeddings.shape)}")
        self.check_ids(ids)
        metadata = [_plain(item) for item in metadata]
        if self._closed:
            raise StoreError("the index is closed: open its folder again to add to it")
        if not ids:
            return
        if self._catalogue is not None:
            segment = write_segment(self._segments, embeddings)
            self._catalogue.add(ids, segment, metadata, after=len(self))
        self._append(ids, embeddings, metadata)

    def check_ids(self, ids: Sequence[str]) -> None:
        """Refuse what cannot be added.

        Raises:
            InputError: An id that is no string, is there already, or is given twice; names it.
        """
        new: set[str] = set()
        for item in ids:
            if not isinstance(item, str):
                raise InputError(f"expected ids as str, got {item!r}; convert it first")
            if item in self._known or item in new:
                raise InputError(f"expected ids that are new and differ, got {item!r} again; give other ids")
            new.add(item)

    def _append(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> None:
        self.ids.extend(ids)
        self._known.update(ids)
        self.metadata.extend(metadata)
        self._blocks.append(embeddings.to(self.device, torch.float16))

    @property
    def embeddings(self) -> Tensor:
        """All items, float16 ``[N, L, D]`` on the index's device."""
        if len(self._blocks) != 1:
            empty = torch.empty(0, self.spec.tokens, self.spec.width, dtype=torch.float16, device=self.device)
            self._blocks = [torch.cat([empty, *self._blocks])]
        return self._blocks[0]

    def search(self, queries: Tensor, k: int, *, alpha: float) -> tuple[Tensor, Tensor]:
        """Scores and positions of the ``k`` best items, ``[Q, min(k, N)]``; see :func:`finelip_fast.kernels.clim_topk`."""
        return clim_topk(queries.to(self.device, torch.float16), self.embeddings, k, alpha=alpha)

    def close(self) -> None:
        """Release the folder; the items stay searchable in memory."""
        if self._catalogue is not None:
            self._catalogue.close()
            self._catalogue, self._closed = None, True


def _plain(metadata: Any) -> dict[str, Any]:
    """A copy of its own, as it will be read back from the disk."""
    try:
        if isinstance(metadata, dict):
            return json.loads(json.dumps(metadata))
    except (TypeError, ValueError):
        pass
    raise InputError(f"expected metadata as a dictionary of JSON values, got {metadata!r}")


def stored_source(folder: str | PathLike[str]) -> str | None:
    """The checkpoint that an index folder was written with, as it was named then: empty for the bundled one, None where there
    is no index.

    Raises:
        StoreError: The folder's catalogue cannot be read.
    """
    return read_source(Path(folder) / _CATALOGUE)
