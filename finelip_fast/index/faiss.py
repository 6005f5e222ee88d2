"""Candidates from faiss, for indexes of millions of items, whose global embeddings are too many to scan.

They come from an inverted file of 8-bit global embeddings, mapped from ``cache/globals.lists``. It can be rebuilt at any time,
so nothing is stored in it alone. It names the segments that it was built from: it is used as long as the index begins with
those, and items added since are scanned. Compaction may change them; then the file is out of date and not used.

It is a file of arrays, verified by its checksums before it is used. faiss reads no file of its own format: its readers trust
what they read, and an index may come from a stranger. For each list, ``lists`` holds the codes of its items and then their
rows as int64, as faiss maps them.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast._arguments import whole_number
from finelip_fast._json import parse_json
from finelip_fast.errors import EngineError, InputError, StoreError, WriteError
from finelip_fast.index.arrays import (
    array_checksums,
    file_checksums,
    map_arrays,
    read_contents,
    refuse_link,
    write_arrays,
)
from finelip_fast.index.view import View
from finelip_fast.kernels import cosine_candidates

FILE = "globals.lists"
_SEGMENTS = "segments"  # key of the note of the segments that it was built from
# Lists per square root of the number of rows; and items per list that its centre is trained from.
_LISTS_PER_ROOT, _TRAINED_PER_LIST = 4, 64
_AT_ONCE = 65_536
_ROW_BYTES = 8  # of an item's row in its list


class FaissSource:
    """A :class:`finelip_fast.index.search.CandidateSource` over a view.

    Attributes:
        probes: Number of lists probed per query: an eighth of all, at least 16.

    Args:
        view: View that the rows belong to.
        file: File that :func:`build` wrote of the first ``covered`` rows, as a faiss index.
        path, size: Path that it is mapped from, and its length.
    """

    def __init__(self, view: View, file: Any, covered: int, path: Path, size: int) -> None:
        self._view, self._file, self._covered, self._path, self._size = view, file, covered, path, size
        self.probes = max(16, file.nlist // 8)

    def __call__(self, queries: Tensor, count: int, among: Tensor | None, *, alpha: float) -> Tensor:
        queries = queries[:, 0]
        with suppress(OSError):  # a deleted file can still be read
            if self._path.stat().st_size < self._size:
                return self._flat(queries, count, among)
        faiss = _faiss()
        old = among if among is None else among[among < self._covered]
        if old is not None and len(old) < 4 * count:  # so few are compared directly
            return self._flat(queries, count, among)
        options: dict[str, Any] = {"nprobe": min(self.probes, self._file.nlist)}
        if old is not None:
            options["sel"] = faiss.IDSelectorBatch(old.numpy())
        _, rows = self._file.search(
            queries.float().cpu().numpy(), min(count, self._covered), params=faiss.SearchParametersIVF(**options)
        )
        candidates = torch.from_numpy(rows)
        if (candidates < 0).any():  # the probed lists hold too few
            return self._flat(queries, count, among)
        if self._covered == self._view.rows:
            return candidates
        new = torch.arange(self._covered, self._view.rows) if among is None else among[among >= self._covered]
        return torch.cat([candidates, self._flat(queries, count, new)], dim=1) if len(new) else candidates

    def _flat(self, queries: Tensor, count: int, among: Tensor | None) -> Tensor:
        values, scales = self._view.globals
        return cosine_candidates(queries, values, scales, count, among=among).cpu()


def build(view: View, folder: Path, *, lists: int | None = None, progress: bool = True) -> None:
    """Write the file of a view.

    Args:
        view: View whose rows are all included, even those that are no longer items.
        folder: Target folder.
        lists: Number of lists; None: four times the square root of the number of rows, at most that number.
        progress: Whether to show a progress bar.

    Raises:
        EngineError: faiss is not installed.
        InputError: There are too few items for that many lists, or none.
        StoreError: A segment cannot be read, or writing fails.
    """
    faiss = _faiss()
    if not view.rows:
        raise InputError("expected an index with items to build lists of, got an empty one; add items first")
    default = min(view.rows, _LISTS_PER_ROOT * math.isqrt(view.rows))
    lists = default if lists is None else whole_number("lists", lists)
    if view.rows < lists:
        raise InputError(
            f"expected at least as many items as lists, got {view.rows} for {lists}; use fewer lists, or search without them"
        )
    view.refuse_shortened()
    width = view.globals[0][0].shape[1]
    file = faiss.index_factory(width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    sample = torch.randperm(view.rows, generator=torch.Generator().manual_seed(0))[: _TRAINED_PER_LIST * lists]
    file.train(_rows(view, sample.sort().values))
    for first in tqdm(range(0, view.rows, _AT_ONCE), desc="faiss", disable=not progress):
        rows = torch.arange(first, min(first + _AT_ONCE, view.rows))
        file.add_with_ids(_rows(view, rows), rows.numpy())
    arrays = _arrays(file)
    notes = {_SEGMENTS: json.dumps([list(row) for row in view.layout.segments]), **array_checksums(arrays)}
    try:
        write_arrays(folder / FILE, arrays, notes)
    except WriteError as error:
        raise StoreError(str(error)) from error


def state(folder: Path | None) -> tuple[int, ...] | None:
    """A value that changes when the file is built again, here or by another process; None: there is no file."""
    if folder is None:
        return None
    try:
        status = (folder / FILE).stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def find(view: View, folder: Path | None) -> FaissSource | None:
    """The source for a view, if there is a sound file that was built from it or from its beginning."""
    if folder is None or not (folder / FILE).exists():
        return None
    try:
        faiss = _faiss()
        refuse_link(folder)
        path = folder / FILE
        contents = read_contents(path)
        segments = parse_json(contents.notes.get(_SEGMENTS, ""), path, error=StoreError, kind=list)
        if segments != [list(row) for row in view.layout.segments[: len(segments)]]:
            return None
        covered = sum(row.rows for row in view.layout.segments[: len(segments)])
        if file_checksums(path, contents) != {name: contents.notes.get(name) for name in contents.places}:
            return None
        arrays = map_arrays(path, contents)
        file = _opened(faiss, path, arrays, contents.places["lists"].start, covered, view.globals[0][0].shape[1])
    except (OSError, KeyError, RuntimeError, StoreError, EngineError):
        return None  # it can be rebuilt, and all global embeddings give the same candidates or better
    return None if file is None else FaissSource(view, file, covered, path, contents.size)


def _arrays(file: Any) -> dict[str, Tensor]:
    """The arrays of an inverted file; its lists are emptied in the process."""
    faiss, lists = _faiss(), file.invlists
    sizes = [lists.list_size(number) for number in range(file.nlist)]
    parts = []
    for number, size in enumerate(sizes):
        if size:
            parts.append(faiss.rev_swig_ptr(lists.get_codes(number), size * file.code_size).copy())
            parts.append(faiss.rev_swig_ptr(lists.get_ids(number), size).copy().view(np.uint8))
            lists.resize(number, 0)
    centres = faiss.rev_swig_ptr(faiss.downcast_index(file.quantizer).get_xb(), file.nlist * file.d)
    return {
        "centres": torch.from_numpy(centres.reshape(file.nlist, file.d).copy()),
        "ranges": torch.from_numpy(faiss.vector_to_array(file.sq.trained)),
        "sizes": torch.tensor(sizes),
        "lists": torch.from_numpy(np.concatenate(parts)),
    }


def _opened(faiss: Any, path: Path, arrays: dict[str, Tensor], start: int, covered: int, width: int) -> Any:
    """Inverted file made from arrays, its lists mapped from ``start``; None: they are not those of ``covered`` rows."""
    centres, ranges, lists, sizes = arrays["centres"], arrays["ranges"], arrays["lists"], arrays["sizes"].tolist()
    bytes_per_row = width + _ROW_BYTES
    kinds = [(values.dtype, list(values.shape)) for values in (centres, ranges, lists)]
    expected = [
        (torch.float32, [len(sizes), width]),
        (torch.float32, [2 * width]),
        (torch.uint8, [covered * bytes_per_row]),
    ]
    if kinds != expected or min(sizes, default=-1) < 0 or sum(sizes) != covered:
        return None
    mapped = faiss.OnDiskInvertedLists()
    mapped.nlist, mapped.code_size, mapped.read_only = len(sizes), width, True
    mapped.filename, mapped.totsize = str(path), start + len(lists)
    mapped.lists.clear()
    covered_rows = np.zeros(covered, bool)
    at = 0
    for size in sizes:
        inverted_list = faiss.OnDiskOneList()
        inverted_list.size, inverted_list.capacity, inverted_list.offset = size, size, start + at
        mapped.lists.push_back(inverted_list)
        rows = lists[at + size * width : at + size * bytes_per_row].numpy().view(np.int64)
        if size and not 0 <= rows.min() <= rows.max() < covered:
            return None
        covered_rows[rows] = True
        at += size * bytes_per_row
    if not covered_rows.all():
        return None
    mapped.do_mmap()
    quantizer = faiss.IndexFlatIP(width)
    quantizer.add(centres.numpy())
    file = faiss.IndexIVFScalarQuantizer(
        quantizer, width, len(sizes), faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    faiss.copy_array_to_vector(ranges.numpy(), file.sq.trained)
    file.is_trained, file.ntotal = True, covered
    mapped.this.disown()
    file.replace_invlists(mapped, True)
    return file


def _rows(view: View, rows: Tensor) -> Any:
    """Global embeddings of rows, in float32."""
    from finelip_fast.kernels.clim.rows import Pieces

    values, scales = (Pieces(pieces) for pieces in view.globals)
    return (values.take(rows) * scales.take(rows)[:, None]).cpu().numpy()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise EngineError("faiss is not installed: pip install 'finelip-fast[faiss]'") from error
    return faiss
