"""Work distributed over threads: results in order, one PyTorch thread each, and the caller's state preserved."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from finelip_fast.kernels import threads as kernel_threads
from finelip_fast.kernels.threads import alone, side_by_side, size_of_blocks


@pytest.fixture(params=[1, 2, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order() -> None:
    assert side_by_side(lambda value: value * value, range(50)) == [value * value for value in range(50)]
    assert side_by_side(str, []) == []


def test_each_thread_has_pytorch_to_itself_and_the_caller_keeps_its_threads(threads: int) -> None:
    inside = side_by_side(lambda _: (torch.ones(8).sum(), torch.get_num_threads())[1], range(8))
    assert set(inside) == {1}
    assert torch.get_num_threads() == threads
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads]


def test_they_work_at_the_same_time(threads: int) -> None:
    together = threading.Barrier(threads, timeout=300)
    side_by_side(lambda _: together.wait(), range(threads))


def test_what_it_raises_is_raised() -> None:
    def failing(value: int) -> int:
        if value == 3:
            raise ValueError("three")
        return value

    with pytest.raises(ValueError, match="three"):
        side_by_side(failing, range(6))
    assert side_by_side(lambda value: value, range(6)) == list(range(6))


def test_a_call_from_inside_is_one_after_another() -> None:
    def nested(value: int) -> list[int]:
        return side_by_side(lambda inner: value + inner, range(3))

    assert side_by_side(nested, range(4)) == [[value, value + 1, value + 2] for value in range(4)]


def test_one_thread_computes_alone() -> None:
    assert alone(lambda: (torch.ones(8).sum(), torch.get_num_threads())[1]) == 1
    with torch.inference_mode():
        assert alone(lambda: torch.ones(2)).is_inference()
    with pytest.raises(ZeroDivisionError):
        alone(lambda: 1 // 0)


def test_where_threads_cannot_be_had_none_is_left_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    kernel_threads._pool.cache_clear()
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", starting)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                side_by_side(str, range(9))
        assert torch.get_num_threads() == 5
        assert side_by_side(str, range(9)) == [*"012345678"]
    finally:
        torch.set_num_threads(before)
    gc.collect()
    for thread in started:
        thread.join(timeout=300)
        assert not thread.is_alive()


def test_the_callers_inference_mode_holds_and_gradients_do_not() -> None:
    with torch.inference_mode():
        results = side_by_side(lambda value: torch.ones(2).mul_(value), range(4))
        assert all(result.is_inference() for result in results)
        results[0].add_(1)
    weight = torch.ones(2, requires_grad=True)
    assert not any(result.requires_grad for result in side_by_side(lambda value: weight * value, range(4)))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_process_goes_on(threads: int) -> None:
    program = f"""
import os, torch
from finelip_fast.kernels.threads import side_by_side
torch.set_num_threads({threads})
side_by_side(lambda value: value, range(4))
if (child := os.fork()) == 0:
    assert side_by_side(lambda value: value + 1, range(4)) == [1, 2, 3, 4]
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=300)


@pytest.mark.parametrize(("total", "largest"), [(0, 5), (5, 5), (6, 5), (3_200, 630), (20_000, 630), (7, 1)])
def test_blocks_are_small_enough_and_divide_the_work_evenly(threads: int, total: int, largest: int) -> None:
    size = size_of_blocks(total, largest)
    assert 1 <= size <= largest
    blocks_of_a_thread = -(-len(range(0, total, size)) // threads)
    assert total <= largest or blocks_of_a_thread * size < total / threads + blocks_of_a_thread
