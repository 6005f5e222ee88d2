"""Time contenders in turns, so that none benefits from a quiet moment, and only those whose answer is right.

On a GPU each contender of a :func:`race` has a process of its own, which runs one turn per message. A failure that ends one
contender, such as an illegal access, therefore leaves the others running.

pytest-benchmark records the times, replayed through :class:`Replay`'s clock.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import ON_GPU
from torch import Tensor

from finelip_fast.kernels.floor import Work, timed

# Seconds within which a process must answer; compilers and autotuners need minutes.
_LIMIT = 300.0
# Seconds within which an idle process must exit.
_ENDING = 10.0
# Seconds. Threads keep spinning for a while after their work and would slow the next contender.
_PAUSE = 0.05


def _itself(answer: Any) -> Any:
    return answer


def _nothing(answer: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Contender:
    """One way to compute the answer.

    Args:
        run: Function that does the work.
        tolerance: Largest error that still counts as right.
        share: Share of the work that ``run`` does. Slow contenders do a part, and their times are divided by it.
        work: Minimum cost of the whole work.
        answer: Function that extracts the part to check, or its first rows and columns, from the result of ``run``.
        notes: Function that extracts further values to record from the result of ``run``.
    """

    run: Callable[[], Any]
    tolerance: float
    share: float = 1.0
    work: Work | None = None
    answer: Callable[[Any], Tensor] = _itself
    notes: Callable[[Any], dict[str, Any]] = _nothing


Entries = Mapping[str, Callable[[], Contender]]
"""Contenders by name, each made when it is asked for, with what it needs alone: another process may ask for another."""


@dataclass
class Result:
    """Outcome of a contender.

    Attributes:
        seconds: One time per round.
        info: ``max_error``, ``share``, the quantiles ``p20``, ``p50``, ``p80`` in seconds; on a GPU also ``peak_mib``, the
            additional memory of a run; if the work was counted, also ``bytes``, ``flops``, ``work_dtype``, ``floor`` in
            seconds and ``share_of_floor``, the floor divided by ``p50``.
        refusal: Reason why there are no times; empty if there are.
        work: Minimum cost of the whole work.
    """

    seconds: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""
    work: Work | None = None


def race(
    entries: Callable[..., Entries],
    *arguments: Any,
    expected: Tensor,
    rounds: int = 5,
    apart: bool = ON_GPU,
    limit: float = _LIMIT,
) -> dict[str, Result]:
    """Check every contender against ``expected`` (float64), then time the right ones in turns.

    Args:
        entries: Function in an importable file that returns the same contenders, with the same inputs, in any process.
        arguments: Arguments of ``entries``; none may be on a GPU.
        expected: The right answer.
        rounds: Number of turns of each contender.
        apart: Whether each contender has a process of its own.
        limit: Seconds within which such a process must answer each message; otherwise it has failed.

    Contenders whose names contain a part of ``FINELIP_BENCH_WITHOUT`` (parts are separated by ``;``) are left out.
    """
    makers = _admitted(entries(*arguments))
    if not apart:
        return _compete({name: _Here(maker, expected) for name, maker in makers.items()}, rounds)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_processes:
        path = Path(folder, "expected.pt")
        torch.save(expected.cpu(), path)
        del expected
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        racers = {name: _Apart(entries, arguments, name, path, limit) for name in makers}
        for racer in racers.values():
            open_processes.callback(racer.end)
        return _compete(racers, rounds)


def compete(contenders: Mapping[str, Contender], expected: Tensor, *, rounds: int = 5) -> dict[str, Result]:
    """Run a race in this process."""
    racers = {name: _Here(lambda contender=contender: contender, expected) for name, contender in contenders.items()}
    return _compete(_admitted(racers), rounds)


def _admitted(contenders: Mapping[str, Any]) -> dict[str, Any]:
    without = [part.strip() for part in os.environ.get("FINELIP_BENCH_WITHOUT", "").split(";") if part.strip()]
    return {name: contender for name, contender in contenders.items() if not any(part in name for part in without)}


def _compete(racers: Mapping[str, _Here | _Apart], rounds: int) -> dict[str, Result]:
    results = {name: racer.check() for name, racer in racers.items()}
    for _ in range(rounds):
        for name, result in results.items():
            if not result.refusal:
                time.sleep(_PAUSE)
                racers[name].turn(result)
    for result in results.values():
        if not result.refusal:
            result.info |= _summary(result.seconds, result.work)
    return results


class _Here:
    """A contender in this process."""

    def __init__(self, maker: Callable[[], Contender], expected: Tensor) -> None:
        self._maker, self._expected = maker, expected

    def check(self) -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from peers and from compilers
            try:
                self._contender = self._maker()
                return _check(self._contender, self._expected)
            except Exception as error:  # a peer that cannot run here; compilers raise many types
                return Result(refusal=f"{type(error).__name__}: {error}")

    def turn(self, result: Result) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result.seconds.append(timed(self._contender.run) / self._contender.share)


class _Apart:
    """A contender in another process, which runs one turn per message."""

    def __init__(
        self, entries: Callable[..., Entries], arguments: tuple[Any, ...], name: str, expected: Path, limit: float
    ) -> None:
        context = get_context("spawn")
        self._limit = limit
        self._pipe, other_end = context.Pipe()
        # By file: another process does not know the module names that a test runner or a script uses.
        source = entries.__code__.co_filename, entries.__name__
        self._process = context.Process(target=_serve, args=(other_end, source, arguments, name, expected), daemon=True)
        self._process.start()
        other_end.close()

    def check(self) -> Result:
        answer = self._ask("check")
        return answer if isinstance(answer, Result) else Result(refusal=answer)

    def turn(self, result: Result) -> None:
        answer = self._ask("turn")
        if isinstance(answer, float):
            result.seconds.append(answer)
        else:
            result.refusal = answer

    def end(self) -> None:
        self._pipe.close()  # ends the process unless it is busy
        self._process.join(_ENDING)
        self._process.kill()
        self._process.join()

    def _ask(self, message: str) -> Any:
        """Send a message; return the reply, or the reason why there is none."""
        try:
            self._pipe.send(message)
            if self._pipe.poll(self._limit):
                return self._pipe.recv()
        except (OSError, EOFError):
            self._process.join(self._limit)
            code = self._process.exitcode
            return f"failed: its process ended by {signal.Signals(-code).name if code and code < 0 else f'exit code {code}'}"
        self._process.kill()
        return f"failed: no answer within {self._limit:g} s"


def _serve(pipe: Connection, source: tuple[str, str], arguments: tuple[Any, ...], name: str, expected: Path) -> None:
    """Serve a contender's turns in its process, until the process is killed."""
    path, function = source
    sys.path.insert(0, str(Path(path).parent))
    entries = getattr(importlib.import_module(Path(path).stem), function)
    racer: _Here | None = None
    with suppress(EOFError):  # the race is over
        while True:
            message, result = pipe.recv(), Result()
            try:
                if message == "check":
                    racer = _Here(entries(*arguments)[name], torch.load(expected))
                    pipe.send(racer.check())
                elif racer is not None:
                    racer.turn(result)
                    pipe.send(result.seconds[0])
            except Exception as error:
                pipe.send(f"failed: {type(error).__name__}: {error}")


def _check(contender: Contender, expected: Tensor) -> Result:
    result = Result(info={"share": contender.share}, work=contender.work)
    if torch.cuda.is_available():
        contender.run()  # triggers compilation
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        raw = contender.run()
        result.info["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        raw = contender.run()
    result.info |= contender.notes(raw)
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
    """A clock that replays recorded times."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def into(self, benchmark: Any, results: dict[str, Result], contender: str, *, group: str, baseline: str) -> None:
        """Pass a contender's times to pytest-benchmark, whose timer is this clock.

        Args:
            benchmark: pytest-benchmark's fixture.
            results: Results of all contenders of the group.
            contender: Contender of this test.
            group: Name of the operation; contenders of a group are comparable.
            baseline: Contender that the others are compared with.
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
