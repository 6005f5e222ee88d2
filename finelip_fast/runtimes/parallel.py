"""Batches on a CPU: their rows shared out among runs of one thread each."""

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

# Share of the threads' time that a split must use; threads within a run use about so much.
_LEAST_BUSY = 0.75

_log = logging.getLogger(__name__)


class RowParallel:
    """A graph that runs one row with all threads, and several rows in parts, each with a thread of its own.

    The threads of one run meet after each product and wait there for the slowest; runs of one thread meet once, at the end.
    May be called from several threads at once.

    Args:
        graph: The graph, which runs with ``threads`` threads.
        open_single: Opens the graph for runs of one thread. It is called at the first batch that gains by it, and costs the
            memory of another copy of the weights.
        threads: Number of threads.
    """

    def __init__(self, graph: Graph, open_single: Callable[[], Graph], threads: int) -> None:
        self._graph, self._open_single, self._threads = graph, open_single, threads
        self._single: Graph | None = None
        self._opening = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="finelip-rows")

    def __call__(self, batch: Tensor) -> Tensor:
        """The graph's output for a batch of rows.

        Raises:
            EngineError: As the graph does.
        """
        if not self._gains(len(batch)):
            return self._graph(batch)
        parts = batch.tensor_split(min(self._threads, len(batch)))
        return torch.cat(list(self._pool.map(self._opened(), parts)))

    def _gains(self, rows: int) -> bool:
        """Whether so few threads are left idle, while the last rows are run, that a split makes up for it."""
        return rows > 1 and rows / (self._threads * math.ceil(rows / self._threads)) >= _LEAST_BUSY

    def _opened(self) -> Graph:
        with self._opening:
            if self._single is None:
                try:
                    self._single = self._open_single()
                except EngineError as error:  # its files were made anew since the graph was opened
                    _log.warning("parts of a batch are run by all threads, which is slower: %s", error)
                    self._single = self._graph
            return self._single
