"""Candidates from faiss, for more items than their global embeddings can be gone through: some millions.

An inverted file of 8-bit global embeddings, mapped from ``cache/globals.faiss``. It can be made again at any time, so it is
never the only place of anything, and it says which segments it was made of: as long as the index begins with those it is used,
and what was added since is gone through. Compaction may change them; then the file is out of date and not used.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast._errors import EngineError, InputError, StoreError
from finelip_fast._files import sync_folder
from finelip_fast.index.view import View
from finelip_fast.kernels import cosine_candidates

FILE, _STAMP = "globals.faiss", "globals.json"
# Of a list's length; and items that a list's centre is trained from.
_LISTS_PER_ROOT, _TRAINED_PER_LIST = 4, 64
_AT_ONCE = 65_536


class FaissSource:
    """A :class:`finelip_fast.index.search.CandidateSource` over a view.

    Args:
        view: Whose rows.
        file: What :func:`build` wrote, of the first ``covered`` rows.
        probes: How many lists are looked into for a query; None: an eighth of all, at least 16.
    """

    def __init__(self, view: View, file: Any, covered: int, *, probes: int | None = None) -> None:
        self._view, self._file, self._covered = view, file, covered
        self.probes = probes or max(16, file.nlist // 8)

    def __call__(self, queries: Tensor, count: int, among: Tensor | None) -> Tensor:
        faiss = _faiss()
        old = among if among is None else among[among < self._covered]
        if old is not None and len(old) < 4 * count:  # so few are all candidates, if they fit
            return self._flat(queries, count, among)
        options: dict[str, Any] = {"nprobe": min(self.probes, self._file.nlist)}
        if old is not None:
            options["sel"] = faiss.IDSelectorBatch(old.numpy())
        _, rows = self._file.search(
            queries.float().cpu().numpy(), min(count, self._covered), params=faiss.SearchParametersIVF(**options)
        )
        found = torch.from_numpy(rows)
        if (found < 0).any():  # the lists that were looked into hold too few
            return self._flat(queries, count, among)
        if self._covered == self._view.rows:
            return found
        new = torch.arange(self._covered, self._view.rows) if among is None else among[among >= self._covered]
        return torch.cat([found, self._flat(queries, count, new)], dim=1) if len(new) else found

    def _flat(self, queries: Tensor, count: int, among: Tensor | None) -> Tensor:
        values, scales = self._view.globals
        return cosine_candidates(queries, values, scales, count, among=among).cpu()


def build(view: View, folder: Path, *, lists: int | None = None, progress: bool = True) -> None:
    """Write the file of a view.

    Args:
        view: All rows of it are put in, also those that are no items any more.
        folder: Where to.
        lists: How many; None: four times the root of the number of rows.
        progress: Show a progress bar.

    Raises:
        EngineError: faiss is not installed.
        InputError: Too few items for that many lists.
        StoreError: The disk refuses.
    """
    faiss = _faiss()
    lists = lists or max(1, _LISTS_PER_ROOT * math.isqrt(view.rows))
    if view.rows < lists:
        raise InputError(f"expected at least as many items as lists, got {view.rows} for {lists}: search these flat")
    width = view.globals[0][0].shape[1]
    file = faiss.index_factory(width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    sample = torch.randperm(view.rows, generator=torch.Generator().manual_seed(0))[: _TRAINED_PER_LIST * lists]
    file.train(_rows(view, sample.sort().values))
    for first in tqdm(range(0, view.rows, _AT_ONCE), desc="faiss", disable=not progress):
        rows = torch.arange(first, min(first + _AT_ONCE, view.rows))
        file.add_with_ids(_rows(view, rows), rows.numpy())
    stamp = {"segments": [list(row) for row in view.layout.segments]}
    try:
        folder.mkdir(exist_ok=True)
        (folder / _STAMP).unlink(missing_ok=True)  # while it does not fit, there is no file
        faiss.write_index(file, str(folder / f"{FILE}.part"))
        (folder / f"{FILE}.part").replace(folder / FILE)
        sync_folder(folder)
        (folder / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise StoreError(f"cannot write {folder / FILE}: {error}") from None


def find(view: View, folder: Path | None) -> FaissSource | None:
    """The source of a view, if there is a file that was made of it or of its beginning."""
    if folder is None or not (folder / _STAMP).exists():
        return None
    try:
        segments = json.loads((folder / _STAMP).read_text(encoding="utf-8"))["segments"]
        faiss = _faiss()
        if segments != [list(row) for row in view.layout.segments[: len(segments)]]:
            return None
        file = faiss.read_index(str(folder / FILE), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except (OSError, ValueError, KeyError, RuntimeError, EngineError):
        return None  # it can be made again, and all global embeddings give the same candidates or better
    return FaissSource(view, file, sum(rows for *_, rows in segments))


def _rows(view: View, rows: Tensor) -> Any:
    """Global embeddings, float32."""
    from finelip_fast.kernels._rows import Pieces

    values, scales = (Pieces(pieces) for pieces in view.globals)
    return (values.take(rows) * scales.take(rows)[:, None]).cpu().numpy()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise EngineError("faiss is not installed: pip install 'finelip-fast[faiss]'") from error
    return faiss
