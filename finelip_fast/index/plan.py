"""What an index of so many items takes, told before anyone waits for it: bytes, seconds, and which mode to search in.

Sizes follow from the formats. Times are those of small trials on this machine, carried on in proportion: encoding, a pass
over every item, a pass over the global embeddings, and scoring candidates all take time in proportion to their number.
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
from finelip_fast.index.catalogue import Layout, SegmentRow
from finelip_fast.index.search import best_rows
from finelip_fast.index.segments import DTYPES, Segment, encode
from finelip_fast.index.view import View
from finelip_fast.kernels import cosine_candidates
from finelip_fast.kernels.clim.sketch import blocks, check_bits, fine_estimates, row_bytes, sketch_basis, sketch_items

# Bytes of an item in the catalogue: a path of 60 characters, twice (row and index), and a line of metadata; and of both again
# in the list beside its segment.
_CATALOGUE_BYTES = 300 + 150
# What a person waits for without noticing, in seconds: an exact search of this is left exact.
_UNNOTICED = 0.1
# The global embeddings of a trial do not stay in a processor's cache.
_TRIAL_ROWS, _TRIAL_CANDIDATES, _TRIAL_GLOBALS = 80_000, 400, 200_000


@dataclass(frozen=True)
class Rates:
    """What this machine was seen to do.

    Attributes:
        encode: Items a second; None: not measured.
        exact, exact_int8: Items scored a second by one query.
        globals: Items whose global embeddings one query compares a second.
        candidates: Items read and scored a second by one query.
        sketch: Items whose sketches one query compares a second, of rows that lie in no direction more than in others: the
            slowest. None: of global rows alone there are no sketches.
    """

    encode: float | None
    exact: float
    exact_int8: float
    globals: float
    candidates: float
    sketch: float | None = None


@dataclass(frozen=True)
class Plan:
    """What an index takes; bytes and seconds.

    Attributes:
        items: How many.
        disk: Embeddings, global embeddings, catalogue and lists.
        int8_copies: More on disk when it is searched by ``exact-int8`` (float16 only).
        sketches: More on disk when it is searched by ``sketch``.
        memory: Bytes that each mode needs for what a search goes through to stay in memory; a GPU's, where it searches.
        encode_seconds: Time to encode all items on this machine; None: not measured.
        search_seconds: Seconds of one query in each mode; ``two-stage`` is the sum of ``globals`` and ``candidates``.
        mode: Mode to choose; ``reason`` says why.
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
        encode = "not measured" if self.encode_seconds is None else _duration(self.encode_seconds)
        lines = [
            f"{self.items:,} items",
            f"  on disk: {_size(self.disk)}",
            f"  encoding on this machine: {encode}",
            "  a query, and what it goes through (in memory, or on a GPU):",
        ]
        for mode, seconds in self.search_seconds.items():
            if mode in self.memory:
                lines.append(f"    {mode}: {_duration(seconds)}, {_size(self.memory[mode])}")
            else:
                lines.append(f"      {mode}: {_duration(seconds)}")
        if self.int8_copies:
            lines.append(f"  exact-int8 keeps copies on disk: {_size(self.int8_copies)} more")
        if self.sketches:
            lines.append(f"  sketch keeps sketches on disk: {_size(self.sketches)} more")
        return "\n".join([*lines, f"  choose {self.mode}: {self.reason}"])


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
    """What an index of ``items`` matrices ``[L, D]`` takes.

    Args:
        items: How many.
        tokens, width: ``L`` and ``D``.
        rates: Rates of this machine, see :func:`measure`.
        dtype: How embeddings are kept.
        candidates: Number of candidates of a search in two stages.
        bits: Bits of a sketch for each column of a row, 1 or 2.

    Raises:
        InputError: Fewer than one item, no such dtype, or another number of bits.
    """
    check_bits(bits)
    whole_number("items", items)
    one_of("dtype", dtype, DTYPES)
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
        mode, reason = fastest, "every item is scored, and nobody notices"
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
    """Trials of some seconds on this machine.

    Args:
        tokens, width: ``L`` and ``D``.
        alpha: Weight of the global cosine.
        device: Where to search.
        encode_batch: Encodes a batch and says how many items that was; None: encoding is not measured.
        bits: Bits of a sketch for each column of a row, 1 or 2.
    """
    generator = torch.Generator().manual_seed(0)
    # So many that what each search takes besides does not count.
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
        encode_batch()  # warm
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


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if size < 1000 or unit == "PB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
