"""Estimate what an index of a given size takes before it is built: bytes, seconds, and the mode to search in.

Sizes follow from the formats. Times are extrapolated from small trials on this machine: encoding, a pass over all items, a
pass over the global embeddings, and scoring candidates all take time in proportion to their number.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from finelip_fast._arguments import one_of, whole_number
from finelip_fast._quantities import readable_duration, readable_size
from finelip_fast.index.catalogue import Layout, SegmentRow
from finelip_fast.index.search import best_rows
from finelip_fast.index.segments import DTYPES, Segment, encode
from finelip_fast.index.view import View
from finelip_fast.kernels import cosine_candidates
from finelip_fast.kernels.clim.sketch import blocks, check_bits, fine_estimates, row_bytes, sketch_basis, sketch_items

# Bytes of an item in the catalogue (a path of 60 characters, in both row and index, and a line of metadata), and of path and
# metadata again in the list beside its segment.
_CATALOGUE_BYTES = 300 + 150
# A delay that nobody notices, in seconds: an exact search that takes no longer stays exact.
_UNNOTICED = 0.1
# A trial has too many global embeddings for a processor's cache.
_TRIAL_ROWS, _TRIAL_CANDIDATES, _TRIAL_GLOBALS = 80_000, 400, 200_000


@dataclass(frozen=True)
class Rates:
    """Rates measured on this machine.

    Attributes:
        encode: Items encoded per second; None: not measured.
        exact, exact_int8: Items that one query scores per second.
        globals: Items whose global embeddings one query compares per second.
        candidates: Items that one query reads and scores per second.
        sketch: Items whose sketches one query compares per second, with rows spread equally over all directions, the slowest
            case. None: global rows alone have no sketches.
    """

    encode: float | None
    exact: float
    exact_int8: float
    globals: float
    candidates: float
    sketch: float | None = None


@dataclass(frozen=True)
class Plan:
    """Resources that an index takes, in bytes and seconds.

    Attributes:
        items: Number of items.
        disk: Embeddings, global embeddings, catalogue and lists.
        int8_copies: Additional bytes on disk if it is searched by ``exact-int8`` (float16 only).
        sketches: Additional bytes on disk if it is searched by ``sketch``.
        memory: Memory that each mode needs to hold what a search scans, in bytes; GPU memory if a GPU searches.
        encode_seconds: Time to encode all items on this machine; None: not measured.
        search_seconds: Seconds per query in each mode; ``two-stage`` is the sum of its stages, which have their own entries.
        mode: Recommended mode; ``reason`` says why.
    """

    items: int
    disk: int
    int8_copies: int
    sketches: int
    memory: dict[str, int]
    encode_seconds: float | None
    search_seconds: dict[str, float]
    mode: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return vars(self)

    def __str__(self) -> str:
        encode = "not measured" if self.encode_seconds is None else readable_duration(self.encode_seconds)
        lines = [
            f"{self.items:,} items",
            f"  on disk: {readable_size(self.disk)}",
            f"  encoding on this machine: {encode}",
            "  a query, and what it goes through (in memory, or on a GPU):",
        ]
        for mode, seconds in self.search_seconds.items():
            if mode in self.memory:
                lines.append(f"    {mode}: {readable_duration(seconds)}, {readable_size(self.memory[mode])}")
            else:
                lines.append(f"      {mode}: {readable_duration(seconds)}")
        if self.int8_copies:
            lines.append(f"  exact-int8 keeps copies on disk: {readable_size(self.int8_copies)} more")
        if self.sketches:
            lines.append(f"  sketch keeps sketches on disk: {readable_size(self.sketches)} more")
        return "\n".join([*lines, f"  choose {self.mode}: {self.reason}"])


def check_plan(items: int, *, dtype: str, candidates: int, bits: int) -> None:
    """Check the arguments of :func:`plan` that do not depend on this machine, before it is measured.

    Raises:
        InputError: There is less than one item or candidate, the dtype is unknown, or the number of bits is invalid.
    """
    check_bits(bits)
    whole_number("items", items)
    whole_number("candidates", candidates)
    one_of("dtype", dtype, DTYPES)


def plan(
    items: int,
    tokens: int,
    width: int,
    rates: Rates,
    *,
    dtype: str = "float16",
    candidates: int = 400,
    bits: int = 1,
) -> Plan:
    """Estimate what an index of ``items`` matrices ``[L, D]`` takes.

    Args:
        items: Number of items.
        tokens, width: ``L`` and ``D``.
        rates: Rates of this machine, see :func:`measure`.
        dtype: Format of stored embeddings.
        candidates: Number of candidates for two-stage search.
        bits: Bits of a sketch per column of a row, 1 or 2.

    Raises:
        InputError: As raised by :func:`check_plan`.
    """
    check_plan(items, dtype=dtype, candidates=candidates, bits=bits)
    quantized = tokens * width + 4 * tokens + 4 * 6 + 2 * width
    stored = quantized if dtype == "int8" else 2 * tokens * width
    globals_ = width + 4
    sketch = 0 if tokens == 1 else tokens * row_bytes(width, bits)
    memory = {
        "exact": items * stored,
        "exact-int8": items * quantized,
        "two-stage": items * globals_,
    }
    if tokens == 1:  # global embeddings alone, which the exact modes compare in full precision
        memory["exact"] = memory["exact-int8"] = items * 2 * width
    stages = {
        "global embeddings": items / rates.globals,
        f"{candidates} candidates": min(items, candidates) / rates.candidates,
    }
    seconds = {
        "exact": items / (rates.exact if dtype == "float16" else rates.exact_int8),
        "exact-int8": items / rates.exact_int8,
    }
    if sketch and rates.sketch is not None:
        memory["sketch"] = items * (sketch + globals_)
        seconds["sketch"] = items / rates.sketch + sum(stages.values())
    seconds |= {"two-stage": sum(stages.values()), **stages}
    fastest = min(("exact-int8", "exact"), key=lambda mode: seconds[mode])
    if seconds[fastest] <= _UNNOTICED:
        mode, reason = fastest, f"scoring every item takes at most {readable_duration(_UNNOTICED)}"
    else:
        mode = "two-stage"
        reason = (
            f"{seconds[fastest] / seconds[mode]:.0f}x the speed of {fastest}; finelip index tune measures what it loses"
        )
    return Plan(
        items=items,
        disk=items * (stored + globals_ + _CATALOGUE_BYTES),
        int8_copies=0 if dtype == "int8" or tokens == 1 else items * quantized,
        sketches=items * sketch,
        memory=memory,
        encode_seconds=None if rates.encode is None else items / rates.encode,
        search_seconds=seconds,
        mode=mode,
        reason=reason,
    )


def measure(
    tokens: int,
    width: int,
    *,
    alpha: float,
    device: torch.device | str = "cpu",
    encode_batch: Callable[[], int] | None = None,
    bits: int = 1,
) -> Rates:
    """Measure rates by trials of a few seconds on this machine.

    Args:
        tokens, width: ``L`` and ``D``.
        alpha: Weight of the global cosine.
        device: Device that searches.
        encode_batch: Function that encodes a batch and returns its number of items; None: encoding is not measured.
        bits: Bits of a sketch per column of a row, 1 or 2.
    """
    generator = torch.Generator().manual_seed(0)
    # Enough items that the fixed cost of a search does not count.
    n_items = max(2 * _TRIAL_CANDIDATES, _TRIAL_ROWS // tokens)
    rows = F.normalize(torch.randn(n_items, tokens, width, generator=generator), dim=-1)
    segment = Segment("trial", encode(rows, "float16"))
    view = View(Layout(0, [SegmentRow("trial", 0, n_items)], []), [segment], torch.device(device), None)
    query = F.normalize(torch.randn(1, tokens, width, generator=generator), dim=-1)

    def search(**options: Any) -> float:
        return _median(lambda: best_rows(view, query, 10, alpha=alpha, **options)[1].cpu())

    values = torch.randint(-127, 128, (_TRIAL_GLOBALS, width), generator=generator, dtype=torch.int8).to(device)
    scales = torch.ones(_TRIAL_GLOBALS, device=device)
    globals_seconds = _median(
        lambda: cosine_candidates(query[:, 0].to(device), values, scales, _TRIAL_CANDIDATES).cpu()
    )
    fewer_candidates = search(mode="two-stage", candidates=_TRIAL_CANDIDATES // 10)
    more_candidates = search(mode="two-stage", candidates=_TRIAL_CANDIDATES)
    per_candidate = max((more_candidates - fewer_candidates) / (0.9 * _TRIAL_CANDIDATES), 1e-9)
    sketch_rate = None
    if tokens > 1:
        basis = sketch_basis(rows.flatten(0, 1), bits=bits)
        codes = blocks(sketch_items(rows, basis), tokens, basis) * 4
        sketch_rate = 4 * n_items / _median(lambda: fine_estimates(query, basis, codes))
    encode_rate = None
    if encode_batch is not None:
        encode_batch()  # warm-up
        start = time.perf_counter()
        encode_rate = encode_batch() / (time.perf_counter() - start)
    return Rates(
        encode=encode_rate,
        exact=n_items / search(mode="exact"),
        exact_int8=n_items / search(mode="exact-int8"),
        globals=_TRIAL_GLOBALS / globals_seconds,
        candidates=1 / per_candidate,
        sketch=sketch_rate,
    )


def _median(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
