"""Late interaction on a CPU with contention: the slowdown beside busy processes, ours and plain PyTorch's.

One query among ``FINELIP_BENCH_ITEMS`` (2,000) items of 40 x 512, alone and beside twice as many busy processes as there are
threads; ``loss`` is the median beside them divided by the median alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from baselines import exact_scores, plain_torch
from contest import Contender, Result, clock, compete
from inputs import ON_GPU, unit_rows

from finelip_fast.kernels import clim_scores, quantize

N_ITEMS = int(os.environ.get("FINELIP_BENCH_ITEMS", 2_000))
N_BUSY = 2 * torch.get_num_threads()
ALPHA, ROUNDS = 0.8, 21
EXACT, ROUNDED = 1e-5, 2e-2

FULL, HALF, INT8, PLAIN = (
    "finelip_fast, float32",
    "finelip_fast, float16",
    "finelip_fast, int8",
    "plain PyTorch, float32",
)
CONTENDERS = (FULL, HALF, INT8, PLAIN)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run ``count`` processes that only compute."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@cache
def races() -> dict[int, dict[str, Result]]:
    """Return results by number of busy processes."""
    items, query = unit_rows(N_ITEMS, dtype=torch.float32, seed=1), unit_rows(1, dtype=torch.float32, seed=2)
    half_items, half_query = items.half(), query.half()
    values, scales = quantize(items)
    query_values, query_scales = quantize(query)

    def by_int8() -> torch.Tensor:
        return clim_scores(query_values, values, alpha=ALPHA, query_scales=query_scales, item_scales=scales)

    contenders = {
        FULL: Contender(lambda: clim_scores(query, items, alpha=ALPHA), EXACT),
        HALF: Contender(lambda: clim_scores(half_query, half_items, alpha=ALPHA), ROUNDED),
        INT8: Contender(by_int8, ROUNDED),
        PLAIN: Contender(lambda: plain_torch(items, query, alpha=ALPHA).T, EXACT),
    }
    with torch.inference_mode():
        exact = exact_scores(items, query, alpha=ALPHA).T
        results = {}
        for count in (0, N_BUSY):
            with busy(count):
                results[count] = compete(contenders, exact, rounds=ROUNDS)
    for name, result in results[N_BUSY].items():
        if not result.refusal:
            result.info["loss"] = result.info["p50"] / results[0][name].info["p50"]
    return results


@pytest.mark.skipif(ON_GPU, reason="of a CPU")
@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("count", [0, N_BUSY])
def test_contention(benchmark: Any, count: int, contender: str) -> None:
    benchmark.extra_info.update(items=N_ITEMS, busy_processes=count)
    group = f"1 query among {N_ITEMS:,} items beside {count} busy processes"
    clock.into(benchmark, races()[count], contender, group=group, baseline=PLAIN)
