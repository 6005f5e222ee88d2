"""Batches distributed over threads: the same rows in the same order, for any number of rows and threads."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from finelip_fast.errors import EngineError
from finelip_fast.runtimes.parallel import RowParallel


class Doubling:
    """A graph that records how many rows it gets at once."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, batch: Tensor) -> Tensor:
        self.sizes.append(len(batch))
        return 2 * batch


@given(rows=st.integers(0, 40), threads=st.integers(2, 9))
def test_rows_come_out_in_order_and_no_thread_idles_for_long(rows: int, threads: int) -> None:
    threaded, single = Doubling(), Doubling()
    batch = torch.arange(3.0 * rows).reshape(rows, 3)
    assert torch.equal(RowParallel(threaded, lambda: single, threads)(batch), 2 * batch)
    if single.sizes:
        assert not threaded.sizes
        assert rows / (threads * max(single.sizes)) >= 0.75
        assert min(single.sizes) > 0
    else:
        assert threaded.sizes == [rows]


def test_one_row_is_run_by_all_threads_and_opens_nothing() -> None:
    def open_single() -> Doubling:
        raise AssertionError("nothing needs it")

    assert RowParallel(Doubling(), open_single, 2)(torch.ones(1, 2)).tolist() == [[2, 2]]


def test_parts_run_at_the_same_time() -> None:
    together = threading.Barrier(2, timeout=300)

    def meeting(batch: Tensor) -> Tensor:
        together.wait()
        return batch

    assert len(RowParallel(meeting, lambda: meeting, 2)(torch.ones(4, 2))) == 4


def test_what_runs_on_one_thread_is_opened_once_by_many_callers() -> None:
    opened: list[Doubling] = []

    def open_single() -> Doubling:
        opened.append(Doubling())
        return opened[0]

    graph = RowParallel(Doubling(), open_single, 2)
    batches = [torch.full((n + 2, 2), float(n)) for n in range(20)]
    with ThreadPoolExecutor(4) as pool:
        for batch, doubled in zip(batches, pool.map(graph, batches), strict=True):
            assert torch.equal(doubled, 2 * batch)
    assert len(opened) == 1


def test_where_it_cannot_be_opened_again_it_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def open_single() -> Doubling:
        raise EngineError("text.onnx is another file")

    threaded = Doubling()
    graph = RowParallel(threaded, open_single, 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(graph(torch.ones(4, 2)), torch.full((4, 2), 2.0))
    assert caplog.messages == [
        "running each part of a batch with all threads, which is slower: text.onnx is another file"
    ]


def test_what_a_part_raises_is_raised() -> None:
    def failing(batch: Tensor) -> Tensor:
        raise EngineError("ONNX Runtime failed")

    with pytest.raises(EngineError, match="ONNX Runtime failed"):
        RowParallel(Doubling(), lambda: failing, 2)(torch.ones(2, 2))
