"""The least time that an operation can take, from the data that it must move and multiply and this machine's measured peaks.

    floor = max(bytes / memory bandwidth, flops / peak)

Bytes are those of the inputs and results, each counted once; a product of ``[M, K]`` and ``[K, N]`` is ``2 M K N`` flops.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from finelip_fast.kernels import cpu

# More than the L2 cache of any GPU, so that nothing from one run is left in it for the next.
_FLUSH_BYTES = 256 << 20

# Few processors multiply float16.
_DTYPES = {
    "cuda": (torch.float32, torch.float16, torch.bfloat16, torch.int8),
    "cpu": (torch.float32, torch.bfloat16, torch.int8),
}


@dataclass(frozen=True)
class Work:
    """The least work that an operation must do."""

    bytes: int
    flops: int
    dtype: torch.dtype  # of the products

    @property
    def seconds(self) -> float:
        """The floor on this machine."""
        most = peaks()
        seconds: float = max(self.bytes / most["bytes/s"], self.flops / most["flops/s"].get(name(self.dtype), math.inf))
        return seconds


def name(dtype: torch.dtype) -> str:
    """Name of a dtype: ``float16``, not ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def clim(n_queries: int, n_items: int, tokens: int, width: int, dtype: torch.dtype, *, backward: bool = False) -> Work:
    """Work for all scores of late interaction; with ``backward``, also for the gradients of both sides.

    Each of the gradient's two products counts as much as the forward one, as on matrix units, although most of the matrix
    that they multiply by is zero.
    """
    rows = (n_queries + n_items) * tokens
    scales = 4 * rows if dtype == torch.int8 else 0
    moved = rows * width * dtype.itemsize + scales
    flops = 2 * n_queries * n_items * tokens * tokens * width
    if backward:  # reads the scores' gradient, writes those of the inputs
        return Work(2 * moved + 8 * n_queries * n_items, 3 * flops, dtype)
    return Work(moved + 4 * n_queries * n_items, flops, dtype)


def atrm(
    batch: int, tokens: int, width: int, hidden: int, aggregated: int, dtype: torch.dtype, *, backward: bool = False
) -> Work:
    """Work for token aggregation; with ``backward``, also for the gradients of tokens, parameters and anchor."""
    parameters = width * (hidden + 2) + hidden * (aggregated + 1) + aggregated + 1
    moved = dtype.itemsize * (batch * (tokens + 1 + aggregated + 1) * width + parameters)
    flops = 2 * batch * tokens * (width * hidden + hidden * aggregated + aggregated * width)
    return Work(2 * moved, 3 * flops, dtype) if backward else Work(moved, flops, dtype)


@cache
def peaks() -> dict[str, Any]:
    """Measure this machine's peaks, once per process, by a copy larger than its caches and by square products.

    Returns:
        ``bytes/s`` read and written, and ``flops/s`` for each dtype that this machine can multiply.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.zeros(4 * _FLUSH_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    flops = {}
    for dtype in _DTYPES[device]:
        with contextlib.suppress(RuntimeError):
            flops[name(dtype)] = _product_peak(dtype, device)
    return {"bytes/s": copied, "flops/s": flops}


def _product_peak(dtype: torch.dtype, device: str) -> float:
    side = 8192 if device == "cuda" else 2048
    square = torch.randint(-8, 8, (side, side), device=device).to(dtype)
    product = torch.ops.aten._int_mm if dtype == torch.int8 else torch.mm  # the latter has no int8
    products = [partial(product, square, second) for second in (square, square.T)]  # int8 is fast only column-major
    if device == "cpu" and dtype.is_floating_point and cpu.has_onednn():  # PyTorch's own product uses MKL
        products.append(partial(cpu.linear, square, cpu.packed(square)))
    return float(2 * side**3 / min(map(seconds, products)))


def seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    """Shortest time of a few runs after a warm-up run."""
    run()
    return min(timed(run) for _ in range(rounds))


def timed(run: Callable[[], Any]) -> float:
    """Time one run in seconds; on a GPU with a cold L2 cache, between two events."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    # By reading: data that a write leaves in the cache would go to memory during the timed run.
    _flush().sum()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@cache
def _flush() -> torch.Tensor:
    return torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
