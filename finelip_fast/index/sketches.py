"""Sketches of an index: a first stage that compares tokens, see :mod:`finelip_fast.kernels.clim.sketch`.

``cache`` holds the basis of all sketches and, beside each segment's copies, the codes of its items. All of it is rebuilt from
the embeddings if it is missing, damaged, or made from other embeddings or another basis. The basis is computed from a sample
of the items and, while the index is small, computed again each time that the index has doubled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from finelip_fast.errors import StoreError, WriteError
from finelip_fast.index.arrays import (
    array_checksums,
    digest,
    file_checksums,
    map_arrays,
    read_contents,
    refuse_link,
    write_arrays,
)
from finelip_fast.index.copies import Kind, sketch_name
from finelip_fast.index.forks import between_forks
from finelip_fast.index.segments import Segment
from finelip_fast.index.view import View
from finelip_fast.kernels.clim.sketch import (
    SketchBasis,
    blocks,
    row_bytes,
    sketch_basis,
    sketch_candidates,
    sketch_items,
)

BASIS = "sketch-basis.safetensors"
_SAMPLED_ROWS = 1 << 16
_ITEMS_AT_ONCE = 4096


class SketchSource:
    """A :class:`finelip_fast.index.search.CandidateSource` that compares all token rows of a view.

    Args:
        view: View whose items are compared.
        basis: Basis of all sketches.
        codes: Codes of each segment, as :func:`finelip_fast.kernels.clim.sketch.sketch_items` returns them.
    """

    def __init__(self, view: View, basis: SketchBasis, codes: list[Tensor]) -> None:
        self.basis, self.bytes = basis, sum(part.nbytes for part in codes)
        self._segments = view.segments
        tokens = view.segments[0].shape[0]
        self._blocks = list(_joined([block for part in codes for block in blocks(part, tokens, basis)], basis, tokens))
        self._globals = [segment.arrays["globals"] for segment in view.segments]
        self._global_scales = [segment.arrays["global_scales"] for segment in view.segments]

    @property
    def is_lost(self) -> bool:
        """Whether a file that it reads from has become shorter, so that it must not be used."""
        return any(segment.sketch is not None and segment.sketch[0].is_lost for segment in self._segments)

    def __call__(self, queries: Tensor, count: int, among: Tensor | None, *, alpha: float) -> Tensor:
        items = self._globals, self._global_scales
        return sketch_candidates(queries, self.basis, self._blocks, *items, count, alpha=alpha, among=among)


class Sketches:
    """Build and find the sketches of an index.

    Args:
        cache: Folder that stores them; None: they are built in memory.
    """

    def __init__(self, cache: Path | None) -> None:
        self._cache, self._lock = cache, threading.Lock()
        self._basis: tuple[SketchBasis, int, str] | None = None  # with its number of sampled items, and its name
        self._source: tuple[View, int, SketchSource] | None = None

    def source(self, view: View, bits: int) -> SketchSource:
        """The first stage for a view with items, with ``bits`` per column; what is missing is built.

        Raises:
            InputError: The embeddings are too wide for a sketch.
            StoreError: A segment cannot be read.
        """
        with between_forks(), self._lock:
            if self._source is not None and self._source[:2] == (view, bits) and not self._source[2].is_lost:
                return self._source[2]
            view.refuse_shortened()
            basis, _, name = self._basis = self._find_basis(view, bits)
            source = SketchSource(view, basis, [self._codes(segment, basis, name) for segment in view.segments])
            self._source = view, bits, source
            return source

    def _find_basis(self, view: View, bits: int) -> tuple[SketchBasis, int, str]:
        width = view.segments[0].shape[1]
        sampled = min(len(view), max(1, _SAMPLED_ROWS // view.segments[0].shape[0]))
        for known in (self._stored_basis(), self._basis):
            if known is None:
                continue
            basis, made_of, _ = known
            is_right = len(basis.projection) == width and basis.row_bytes == row_bytes(width, bits)
            if is_right and 2 * made_of > sampled:
                return known
        rows = torch.arange(sampled) * len(view) // sampled
        embeddings = view.read(rows if view.living is None else view.living[rows])
        basis = sketch_basis(embeddings.flatten(0, 1).float().cpu(), bits=bits)
        arrays = _as_arrays(basis, sampled)
        sums = array_checksums(arrays)
        if self._cache is not None:
            with suppress(StoreError, WriteError):
                write_arrays(self._cache / BASIS, arrays, sums)
        return _from_arrays(arrays)[0], sampled, _name(sums)  # as every other process will read it

    def _stored_basis(self) -> tuple[SketchBasis, int, str] | None:
        """Read the stored basis and verify its checksums; None: it is missing or damaged."""
        if self._cache is None:
            return None
        try:
            refuse_link(self._cache)
            contents = read_contents(self._cache / BASIS)
            sums = file_checksums(self._cache / BASIS, contents)
            if sums != {name: contents.notes.get(name) for name in contents.places}:
                return None
            # Cloned: it is small, and a mapped file that becomes shorter ends the process.
            arrays = {name: values.clone() for name, values in map_arrays(self._cache / BASIS, contents).items()}
            basis, made_of = _from_arrays(arrays)
        except (OSError, KeyError, ValueError, StoreError):
            return None
        return basis, made_of, _name(sums)

    def _codes(self, segment: Segment, basis: SketchBasis, name: str) -> Tensor:
        tokens = segment.shape[0]
        size = len(segment) * tokens * basis.row_bytes
        notes = {"basis": name, "block": str(basis.block_items(tokens))}
        kind = Kind(sketch_name(segment.name), {"codes": (torch.uint8, (size,))}, notes)
        if segment.sketch is not None and segment.sketch[0].kind == kind and not segment.sketch[0].is_lost:
            return segment.sketch[1]
        copies = segment.copies_of(kind)
        arrays = None if self._cache is None else copies.read(self._cache)
        if arrays is None:
            block = basis.block_items(tokens)
            step = max(1, _ITEMS_AT_ONCE // block) * block
            parts = [
                sketch_items(segment.embeddings(slice(start, start + step)), basis)
                for start in range(0, len(segment), step)
            ]
            arrays = {"codes": torch.cat(parts)}
            if self._cache is not None:
                arrays = copies.keep(self._cache, arrays)
        segment.sketch = copies, arrays["codes"]
        return arrays["codes"]


def _joined(parts: list[Tensor], basis: SketchBasis, tokens: int) -> Iterator[Tensor]:
    """Yield blocks, with small neighbours concatenated: each takes a dozen operations, however small it is."""
    waiting: list[Tensor] = []
    largest, count = basis.block_items(tokens), 0
    for part in parts:
        if waiting and count + part.shape[2] > largest:
            yield torch.cat(waiting, dim=2) if len(waiting) > 1 else waiting[0]
            waiting, count = [], 0
        waiting.append(part)
        count += part.shape[2]
    if waiting:
        yield torch.cat(waiting, dim=2) if len(waiting) > 1 else waiting[0]


def _as_arrays(basis: SketchBasis, made_of: int) -> dict[str, Tensor]:
    numbers = torch.tensor([basis.step, basis.unit, basis.error])
    return {"projection": basis.projection, "numbers": numbers, "counts": torch.tensor([basis.bits, made_of])}


def _from_arrays(arrays: dict[str, Tensor]) -> tuple[SketchBasis, int]:
    """
    Raises:
        KeyError, ValueError: The arrays are not those of a basis.
    """
    projection, numbers, counts = arrays["projection"], arrays["numbers"], arrays["counts"]
    kinds = [(values.dtype, tuple(values.shape)) for values in (numbers, counts)]
    if kinds != [(torch.float32, (3,)), (torch.int64, (2,))] or projection.dtype != torch.float32:
        raise ValueError
    step, unit, error = numbers.tolist()
    bits, made_of = counts.tolist()
    is_sound = projection.ndim == 2 and bool(projection.isfinite().all() and numbers.isfinite().all())
    if not is_sound or step <= 0 or made_of < 1 or bits not in (1, 2, 4) or projection.shape[1] % (64 // bits):
        raise ValueError
    return SketchBasis(projection, bits, step, unit, error), made_of


def _name(sums: dict[str, str]) -> str:
    return digest([int(checksum, 16) for checksum in sums.values()])
