"""Contenders timed in turns, so that none has a better minute to itself, and only those whose answer is right.

pytest-benchmark keeps and writes the times: it replays them by :class:`Replay`'s clock.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from finelip_fast.kernels.floor import Work, timed

# Seconds. Threads go on spinning for a while after their work, and would be in the way of the next contender's.
_PAUSE = 0.05


def _itself(answer: Any) -> Any:
    return answer


@dataclass(frozen=True)
class Contender:
    """A way to the answer.

    Args:
        run: Does the work.
        tolerance: Largest error that still is the right answer.
        share: How much of the work ``run`` does; slow ones do a part, and their times are divided by it.
        work: What the whole work cannot do without.
        answer: What is checked, or its first rows and columns, of what ``run`` gives.
    """

    run: Callable[[], Any]
    tolerance: float
    share: float = 1.0
    work: Work | None = None
    answer: Callable[[Any], Tensor] = _itself


@dataclass
class Result:
    """What came of a contender.

    Attributes:
        seconds: One number a round.
        info: ``max_error``, ``share``, the quantiles ``p20``, ``p50``, ``p80`` in seconds; on a GPU ``peak_mib``, memory of a
            run beside what was there before; where the work was counted ``bytes``, ``flops``, ``work_dtype``, ``floor`` in
            seconds and ``share_of_floor``, the floor over ``p50``.
        refusal: Why it was not timed; empty: it was.
    """

    seconds: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""


def compete(contenders: dict[str, Contender], expected: Tensor, *, rounds: int = 5) -> dict[str, Result]:
    """Check every contender against ``expected`` (float64), then time the right ones in turns.

    Contenders whose names hold a part of ``FINELIP_BENCH_WITHOUT`` (parts are separated by ``;``) are left out: on a GPU an
    illegal access of one ends the work of all.
    """
    without = [part.strip() for part in os.environ.get("FINELIP_BENCH_WITHOUT", "").split(";") if part.strip()]
    contenders = {
        name: contender for name, contender in contenders.items() if not any(part in name for part in without)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a peer's, and compilers' own
        return _compete(contenders, expected, rounds)


def _compete(contenders: dict[str, Contender], expected: Tensor, rounds: int) -> dict[str, Result]:
    results = {name: _checked(contender, expected) for name, contender in contenders.items()}
    right = [name for name, result in results.items() if not result.refusal]
    for _ in range(rounds):
        for name in right:
            contender = contenders[name]
            time.sleep(_PAUSE)
            results[name].seconds.append(timed(contender.run) / contender.share)
    for name in right:
        results[name].info |= _summary(results[name].seconds, contenders[name].work)
    return results


def _checked(contender: Contender, expected: Tensor) -> Result:
    try:
        return _check(contender, expected)
    except Exception as error:  # a peer that cannot run here; compilers have many names for it
        return Result(refusal=f"{type(error).__name__}: {error}")


def _check(contender: Contender, expected: Tensor) -> Result:
    result = Result(info={"share": contender.share})
    if torch.cuda.is_available():
        contender.run()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        raw = contender.run()
        result.info["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        raw = contender.run()
    answer = contender.answer(raw)
    part = tuple(slice(size) for size in answer.shape)
    error = (answer.to(expected) - expected[part]).abs().max().item()
    result.info["max_error"] = error
    if not error <= contender.tolerance:
        result.refusal = f"wrong by {error:.3g}, more than {contender.tolerance:.3g}: no time for a wrong answer"
    return result


def _summary(seconds: list[float], work: Work | None) -> dict[str, Any]:
    quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    summary: dict[str, Any] = dict(zip(("p20", "p50", "p80"), quantiles.tolist(), strict=True))
    if work is not None:
        summary |= {"bytes": work.bytes, "flops": work.flops, "work_dtype": str(work.dtype).removeprefix("torch.")}
        summary |= {"floor": work.seconds, "share_of_floor": work.seconds / summary["p50"]}
    return summary


class Replay:
    """A clock that shows times that were taken before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def into(self, benchmark: Any, results: dict[str, Result], contender: str, *, group: str, baseline: str) -> None:
        """Hand a contender's times to pytest-benchmark, whose timer is this clock.

        Args:
            benchmark: pytest-benchmark's fixture.
            results: Results of all contenders of the group.
            contender: The one of this test.
            group: What is done; contenders of a group are comparable.
            baseline: The contender that the others are compared with.
        """
        if contender not in results:
            pytest.skip("not installed, or left out")
        result = results[contender]
        if result.refusal:
            pytest.skip(result.refusal)
        seconds = iter(result.seconds)

        def advance() -> None:
            self.now += next(seconds, 0.0)

        benchmark.group = group
        benchmark.extra_info.update(result.info, contender=contender, baseline=baseline)
        benchmark.pedantic(advance, rounds=len(result.seconds), iterations=1)


clock = Replay()
