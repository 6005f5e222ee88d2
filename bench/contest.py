"""Contenders timed in turns, so that none has a better minute to itself, and only those whose answer is right.

pytest-benchmark keeps and writes the times: it replays them by :class:`Replay`'s clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

# More than the L2 cache of any GPU: what one run left there is gone in the next.
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Contender:
    """A way to the answer.

    Args:
        run: Gives the answer, or its first columns.
        tolerance: Largest error that still is the right answer.
        share: How much of the work ``run`` does; slow ones do a part, and their times are divided by it.
    """

    run: Callable[[], Tensor]
    tolerance: float
    share: float = 1.0


@dataclass
class Result:
    """What came of a contender.

    Attributes:
        seconds: One number a round.
        info: ``max_error``, ``share``, on a GPU ``peak_mib``: memory of a run beside what was there before.
        refusal: Why it was not timed; empty: it was.
    """

    seconds: list[float] = field(default_factory=list)
    info: dict[str, float] = field(default_factory=dict)
    refusal: str = ""


def compete(contenders: dict[str, Contender], expected: Tensor, *, rounds: int = 5) -> dict[str, Result]:
    """Check every contender against ``expected`` (float64), then time the right ones in turns."""
    on_gpu = torch.cuda.is_available()
    results = {name: _checked(contender, expected, on_gpu) for name, contender in contenders.items()}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if on_gpu else None
    for _ in range(rounds):
        for name, contender in contenders.items():
            if not results[name].refusal:
                results[name].seconds.append(_timed(contender.run, flush) / contender.share)
    return results


def _checked(contender: Contender, expected: Tensor, on_gpu: bool) -> Result:
    try:
        return _check(contender, expected, on_gpu)
    except (RuntimeError, TypeError, ValueError) as error:  # a peer that cannot run here
        return Result(refusal=f"{type(error).__name__}: {error}")


def _check(contender: Contender, expected: Tensor, on_gpu: bool) -> Result:
    before = 0
    if on_gpu:
        contender.run()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    answer = contender.run()
    part = tuple(slice(size) for size in answer.shape)
    error = (answer.to(expected) - expected[part]).abs().max().item()
    result = Result(info={"max_error": error, "share": contender.share})
    if on_gpu:
        result.info["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    if not error <= contender.tolerance:
        result.refusal = f"wrong by {error:.3g}, more than {contender.tolerance:.3g}: no time for a wrong answer"
    return result


def _timed(run: Callable[[], Tensor], flush: Tensor | None) -> float:
    if flush is None:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class Replay:
    """A clock that shows times that were taken before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def into(self, benchmark: Any, result: Result, group: str) -> None:
        """Hand a contender's times to pytest-benchmark, whose timer is this clock."""
        if result.refusal:
            pytest.skip(result.refusal)
        seconds = iter(result.seconds)

        def advance() -> None:
            self.now += next(seconds, 0.0)

        benchmark.group = group
        benchmark.extra_info.update(result.info)
        quantiles = torch.tensor(result.seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        benchmark.extra_info.update(zip(("p20", "p50", "p80"), quantiles, strict=True))
        benchmark.pedantic(advance, rounds=len(result.seconds), iterations=1)


clock = Replay()
