"""Work shared out among threads each of which has PyTorch to itself.

Inside an operation PyTorch's threads meet after every step, and where anything else runs on the same processors, each meeting
waits for the thread that does not. Threads that do whole blocks of work meet once, at the end, and one that is held up does
fewer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, Lock
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_starting = Lock()


def side_by_side(function: Callable[[T], R], values: Sequence[T]) -> list[R]:
    """What a function returns for each value, in their order, called by as many threads as PyTorch uses, one thread a call.

    Args:
        function: Function that is called without gradients, in the caller's inference mode or out of it, and asks for no
            threads itself: a call of it from there is one after another.
        values: Values, one more often than there are threads, so that none waits long for the last.

    Raises:
        Exception: The first that the function raises.
    """
    pool, call = _callers_pool(), _in_callers_mode(function)
    return list(map(call, values) if pool is None or len(values) < 2 else pool.map(call, values))


def alone(function: Callable[[], R]) -> R:
    """What a function returns that is called by one thread: its operations take less time than threads take to meet.

    Args:
        function: The same as for :func:`side_by_side`, without a value.

    Raises:
        Exception: Whatever the function raises.
    """
    pool, call = _callers_pool(), _in_callers_mode(lambda _: function())
    return call(None) if pool is None else pool.submit(call, None).result()


def _in_callers_mode(function: Callable[[T], R]) -> Callable[[T], R]:
    """The function, without gradients and in the inference mode of the thread that is here now, wherever it is called."""
    is_inference = torch.is_inference_mode_enabled()

    def call(value: T) -> R:
        with torch.inference_mode(is_inference), torch.no_grad():
            return function(value)

    return call


def _callers_pool() -> ThreadPoolExecutor | None:
    """Threads, as many as PyTorch uses here; None: it uses one, or lets no thread have its own number."""
    threads = torch.get_num_threads()
    if threads == 1 or not _has_threads_of_its_own():
        return None
    with _starting:
        return _pool(threads, os.getpid())


@cache
def _has_threads_of_its_own() -> bool:
    """Whether each thread says how many work for it: OpenMP's do, those of other builds are one number for the process."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads, started; of one process, since a forked one has none of them."""
    pool, started = ThreadPoolExecutor(threads, thread_name_prefix="finelip-block"), Barrier(threads)

    def start(_: int) -> None:
        torch.get_num_threads()  # else the first operation sets the process's number again
        torch.set_num_threads(1)
        started.wait()

    try:
        list(pool.map(start, range(threads)))
    except RuntimeError:  # no more threads can be had, and those that are there would wait for the others
        started.abort()
        raise
    finally:
        torch.set_num_threads(threads)  # the last number set is what threads that are yet to come start with
    return pool


def _after_fork() -> None:
    global _starting
    _starting = Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
