"""Work in pieces for as many threads as PyTorch may use, each of which computes alone.

Operations that PyTorch spreads over its threads wait for each other at the end of each. A search that takes a thousand of some
microseconds waits a thousand times, and where other programs use the same cores, each time for their time slice: 30 times as
long were seen. Here the threads meet once, at the end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}  # by their number of threads


def share(work: Callable[[Iterator[T]], None], pieces: Sequence[T]) -> None:
    """Have ``work`` done on all pieces.

    Args:
        work: Called once a thread, with an iterator from which all threads take their next piece. PyTorch's operations in it
            run in that thread alone.
        pieces: Any number of them, in any order.
    """
    count, waiting = min(torch.get_num_threads(), len(pieces)), iter(pieces)
    if count <= 1:
        work(waiting)
        return
    for future in [_pool(torch.get_num_threads()).submit(work, waiting) for _ in range(count)]:
        future.result()


def alone(compute: Callable[[], T]) -> T:
    """What ``compute`` gives, in one thread: for operations that take less time than threads need to wait for each other."""
    count = torch.get_num_threads()
    return compute() if count <= 1 else _pool(count).submit(compute).result()


def _pool(count: int) -> ThreadPoolExecutor:
    with _lock:
        if count not in _pools:
            ready = threading.Barrier(count + 1)

            def begin() -> None:
                torch.get_num_threads()  # a thread takes over PyTorch's number when it is first asked, and must not later
                torch.set_num_threads(1)
                ready.wait()

            _pools[count] = ThreadPoolExecutor(count, "finelip-kernels", begin)
            for _ in range(count):  # a thread starts when none is idle, and none is before all have begun
                _pools[count].submit(int)
            ready.wait()
            torch.set_num_threads(count)  # what a thread says of itself, PyTorch also notes for threads to come
        return _pools[count]


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _pools.clear()  # their threads are not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
