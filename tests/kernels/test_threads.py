"""Work that threads share: each piece once, each thread alone, errors told."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from finelip_fast.kernels import threads


@pytest.fixture(params=[1, 3])
def count(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_each_piece_is_worked_on_once_by_threads_that_compute_alone(count: int) -> None:
    done: list[int] = []
    alone: set[int] = set()

    def work(pieces: Iterator[int]) -> None:
        for piece in pieces:
            done.append(piece)
            alone.add(torch.get_num_threads())

    threads.share(work, range(50))
    assert sorted(done) == list(range(50))
    assert alone == {1}
    assert torch.get_num_threads() == count


def test_threads_to_come_compute_with_all(count: int) -> None:
    threads.share(lambda pieces: [*pieces] and None, range(5))
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [count]


def test_an_error_of_a_thread_is_that_of_the_call(count: int) -> None:
    def work(pieces: Iterator[int]) -> None:
        for piece in pieces:
            if piece == 7:
                raise ValueError("the seventh")

    with pytest.raises(ValueError, match="the seventh"):
        threads.share(work, range(20))


def test_a_thread_computes_alone(count: int) -> None:
    assert threads.alone(torch.get_num_threads) == 1
    with pytest.raises(ZeroDivisionError):
        threads.alone(lambda: 1 // 0)


def test_nothing_is_nothing(count: int) -> None:
    threads.share(lambda pieces: [*pieces] and None, [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_threads_of_its_own() -> None:
    def total() -> int:
        done: list[int] = []
        threads.share(lambda pieces: done.extend(pieces), range(20))
        return sum(done)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert total() == 190
        child = os.fork()
        if child == 0:
            os._exit(0 if total() == 190 else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
