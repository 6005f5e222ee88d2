"""Work distributed over threads, each of which runs PyTorch on its own.

Within an operation, PyTorch's threads synchronise after every step. If anything else runs on the same processors, they all
wait at each step for the thread that was held up. Threads that process whole blocks synchronise once, at the end, and a
thread that is held up processes fewer blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, Lock
from typing import TypeVar

import torch

# Multiplications, about a millisecond for one thread, below which work is not worth waking another.
LEAST_SHARED_WORK = 1 << 23

T = TypeVar("T")
R = TypeVar("R")

_starting = Lock()


def side_by_side(function: Callable[[T], R], values: Sequence[T]) -> list[R]:
    """Map a function over values, in order, on as many threads as PyTorch uses, with one thread per call.

    Args:
        function: Function to call, without gradients and with inference mode on or off as in the caller. It gets no threads
            of its own: :func:`side_by_side` called from it runs sequentially.
        values: Values to call it with; more than there are threads, so that no thread waits long for the last one.

    Raises:
        Exception: The first exception that the function raises.
    """
    pool, call = _callers_pool(), _in_callers_mode(function)
    return list(map(call, values) if pool is None or len(values) < 2 else pool.map(call, values))


def size_of_blocks(total: int, largest: int) -> int:
    """Size of blocks, from 1 to ``largest``, that divides a total evenly among the threads, or leaves it undivided."""
    count = -(-total // largest)
    if count > 1:
        threads = torch.get_num_threads()
        count = -(-count // threads) * threads
    return max(1, -(-total // max(1, count)))


def alone(function: Callable[[], R]) -> R:
    """Call a function on a single thread, because its operations take less time than threads take to synchronise.

    Args:
        function: Function as for :func:`side_by_side`, but without an argument.

    Raises:
        Exception: Any exception that the function raises.
    """
    pool, call = _callers_pool(), _in_callers_mode(lambda _: function())
    return call(None) if pool is None else pool.submit(call, None).result()


def _in_callers_mode(function: Callable[[T], R]) -> Callable[[T], R]:
    """Wrap a function to run without gradients and in the current thread's inference mode, on any thread."""
    is_inference = torch.is_inference_mode_enabled()

    def call(value: T) -> R:
        with torch.inference_mode(is_inference), torch.no_grad():
            return function(value)

    return call


def _callers_pool() -> ThreadPoolExecutor | None:
    """Pool of as many threads as PyTorch uses here; None if it uses one, or cannot set a count per thread."""
    threads = torch.get_num_threads()
    if threads == 1 or not _has_threads_of_its_own():
        return None
    with _starting:
        return _pool(threads, os.getpid())


@cache
def _has_threads_of_its_own() -> bool:
    """Whether each thread has its own thread count, as with OpenMP; other builds have a single count for the process."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Pool of started threads, one pool per process, because a forked process does not inherit the threads."""
    pool, started = ThreadPoolExecutor(threads, thread_name_prefix="finelip-block"), Barrier(threads)

    def start(_: int) -> None:
        torch.get_num_threads()  # otherwise the first operation restores the process's count
        torch.set_num_threads(1)
        started.wait()

    try:
        list(pool.map(start, range(threads)))
    except RuntimeError:  # no more threads can be started, and the existing ones would wait for them
        started.abort()
        raise
    finally:
        torch.set_num_threads(threads)  # new threads start with the count that was set last
    return pool


def _after_fork() -> None:
    global _starting
    _starting = Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
