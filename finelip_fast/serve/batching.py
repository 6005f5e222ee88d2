"""Process requests from many clients in batches: asyncio in front, threads behind.

The queue belongs to the event loop, which alone forms batches; threads only process them. So nothing needs a lock, a cancelled
or late request leaves the queue at once, and whatever a batch raises is returned as an answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from bisect import insort
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from finelip_fast.errors import FineLIPError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
R = TypeVar("R")

# Seconds after a batch of several requests during which company is worth waiting for.
_COMPANY_SECONDS = 1.0
_LONGEST_RETRY = 60
# Weight of the latest batch in the running mean of the time per item.
_LATEST = 0.2

_log = logging.getLogger(__name__)


class Overloaded(FineLIPError):
    """The queue is full.

    Attributes:
        retry_after: Whole seconds after which there is likely to be room.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(FineLIPError):
    """A request was not answered in time; its waiting items were dropped."""


class Draining(FineLIPError):
    """The server is stopping; it only answers requests that it has already accepted."""


class Observer(Protocol):
    """Observer of batches and queue lengths; called on the event loop."""

    def batch(self, name: str, size: int, waited: float, took: float) -> None:
        """Note that a batch was processed.

        Args:
            name: Name of the stage.
            size: Number of items.
            waited: Seconds from the arrival of its oldest item to the start of processing.
            took: Seconds of processing.
        """

    def queue(self, name: str, length: int) -> None:
        """Note that the number of items waiting for a stage has changed."""


@dataclass(eq=False)
class _Request:
    """Items that were submitted together and are answered together."""

    answer: asyncio.Future[list[Any]]
    deadline: float
    results: list[Any]
    missing: int


@dataclass(order=True)
class _Entry(Generic[K, T]):
    """A waiting item; the smallest comes first."""

    turn: int
    number: int
    key: K = field(compare=False)
    item: T = field(compare=False)
    place: int = field(compare=False)
    request: _Request = field(compare=False)
    arrived: float = field(compare=False)


class Workers:
    """Threads that process batches for one batcher, or for several that share them.

    Args:
        name: Name of the threads.
        count: Number of threads.
        lasting: Whether a thread stays for the next batch. PyTorch keeps a team of threads for each thread that calls it,
            which slows the teams of other callers; a thread that ends takes its team with it.
    """

    def __init__(self, name: str, count: int = 1, *, lasting: bool = True) -> None:
        self.name, self.count, self.idle, self._lasting = name, count, count, lasting
        self._batchers: list[Batcher[Any, Any, Any]] = []
        self._batches: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def join(self, batcher: Batcher[Any, Any, Any]) -> None:
        """Serve another batcher too; waiting batchers are served in the order they joined."""
        self._batchers.append(batcher)

    def start(self) -> None:
        """Start the lasting threads that are not running."""
        while self._lasting and len(self._threads) < self.count:
            self._threads.append(self._started(self._run))

    def _started(self, target: Callable[[], None]) -> threading.Thread:
        # Daemon threads: one that never returns from its batch does not keep the process from exiting.
        thread = threading.Thread(target=target, name=f"finelip-{self.name}", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Stop the threads once they have finished their work."""
        for _ in self._threads:
            self._batches.put(None)
        self._threads = []

    def call(self, function: Callable[[], R]) -> R:
        """Call a function in one of the lasting threads, wait for it, and return its result.

        Raises:
            BaseException: Whatever the function raises.
        """
        result: Future[R] = Future()

        def work() -> None:
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

        self.start()
        self._batches.put(work)
        return result.result()

    def take(self, work: Callable[[], None]) -> None:
        """Give an idle thread some work, which ends by calling :meth:`free` on the event loop."""
        self.idle -= 1
        if self._lasting:
            self.start()
            self._batches.put(work)
        else:
            self._started(work)

    def free(self) -> None:
        """Release a thread, and let the batchers hand out waiting items."""
        self.idle += 1
        for batcher in self._batchers:
            batcher.dispatch()

    def _run(self) -> None:
        while (work := self._batches.get()) is not None:
            work()


class Batcher(Generic[K, T, R]):
    """A queue whose items are processed in batches of one key.

    A free worker takes the oldest item, together with others of the same key. It waits for more only if there is company: a
    batch formed less than a second ago combined several requests. Of a request with many items, only half a batch goes ahead
    of items that others submit meanwhile.

    Args:
        process: Function of a key and items, called in a worker thread. It returns, for each item, its result or the
            exception that the item's request is to raise. If the function raises, the batch is halved until the faulty
            item is alone.
        name: Name of the stage, in messages and for the observer.
        max_batch: Largest number of items processed at once.
        wait: Seconds that an item waits for company, at most.
        capacity: Number of items that may wait. A larger request is accepted while nothing else waits.
        workers: Number of threads, or shared threads, which their owner closes.
        limit: Function from a key to the largest number of its items processed at once, if lower than ``max_batch``.
        observer: Observer of batches and of the queue's length.
    """

    def __init__(
        self,
        process: Callable[[K, Sequence[T]], Sequence[R | Exception]],
        *,
        name: str,
        max_batch: int,
        wait: float,
        capacity: int,
        workers: int | Workers = 1,
        limit: Callable[[K], int] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._process, self.name, self._observer = process, name, observer
        self._max_batch, self._limit = max_batch, limit
        self._wait, self._capacity = wait, capacity
        self._shares = isinstance(workers, Workers)
        self._workers = workers if isinstance(workers, Workers) else Workers(name, workers)
        self._workers.join(self)
        self._waiting: list[_Entry[K, T]] = []  # in order
        self._requests: set[_Request] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._n_batches = self._n_items = 0
        self._company_until = -math.inf
        self._item_seconds: float | None = None
        self._draining = False

    def __len__(self) -> int:
        """Return the number of waiting items."""
        return len(self._waiting)

    async def start(self) -> None:
        """Start the threads; otherwise the first request starts them."""
        self._draining = False
        self._workers.start()

    async def close(self) -> None:
        """Refuse new requests, answer pending ones or let their deadlines pass, and stop the threads."""
        self._draining = True
        if self._requests:
            await asyncio.wait([request.answer for request in self._requests])
        if not self._shares:
            self._workers.close()

    async def submit(self, key: K, items: Sequence[T], *, deadline: float) -> list[R]:
        """Return the results for items of one key; see :meth:`submit_pairs`."""
        return await self.submit_pairs([(key, item) for item in items], deadline=deadline)

    async def submit_pairs(self, pairs: Sequence[tuple[K, T]], *, deadline: float) -> list[R]:
        """Return the results for items, in order.

        Args:
            pairs: Keys and items; all items of a batch share a key. An empty sequence is answered at once.
            deadline: Time, on the event loop's clock, at which the request is abandoned.

        Raises:
            Overloaded: There is no room for the items.
            DeadlineExceeded: The results were not ready in time.
            Draining: The batcher was closed.
            Exception: Whatever processing one of the items raised; the other items are dropped.
        """
        loop = asyncio.get_running_loop()
        if self._draining:
            raise Draining(f"the server is stopping and accepts no more work ({self.name}); try again once it is back")
        if not pairs:
            return []
        if self._waiting and len(self._waiting) + len(pairs) > self._capacity:
            seconds = self._seconds_to_wait()
            raise Overloaded(
                f"expected at most {self._capacity} items in the queue ({self.name}), got {len(pairs)} more where "
                f"{len(self._waiting)} wait; try again in {seconds} s",
                seconds,
            )
        request = _Request(loop.create_future(), deadline, [None] * len(pairs), len(pairs))
        timer = loop.call_at(deadline, self._give_up, request)
        self._requests.add(request)
        try:
            self._enqueue(pairs, request, loop.time())
            self.dispatch()
            return await request.answer
        finally:
            timer.cancel()
            self._requests.discard(request)
            self._forget(request)

    def _seconds_to_wait(self) -> int:
        seconds = len(self._waiting) * (self._item_seconds or 0.0) / self._workers.count
        return min(_LONGEST_RETRY, max(1, math.ceil(seconds)))

    # On the event loop -------------------------------------------------------------------------------------------------

    def _enqueue(self, pairs: Sequence[tuple[K, T]], request: _Request, arrived: float) -> None:
        for place, (key, item) in enumerate(pairs):
            self._n_items += 1
            turn = self._n_batches + place // max(1, self._largest(key) // 2)
            insort(self._waiting, _Entry(turn, self._n_items, key, item, place, request, arrived))
        self._note_length()

    def dispatch(self) -> None:
        """Hand batches to idle workers; called on the event loop."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._workers.idle and self._waiting:
            present = loop.time()
            oldest = self._waiting[0]
            if oldest.request.deadline <= present:
                self._give_up(oldest.request)
                continue
            largest = self._largest(oldest.key)
            batch = [entry for entry in self._waiting if entry.key == oldest.key][:largest]
            ready = min(entry.arrived for entry in batch) + self._wait
            if len(batch) < largest and present < min(ready, self._company_until):
                self._timer = loop.call_at(ready, self.dispatch)
                return
            numbers = {entry.number for entry in batch}
            self._waiting = [entry for entry in self._waiting if entry.number not in numbers]
            self._note_length()
            self._n_batches += 1
            if len({entry.request for entry in batch}) > 1:
                self._company_until = present + _COMPANY_SECONDS
            self._workers.take(partial(self._work, loop, batch, present))

    def _largest(self, key: K) -> int:
        return self._max_batch if self._limit is None else max(1, min(self._max_batch, self._limit(key)))

    def _finish(
        self, batch: list[_Entry[K, T]], outcomes: dict[int, R | BaseException], started: float, took: float
    ) -> None:
        mean = took / len(batch)
        self._item_seconds = mean if self._item_seconds is None else (1 - _LATEST) * self._item_seconds + _LATEST * mean
        for number, entry in enumerate(batch):
            request, outcome = entry.request, outcomes.get(number)
            if request.answer.done():
                continue
            if isinstance(outcome, BaseException):
                request.answer.set_exception(outcome if _can_be_raised(outcome) else _as_exception(outcome))
                self._forget(request)
                continue
            request.results[entry.place] = outcome
            request.missing -= 1
            if not request.missing:
                request.answer.set_result(request.results)
        self._observe("batch", len(batch), started - min(entry.arrived for entry in batch), took)
        self._workers.free()

    def _give_up(self, request: _Request) -> None:
        if not request.answer.done():
            request.answer.set_exception(
                DeadlineExceeded(
                    f"not answered in time ({self.name}, {len(self._waiting)} items wait); send less at once, or try later"
                )
            )
        self._forget(request)

    def _forget(self, request: _Request) -> None:
        """Remove a request's waiting items from the queue."""
        left = [entry for entry in self._waiting if entry.request is not request]
        if len(left) < len(self._waiting):
            self._waiting = left
            self._note_length()

    def _note_length(self) -> None:
        self._observe("queue", len(self._waiting))

    def _observe(self, event: str, *values: float) -> None:
        if self._observer is not None:
            try:
                getattr(self._observer, event)(self.name, *values)
            except Exception:  # an observer must not stop what it observes
                _log.exception("the observer of %s failed", self.name)

    # In a thread -------------------------------------------------------------------------------------------------------

    def _work(self, loop: asyncio.AbstractEventLoop, batch: list[_Entry[K, T]], started: float) -> None:
        before = time.perf_counter()
        outcomes: dict[int, R | BaseException] = {}
        try:
            self._process_all(batch, list(range(len(batch))), outcomes)
        except BaseException as error:
            outcomes = dict.fromkeys(range(len(batch)), error)
        took = time.perf_counter() - before
        with suppress(RuntimeError):  # the loop was closed, so nobody is waiting
            loop.call_soon_threadsafe(self._finish, batch, outcomes, started, took)

    def _process_all(
        self, batch: list[_Entry[K, T]], numbers: list[int], outcomes: dict[int, R | BaseException]
    ) -> None:
        """Process the entries with these numbers; halve them if processing several raises."""
        numbers = [number for number in numbers if not batch[number].request.answer.done()]
        if not numbers:
            return
        try:
            results = self._process(batch[numbers[0]].key, [batch[number].item for number in numbers])
            outcomes.update(zip(numbers, results, strict=True))
        except BaseException as error:
            if len(numbers) == 1:
                outcomes[numbers[0]] = error
                return
            middle = len(numbers) // 2
            self._process_all(batch, numbers[:middle], outcomes)
            self._process_all(batch, numbers[middle:], outcomes)


def _can_be_raised(error: BaseException) -> bool:
    """Return whether a request may raise an error as is; those that end programs, tasks or generators may not."""
    return isinstance(error, Exception) and not isinstance(error, (StopIteration, StopAsyncIteration))


def _as_exception(error: BaseException) -> RuntimeError:
    converted = RuntimeError(f"processing raised {type(error).__name__}: {error}")
    converted.__cause__ = error
    return converted
