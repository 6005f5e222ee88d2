"""Copies of segments on a GPU, packed into few buffers, so that many segments take no more kernel launches than one.

Segments that arrive together, as all do when an index is opened, are copied from the host into one buffer, each directly to
its place. Later segments start a new buffer, and the last buffers are joined where one is at most twice as large as those
behind it. So there are few buffers however many segments arrive, and a row is moved a few times at most. Joined data is in
memory twice until it is copied and the previous view is gone; this takes at most a tenth of the memory that was free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

# Shares of a GPU's free memory: for copies, and for data that joining may hold twice.
_SHARE, _JOINED_SHARE = 0.7, 0.1
# A buffer is joined to those behind it if it is at most this many times as large.
_GROWTH = 2

Copies = dict[str, Tensor]  # of a segment, by name
Run = list[int]  # numbers of consecutive segments


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU in bytes."""
    free, _ = torch.cuda.mem_get_info(device)
    return free


def resident(name: str, pieces: Sequence[Tensor], copies: Sequence[Copies], device: torch.device) -> list[Tensor]:
    """Copy pieces to a GPU and join them; those already there stay. If they do not fit, they are returned unchanged.

    Args:
        name: Name of the array.
        pieces: One piece ``[n, ...]`` per segment, on the host.
        copies: Copies of each segment; those of this name are added, or replaced by parts of a buffer of several segments.
        device: Target device.

    Returns:
        The same rows, in the same number of tensors or fewer.
    """
    missing = sum(piece.nbytes for piece, held in zip(pieces, copies, strict=True) if name not in held)
    free = free_bytes(device)
    if missing > _SHARE * free:
        return list(pieces)
    sources = [held.get(name, piece) for piece, held in zip(pieces, copies, strict=True)]
    present = [name in held for held in copies]
    joined = []
    for run, is_new in _planned(sources, present, int(_JOINED_SHARE * free)):
        parts = [sources[number] for number in run]
        if is_new:
            buffer = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype, device=device)
            for number, part, source in zip(run, buffer.split([len(part) for part in parts]), parts, strict=True):
                copies[number][name] = part.copy_(source)
                sources[number] = part  # its old buffer can be freed
        else:
            buffer = _joined(parts)
        joined.append(buffer)
    return joined


def _planned(sources: Sequence[Tensor], present: Sequence[bool], budget: int) -> list[tuple[Run, bool]]:
    """Plan the runs of segments that share a buffer, and whether it is new; ``budget`` bytes may be in memory twice."""
    wasted = _wasted(sources, present)
    plan: list[tuple[Run, bool]] = []
    for run in reversed(list(_runs(sources, present))):
        moved = 0 if not present[run[0]] else _bytes(sources, run)
        if plan:
            behind, is_new = plan[-1]
            also_moved = 0 if is_new else _bytes(sources, behind)
            small = _bytes(sources, run) <= _GROWTH * _bytes(sources, behind)
            if small and moved + also_moved <= budget:
                budget -= moved + also_moved
                plan[-1] = run + behind, True
                continue
        is_new = not present[run[0]] or (run[0] in wasted and moved <= budget)
        budget -= moved if is_new else 0
        plan.append((run, is_new))
    return plan[::-1]


def _runs(sources: Sequence[Tensor], present: Sequence[bool]) -> Iterator[Run]:
    """Yield runs of segments that are adjacent in a buffer, or that are not on the GPU yet."""
    run = [0]
    for before, number in pairwise(range(len(sources))):
        states = present[before], present[number]
        if not any(states) or (all(states) and _adjacent(sources[before], sources[number])):
            run.append(number)
        else:
            yield run
            run = [number]
    yield run


def _wasted(sources: Sequence[Tensor], present: Sequence[bool]) -> set[int]:
    """Segments in buffers that mostly hold segments that are gone."""
    within: dict[int, Run] = defaultdict(list)
    for number, source in enumerate(sources):
        if present[number]:
            within[source.untyped_storage().data_ptr()].append(number)
    return {
        number
        for run in within.values()
        for number in run
        if sources[run[0]].untyped_storage().nbytes() > 2 * _bytes(sources, run)
    }


def _bytes(sources: Sequence[Tensor], run: Run) -> int:
    return sum(sources[number].nbytes for number in run)


def _adjacent(before: Tensor, after: Tensor) -> bool:
    in_one_buffer = before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
    return in_one_buffer and bool(before.storage_offset() + before.numel() == after.storage_offset())


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Adjacent parts of a buffer as one tensor."""
    first = parts[0]
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride(), first.storage_offset())
