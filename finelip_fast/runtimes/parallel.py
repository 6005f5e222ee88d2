"""Batches on a CPU, with their rows distributed over single-threaded runs."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from finelip_fast.errors import EngineError

Graph = Callable[[Tensor], Tensor]

# Share of the threads' time that a split must use; threads within one run use about as much.
_LEAST_BUSY = 0.75

_log = logging.getLogger(__name__)


class RowParallel:
    """A graph that runs one row with all threads, and several rows in parts with one thread each.

    The threads of one run synchronise after each product, where they wait for the slowest; single-threaded runs synchronise
    once, at the end. May be called from several threads at once.

    Args:
        graph: The graph, which runs with ``threads`` threads.
        open_single: Function that opens the graph for single-threaded runs. It is called for the first batch that benefits,
            and costs the memory of another copy of the weights.
        threads: Number of threads.
    """

    def __init__(self, graph: Graph, open_single: Callable[[], Graph], threads: int) -> None:
        self._graph, self._open_single, self._threads = graph, open_single, threads
        self._single: Graph | None = None
        self._opening = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="finelip-rows")

    def __call__(self, batch: Tensor) -> Tensor:
        """Compute the graph's output for a batch of rows.

        Raises:
            EngineError: Raised by the graph.
        """
        if not self._gains(len(batch)):
            return self._graph(batch)
        parts = batch.tensor_split(min(self._threads, len(batch)))
        return torch.cat(list(self._pool.map(self._opened(), parts)))

    def _gains(self, rows: int) -> bool:
        """Whether few enough threads are idle during the last rows for a split to pay off."""
        return rows > 1 and rows / (self._threads * math.ceil(rows / self._threads)) >= _LEAST_BUSY

    def _opened(self) -> Graph:
        with self._opening:
            if self._single is None:
                try:
                    self._single = self._open_single()
                except EngineError as error:  # its files were rebuilt after the graph was opened
                    _log.warning("running each part of a batch with all threads, which is slower: %s", error)
                    self._single = self._graph
            return self._single
