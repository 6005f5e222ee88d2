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
    threads, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def call(value: T) -> R:
        with torch.inference_mode(is_inference), torch.no_grad():
            return function(value)

    if threads == 1 or len(values) < 2 or not _has_threads_of_its_own():
        return list(map(call, values))
    with _starting:
        pool = _pool(threads, os.getpid())
    return list(pool.map(call, values))


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

    list(pool.map(start, range(threads)))
    torch.set_num_threads(threads)  # the last number set is what threads that are yet to come start with
    return pool
