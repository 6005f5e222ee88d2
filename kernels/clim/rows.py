"""Items that a search reads, whole, in pieces or as a selection, in chunks that are moved to the device of the queries."""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finelip_fast.errors import InputError

Piece = Tensor | np.ndarray[Any, Any]  # first axis: items; in memory, on a device, or mapped from a file
Rows = Piece | Sequence[Piece]  # a sequence: consecutive pieces of the same dtype, width and device

# A pass keeps a few matrices [Q, n] of this many elements, 16 MiB each.
_SCORE_ELEMENTS = 1 << 22
# Bytes of a chunk that must be copied before it can be scored.
_COPY_BYTES = 1 << 26
# Runs of adjacent items of at most this many bytes are copied into one chunk, because a separate pass takes as long. A GPU
# copies every run that is smaller than a chunk (:data:`_COPY_BYTES`).
_TINY_BYTES = 1 << 20
# Share of chosen items from which all items are scored, rather than copied: copying one takes as long as scoring two more.
_DENSE = 1 / 3


class Pieces:
    """Items in consecutive pieces, or a selection of ``n`` of them; in either case, positions count from 0.

    Attributes:
        shape: ``[n, ...]``.
        dtype, device: Dtype and device of every piece.
        mapped: Whether some pieces are ``numpy.ndarray``, which may be mapped from a file larger than memory, or are computed
            when they are read.
        breaks: int64, ascending: positions whose items do not directly follow those of the previous position.

    Raises:
        InputError: No piece, or pieces that differ in more than their number of items.
    """

    def __init__(self, rows: Rows) -> None:
        listed = list(rows) if isinstance(rows, Sequence) else [rows]
        if not listed:
            raise InputError("expected at least one piece of items, got none; pass an empty tensor of the items' shape")
        pieces = [_tensor(piece) for piece in listed]
        like = pieces[0].dtype, pieces[0].shape[1:], pieces[0].device
        for piece in pieces:
            if piece.ndim == 0 or (piece.dtype, piece.shape[1:], piece.device) != like:
                raise InputError(
                    f"expected pieces [n, ...] of one dtype, shape and device, got {_kind(pieces[0])} and {_kind(piece)}:"
                    " convert them first"
                )
        starts = [0, *accumulate(len(piece) for piece in pieces)]
        self.shape = torch.Size([starts[-1], *pieces[0].shape[1:]])
        self.dtype, self.device = pieces[0].dtype, pieces[0].device
        self.mapped = any(isinstance(piece, np.ndarray) for piece in listed)
        self._among: Tensor | None = None
        self._everything: Pieces | None = None
        self._lay_out(pieces, starts, starts)

    def only(self, among: Tensor | None) -> Pieces:
        """Select items.

        Args:
            among: Indices of the items, int64 ``[n]``, ascending, on any device; None means all.

        Raises:
            InputError: Indices of another dtype or shape, not ascending, or out of range.
        """
        if among is None:
            return self
        among = _checked(among, self.shape[0])
        selection = copy.copy(self)
        selection.shape, selection._among = torch.Size([len(among), *self.shape[1:]]), among
        selection._everything = self
        starts = [*self._starts, self.shape[0]]
        selection._lay_out(self._pieces, starts, torch.searchsorted(among, torch.tensor(starts)).tolist())
        return selection

    @property
    def among(self) -> Tensor | None:
        """Indices of the selected items, on the CPU; None means all."""
        return self._among

    @property
    def is_choice(self) -> bool:
        """Whether this is a selection of items."""
        return self._among is not None

    @property
    def is_dense(self) -> bool:
        """Whether scoring all items is faster than copying those that are selected.

        On a CPU, selected items are copied only if they lie scattered, in tiny runs of adjacent ones.
        """
        if self._among is None or len(self._among) < _DENSE * self.everything.shape[0]:
            return False
        return is_gpu(self.device) or len(self._among) * self.item_bytes <= (len(self.breaks) + 1) * _TINY_BYTES

    @property
    def everything(self) -> Pieces:
        """All items, if this is a selection."""
        return self._everything or self

    def _lay_out(self, pieces: list[Tensor], starts: list[int], edges: list[int]) -> None:
        """Keep the pieces that have a position; ``starts`` are first items, ``edges`` first positions and the end."""
        filled = [at for at, (first, last) in enumerate(pairwise(edges)) if first < last]
        self._pieces, self._starts = [pieces[at] for at in filled], [starts[at] for at in filled]
        self._edges = [*(edges[at] for at in filled), edges[-1]]
        self._breaks: Tensor | None = None

    @property
    def breaks(self) -> Tensor:
        """Positions before which a piece ends or items are left out; computed on first use."""
        if self._breaks is None:
            breaks = torch.tensor(self._edges[1:-1], dtype=torch.int64)
            if self._among is not None:
                breaks = torch.cat([breaks, (self._among.diff() != 1).nonzero()[:, 0] + 1]).unique()
            self._breaks = breaks
        return self._breaks

    @property
    def item_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def pinned(self) -> bool:
        """Whether every part can be copied to a GPU directly."""
        return len(self._pieces) == 1 and not len(self.breaks) and self._pieces[0].is_pinned()

    def numbers(self, positions: Tensor) -> Tensor:
        """Indices of the items at these positions, counted across all pieces."""
        return positions if self._among is None else self._among[positions.cpu()].to(positions.device)

    def take(self, positions: Tensor) -> Tensor:
        """The items at these positions, in any order, on their own device."""
        numbers = self.numbers(positions).to(self.device)
        if len(self._pieces) == 1:
            return self._pieces[0][numbers - self._starts[0]]
        # Sorted on the host, so that it waits for a GPU only once, however many pieces there are.
        ascending, order = numbers.cpu().sort()
        starts = torch.tensor(self._starts)
        local = (ascending - starts[torch.bucketize(ascending, starts, right=True) - 1]).to(self.device)
        edges = [*torch.searchsorted(ascending, starts).tolist(), len(ascending)]
        parts = [torch.empty(0, *self.shape[1:], dtype=self.dtype, device=self.device)]
        parts += [self._pieces[at][local[start:end]] for at, (start, end) in enumerate(pairwise(edges)) if start < end]
        return torch.cat(parts)[order.argsort().to(self.device)]

    def read(self, first: int, last: int) -> Tensor:
        """The items from ``first`` up to but excluding ``last``: a view if they are contiguous, otherwise a copy."""
        at = bisect_right(self._edges, first) - 1
        if last <= self._edges[at + 1]:
            rows = self._rows(at, first, last)
            if isinstance(rows, slice):
                return self._pieces[at][rows]
        return self.copy(first, last, torch.empty(last - first, *self.shape[1:], dtype=self.dtype, device=self.device))

    def copy(self, first: int, last: int, target: Tensor) -> Tensor:
        """Copy the items from ``first`` up to but excluding ``last`` to the start of ``target``, which may be longer."""
        at, start = bisect_right(self._edges, first) - 1, first
        while start < last:
            end = min(last, self._edges[at + 1])
            piece, rows, part = self._pieces[at], self._rows(at, start, end), target[start - first : end - first]
            if isinstance(rows, slice):
                part.copy_(piece[rows])
            elif piece.device == part.device:
                torch.index_select(piece, 0, rows.to(piece.device), out=part)
            else:
                part.copy_(piece.index_select(0, rows.to(piece.device)))
            at, start = at + 1, end
        return target[: last - first]

    def _rows(self, at: int, first: int, last: int) -> slice | Tensor:
        """Rows of a piece at these positions, all of which it holds."""
        if self._among is None:
            return slice(first - self._starts[at], last - self._starts[at])
        rows = self._among[first:last] - self._starts[at]
        start, end = int(rows[0]), int(rows[-1]) + 1
        return slice(start, end) if end - start == last - first else rows


class Dequantized(Pieces):
    """Items represented by int8, in float32: row 0 is the anchor, the others are integers times their scale."""

    def __init__(self, values: Rows, scales: Rows, anchors: Rows) -> None:
        super().__init__(values)
        self.dtype, self.mapped = torch.float32, True
        self._parts = [Pieces(part) for part in (values, scales, anchors)]

    def only(self, among: Tensor | None) -> Dequantized:
        selection = super().only(among)
        assert isinstance(selection, Dequantized)
        selection._parts = [part.only(among) for part in self._parts]
        return selection

    @property
    def pinned(self) -> bool:
        return False

    def take(self, positions: Tensor) -> Tensor:
        return dequantize(*(part.take(positions) for part in self._parts))

    def read(self, first: int, last: int) -> Tensor:
        return dequantize(*(part.read(first, last) for part in self._parts))

    def copy(self, first: int, last: int, target: Tensor) -> Tensor:
        return target[: last - first].copy_(self.read(first, last))


def dequantize(values: Tensor, scales: Tensor, anchors: Tensor) -> Tensor:
    """Convert int8 ``[..., L, D]`` with scales ``[..., L]`` and anchors ``[..., 1, D]`` to float32."""
    rows = values * scales[..., None]
    rows[..., :1, :] = anchors
    return rows


class _Writable:
    """A read-only array presented as writable: PyTorch warns about read-only ones, and a search never writes to them."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array  # keeps its memory alive
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _tensor(piece: Piece) -> Tensor:
    if isinstance(piece, Tensor):
        return piece.detach()
    if not isinstance(piece, np.ndarray):
        raise InputError(
            f"expected items as tensors or numpy arrays, or a sequence of them, got {type(piece).__name__}"
        )
    if any(stride < 0 or stride % piece.itemsize for stride in piece.strides):
        piece = piece.copy()  # PyTorch has no views with such strides
    elif not piece.flags.writeable:
        piece = np.asarray(_Writable(piece))
    try:
        return torch.from_numpy(piece)
    except (TypeError, ValueError) as exc:  # text, objects, another byte order
        raise InputError(f"expected items in a dtype of PyTorch, got {piece.dtype}: convert them (.astype)") from exc


def _kind(piece: Tensor) -> str:
    shape = ", ".join(map(str, ["n", *piece.shape[1:]])) if piece.ndim else ""
    return f"{piece.dtype} [{shape}] on {piece.device}"


def _checked(among: Tensor, n_items: int) -> Tensor:
    requirement = f"expected among as int64 [n], ascending, each item once, from 0 to {n_items - 1}"
    if not isinstance(among, Tensor):
        raise InputError(f"{requirement}, got {type(among).__name__}: make it a tensor (torch.as_tensor)")
    if among.dtype != torch.int64 or among.ndim != 1:
        raise InputError(f"{requirement}, got {among.dtype} {list(among.shape)}; for a mask: mask.nonzero()[:, 0]")
    among = among.detach().cpu().contiguous()
    if (among[1:] <= among[:-1]).any():
        raise InputError(f"{requirement}, got some out of order or twice: sort them (among.unique())")
    if len(among) and not 0 <= among[0] <= among[-1] < n_items:
        raise InputError(f"{requirement}, got {among[0]} to {among[-1]}; positions count the items of all pieces")
    return among


def is_gpu(device: torch.device) -> bool:
    """Whether launches and waits make many small chunks expensive."""
    return device.type == "cuda"


# Chunks --------------------------------------------------------------------------------------------------------------


def chunks(
    sources: Sequence[Pieces], n_queries: int, device: torch.device, within: range | None = None
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield chunks of all sources, cut alike along the first axis, on ``device``, each valid until the next.

    Each comes with its first position.

    Args:
        sources: Pieces with the same number of items.
        n_queries: Number of rows of scores that a chunk will get.
        within: Consecutive positions; None means all.
    """
    within = range(sources[0].shape[0]) if within is None else within
    is_on_device = all(source.device == device for source in sources)
    size = max(1, _SCORE_ELEMENTS // max(1, n_queries))
    copied = _affordable(sources, size, _COPY_BYTES)
    if is_on_device:
        # Many queries read a chunk more than once: a chunk mapped from a file should still be in memory then.
        longest = copied if any(source.mapped for source in sources) else size
        # On a CPU, memory for larger copies would come from the system page by page, which takes longer than the copies do.
        joined = copied if device.type == "cuda" else _affordable(sources, size, _COPY_BYTES // 4)
        tiny = _COPY_BYTES if is_gpu(device) and any(source.is_choice for source in sources) else _TINY_BYTES
        for first, last in _cuts(sources, within, longest, joined, tiny):
            yield first, [source.read(first, last) for source in sources]
    elif device.type == "cuda" and len(within):
        yield from _streamed(sources, within, min(copied, len(within)), device)
    else:
        for first, last in _steps(within, copied):
            yield first, [source.read(first, last).to(device) for source in sources]


def _item_bytes(sources: Sequence[Pieces]) -> int:
    return max(1, sum(source.item_bytes for source in sources))


def _affordable(sources: Sequence[Pieces], size: int, n_bytes: int) -> int:
    """Number of items that fit, at most ``size`` and at least 1."""
    return max(1, min(size, n_bytes // _item_bytes(sources)))


def _steps(within: range, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, within.stop)) for first in range(within.start, within.stop, size)]


def _cuts(sources: Sequence[Pieces], within: range, size: int, joined: int, tiny: int) -> Iterator[tuple[int, int]]:
    """Chunks of up to ``size`` items that no source must copy, and of up to ``joined`` from runs of at most ``tiny`` bytes."""
    breaks = torch.cat([source.breaks for source in sources])
    breaks = breaks[(breaks > within.start) & (breaks < within.stop)]
    if not len(breaks):
        yield from _steps(within, size)
        return
    ends = torch.tensor([within.start, within.stop])
    edges = torch.cat([ends, breaks]).unique()
    large = edges.diff() * _item_bytes(sources) > tiny
    views = set(edges[:-1][large].tolist())
    for start, end in pairwise(torch.cat([ends, edges[:-1][large], edges[1:][large]]).unique().tolist()):
        yield from _steps(range(start, end), size if start in views else joined)


class _Buffer:
    """Memory for a chunk of a source on its way to a GPU: pinned, unless the chunk already is, and on the GPU."""

    def __init__(self, source: Pieces, size: int, device: torch.device) -> None:
        shape = size, *source.shape[1:]
        self.pinned = None if source.pinned else torch.empty(shape, dtype=source.dtype, pin_memory=True)
        self.staged = torch.empty(shape, dtype=source.dtype, device=device)


def _streamed(
    sources: Sequence[Pieces], within: range, size: int, device: torch.device
) -> Iterator[tuple[int, list[Tensor]]]:
    """Copy host memory to a GPU on a side stream, each chunk while the previous one is scored.

    Memory that is not pinned goes through two pinned buffers, which a thread fills, because that copy keeps a processor busy.
    Each buffer has two events: it must have been written (``copied``) before it is read, and read (``scored``) before it is
    written again. A source that is already on the GPU is read there.
    """
    buffers = [
        [None if source.device == device else _Buffer(source, size, device) for source in sources] for _ in range(2)
    ]
    copied = [torch.cuda.Event(), torch.cuda.Event()]
    scored = [torch.cuda.Event(), torch.cuda.Event()]
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)  # earlier work on the main stream may still use the buffers' memory

    def stage(number: int, first: int, last: int) -> None:
        copied[number].synchronize()  # the pinned buffer's previous contents have been copied
        for source, buffer in zip(sources, buffers[number], strict=True):
            if buffer is None:
                continue
            rows = source.read(first, last) if buffer.pinned is None else source.copy(first, last, buffer.pinned)
            with torch.cuda.stream(side):
                side.wait_event(scored[number])
                buffer.staged[: len(rows)].copy_(rows, non_blocking=True)
        copied[number].record(side)

    steps = _steps(within, size)
    try:
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(stage, 0, *steps[0])
            for step, (first, last) in enumerate(steps):
                number = step % 2
                coming.result()
                if step + 1 < len(steps):
                    coming = thread.submit(stage, 1 - number, *steps[step + 1])
                main.wait_event(copied[number])
                yield (
                    first,
                    [
                        source.read(first, last) if buffer is None else buffer.staged[: last - first]
                        for source, buffer in zip(sources, buffers[number], strict=True)
                    ],
                )
                scored[number].record(main)
    finally:
        main.wait_stream(side)  # before the buffers' memory is reused
