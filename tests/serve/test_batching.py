"""The server's queue: batches, limits, deadlines, and errors that affect only their own request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from finelip_fast import FineLIPError
from finelip_fast.serve import batching
from finelip_fast.serve.batching import Batcher, DeadlineExceeded, Draining, Overloaded

HANG_SECONDS = 300.0  # after which an event that has not happened never will


class Doubling:
    """Doubles numbers, records its batches, and blocks at a gate while it is shut."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, list[Any]]] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, key: Any, items: Sequence[Any]) -> list[Any]:
        self.batches.append((key, list(items)))
        self.entered.set()
        assert self.gate.wait(HANG_SECONDS)
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return [2 * item if isinstance(item, int) else ValueError(item) for item in items]


def batcher(process: Any, **changes: Any) -> Batcher[Any, Any, Any]:
    return Batcher(process, **({"name": "test", "max_batch": 8, "wait": 0.0, "capacity": 16} | changes))


def soon(seconds: float = HANG_SECONDS) -> float:
    return asyncio.get_running_loop().time() + seconds


async def until(condition: Callable[[], bool]) -> None:
    end = soon()
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it never happened"
        await asyncio.sleep(0.005)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(coroutine, HANG_SECONDS)

    asyncio.run(bounded())


async def behind_a_shut_gate(process: Doubling, queue: Batcher[Any, Any, Any]) -> asyncio.Task[list[Any]]:
    """Submit a request of 0 that is processed until the gate is opened."""
    process.gate.clear()
    first = asyncio.create_task(queue.submit("first", [0], deadline=soon()))
    await until(process.entered.is_set)
    return first


def test_requests_share_a_batch_and_get_their_own_answers() -> None:
    async def scenario() -> None:
        process = Doubling()
        queue = batcher(process)
        first = await behind_a_shut_gate(process, queue)
        tasks = [asyncio.create_task(queue.submit("a", [n, n + 10], deadline=soon())) for n in range(1, 4)]
        await until(lambda: len(queue) == 6)
        process.gate.set()
        assert await first == [0]
        assert await asyncio.gather(*tasks) == [[2, 22], [4, 24], [6, 26]]
        assert process.batches == [("first", [0]), ("a", [1, 11, 2, 12, 3, 13])]
        await queue.close()

    run(scenario())


def test_batches_are_bounded_and_of_one_key_the_oldest_first() -> None:
    async def scenario() -> None:
        process = Doubling()
        queue = batcher(process, max_batch=3, limit=lambda key: 1 if key == "alone" else 99)
        first = await behind_a_shut_gate(process, queue)
        keys = ["a", "alone", "a", "b", "alone", "a", "a"]
        tasks = [asyncio.create_task(queue.submit(key, [n], deadline=soon())) for n, key in enumerate(keys)]
        await until(lambda: len(queue) == len(keys))
        process.gate.set()
        await asyncio.gather(first, *tasks)
        assert process.batches[1:] == [("a", [0, 2, 5]), ("alone", [1]), ("b", [3]), ("alone", [4]), ("a", [6])]
        await queue.close()

    run(scenario())


def test_a_request_of_many_items_lets_others_in_between() -> None:
    async def scenario() -> None:
        process = Doubling()
        queue = batcher(process, max_batch=4)
        first = await behind_a_shut_gate(process, queue)
        large = asyncio.create_task(queue.submit("a", list(range(10)), deadline=soon()))
        await until(lambda: len(queue) == 10)
        single = asyncio.create_task(queue.submit("a", [99], deadline=soon()))
        await until(lambda: len(queue) == 11)
        process.gate.set()
        await asyncio.gather(first, large, single)
        assert process.batches[1:] == [("a", [0, 1, 99, 2]), ("a", [3, 4, 5, 6]), ("a", [7, 8, 9])]
        await queue.close()

    run(scenario())


def test_a_single_client_never_waits_for_company() -> None:
    async def scenario() -> None:
        queue = batcher(Doubling(), wait=3600.0)
        for number in range(5):
            assert await queue.submit("a", [number], deadline=soon()) == [2 * number]
        await queue.close()

    run(scenario())


def test_with_company_an_item_waits_for_others_and_no_longer_than_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_COMPANY_SECONDS", HANG_SECONDS)

    async def in_company(process: Doubling, queue: Batcher[Any, Any, Any]) -> None:
        first = await behind_a_shut_gate(process, queue)
        pair = [asyncio.create_task(queue.submit("a", [n], deadline=soon())) for n in (1, 2)]
        await until(lambda: len(queue) == 2)
        process.gate.set()
        await asyncio.gather(first, *pair)

    async def scenario() -> None:
        process = Doubling()
        queue = batcher(process, max_batch=3, wait=3600.0)
        await in_company(process, queue)
        pair = [asyncio.create_task(queue.submit("a", [n], deadline=soon())) for n in (3, 4)]
        await until(lambda: len(queue) == 2)
        assert await queue.submit("a", [5], deadline=soon()) == [10]  # a full batch does not wait
        await asyncio.gather(*pair)
        assert process.batches[2:] == [("a", [3, 4, 5])]
        await queue.close()

        process = Doubling()
        queue = batcher(process, max_batch=3, wait=0.2)
        await in_company(process, queue)
        assert await queue.submit("a", [6], deadline=soon()) == [12]
        assert process.batches[2:] == [("a", [6])]
        await queue.close()

    run(scenario())


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def scenario() -> None:
        process = Doubling()
        queue = batcher(process, capacity=4)
        first = await behind_a_shut_gate(process, queue)
        waiting_task = asyncio.create_task(queue.submit("a", [1, 2, 3], deadline=soon()))
        await until(lambda: len(queue) == 3)
        with pytest.raises(
            Overloaded, match=r"at most 4 items in the queue \(test\), got 2 more where 3 wait"
        ) as caught:
            await queue.submit("a", [4, 5], deadline=soon())
        assert isinstance(caught.value, FineLIPError)
        assert 1 <= caught.value.retry_after <= 60
        fits = asyncio.create_task(queue.submit("a", [4], deadline=soon()))
        await until(lambda: len(queue) == 4)
        process.gate.set()
        await asyncio.gather(first, waiting_task, fits)
        assert len(await queue.submit("a", list(range(40)), deadline=soon())) == 40  # nothing else is waiting
        await queue.close()

    run(scenario())


def test_what_is_late_is_answered_at_its_deadline_and_never_processed() -> None:
    async def scenario() -> None:
        process = Doubling()
        queue = batcher(process)
        first = await behind_a_shut_gate(process, queue)
        with pytest.raises(DeadlineExceeded, match="not answered in time"):
            await queue.submit("a", [1], deadline=soon(0.05))
        assert len(queue) == 0
        with pytest.raises(DeadlineExceeded):
            await queue.submit("a", [2], deadline=soon(-1))
        process.gate.set()
        assert await first == [0]
        with pytest.raises(DeadlineExceeded):
            await queue.submit("a", [3], deadline=soon(-1))
        assert process.batches == [("first", [0])]
        await queue.close()

    run(scenario())


def test_a_request_that_is_stuck_in_processing_is_given_up_and_the_rest_goes_on() -> None:
    async def scenario() -> None:
        process = Doubling()
        queue = batcher(process)
        process.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await queue.submit("a", [1], deadline=soon(0.05))
        waiting = asyncio.create_task(queue.submit("a", [2], deadline=soon()))
        await until(lambda: len(queue) == 1)
        process.gate.set()
        assert await waiting == [4]
        await queue.close()

    run(scenario())


def test_a_client_that_goes_away_frees_its_place() -> None:
    async def scenario() -> None:
        process = Doubling()
        queue = batcher(process, capacity=2)
        first = await behind_a_shut_gate(process, queue)
        cancelled_task = asyncio.create_task(queue.submit("a", [1, 2], deadline=soon()))
        await until(lambda: len(queue) == 2)
        cancelled_task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled_task
        assert len(queue) == 0
        stays = asyncio.create_task(queue.submit("a", [3, 4], deadline=soon()))
        await until(lambda: len(queue) == 2)
        first.cancel()  # during processing
        process.gate.set()
        assert await stays == [6, 8]
        assert process.batches[1:] == [("a", [3, 4])]
        await queue.close()

    run(scenario())


@pytest.mark.parametrize(
    "fault",
    [
        "text",
        ValueError("bad"),
        SystemExit(3),
        KeyboardInterrupt(),
        StopIteration(1),
        asyncio.CancelledError(),
        MemoryError(),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_an_item_fails_alone_whatever_it_raises(fault: Any) -> None:
    async def scenario() -> None:
        process = Doubling()
        queue = batcher(process)
        first = await behind_a_shut_gate(process, queue)
        items = [1, 2, fault, 4, 5]
        tasks = [asyncio.create_task(queue.submit("a", [item], deadline=soon())) for item in items]
        mixed = asyncio.create_task(queue.submit("a", [6, fault, 7], deadline=soon()))
        await until(lambda: len(queue) == 8)
        process.gate.set()
        answers = await asyncio.gather(first, *tasks, mixed, return_exceptions=True)
        assert [answers[number] for number in (0, 1, 2, 4, 5)] == [[0], [2], [4], [8], [10]]
        for failed in (answers[3], answers[6]):
            assert isinstance(failed, Exception)
            assert not isinstance(failed, (StopIteration, asyncio.CancelledError))
        assert await queue.submit("a", [8], deadline=soon()) == [16]  # the worker is still alive
        await queue.close()

    run(scenario())


@pytest.mark.parametrize("result", [None, [], [1] * 99, 5])
def test_a_process_that_returns_nonsense_hangs_nobody(result: Any) -> None:
    async def scenario() -> None:
        queue = batcher(lambda key, items: result)
        answers = await asyncio.gather(
            *(queue.submit("a", [number, number], deadline=soon()) for number in range(3)), return_exceptions=True
        )
        assert all(isinstance(answer, (TypeError, ValueError)) for answer in answers)
        await queue.close()

    run(scenario())


def test_closing_answers_what_is_queued_and_refuses_the_rest() -> None:
    async def scenario() -> None:
        process = Doubling()
        queue = batcher(process, max_batch=1)
        await queue.start()
        first = await behind_a_shut_gate(process, queue)
        waiting = [asyncio.create_task(queue.submit("a", [n], deadline=soon())) for n in range(3)]
        await until(lambda: len(queue) == 3)
        late = asyncio.create_task(queue.submit("a", [9], deadline=soon(0.1)))
        closing = asyncio.create_task(queue.close())
        await asyncio.sleep(0)
        with pytest.raises(Draining, match="stopping"):
            await queue.submit("a", [4], deadline=soon())
        with pytest.raises(DeadlineExceeded):
            await late
        process.gate.set()
        await closing
        assert await asyncio.gather(first, *waiting) == [[0], [0], [2], [4]]
        await until(lambda: not any(thread.name.startswith("finelip-test") for thread in threading.enumerate()))

    run(scenario())


def test_several_workers_process_side_by_side() -> None:
    async def scenario() -> None:
        barrier = threading.Barrier(3, timeout=HANG_SECONDS)

        def process(key: Any, items: Sequence[int]) -> list[int]:
            barrier.wait()
            return list(items)

        queue = batcher(process, max_batch=1, workers=3)
        assert await queue.submit("a", [1, 2, 3], deadline=soon()) == [1, 2, 3]
        await queue.close()

    run(scenario())


def test_an_observer_is_told_and_cannot_break_the_queue() -> None:
    class Observer:
        def __init__(self) -> None:
            self.sizes: list[int] = []
            self.lengths: list[int] = []

        def batch(self, name: str, size: int, waited: float, took: float) -> None:
            assert name == "test"
            assert waited >= 0
            assert took >= 0
            self.sizes.append(size)
            raise RuntimeError("a fault of the observer")

        def queue(self, name: str, length: int) -> None:
            self.lengths.append(length)

    async def scenario() -> None:
        observer = Observer()
        queue = batcher(Doubling(), observer=observer, max_batch=2)
        assert await queue.submit("a", [1, 2, 3], deadline=soon()) == [2, 4, 6]
        await queue.close()
        assert observer.sizes == [2, 1]
        assert observer.lengths == [3, 1, 0]

    run(scenario())


def test_a_storm_leaves_nothing_behind() -> None:
    """After answers, errors, cancellations and deadlines in any order, the queue is empty and works."""

    async def scenario() -> None:
        def process(key: int, items: Sequence[int]) -> list[int]:
            if 13 in items:
                raise ValueError("thirteen")
            return [item + key for item in items]

        queue: Batcher[int, int, int] = batcher(process, wait=0.001, capacity=64, workers=2)

        async def client(seed: int) -> None:
            for step in range(20):
                key, number = seed % 3, (seed * 7 + step) % 17
                task = asyncio.create_task(
                    queue.submit(key, [number], deadline=soon(0.001 if step % 5 == 0 else HANG_SECONDS))
                )
                if step % 7 == 3:
                    await asyncio.sleep(0)
                    task.cancel()
                try:
                    assert await task == [number + key]
                except (Overloaded, DeadlineExceeded, asyncio.CancelledError):
                    pass
                except ValueError:
                    assert number == 13

        await asyncio.gather(*(client(seed) for seed in range(100)))
        assert len(queue) == 0
        assert await queue.submit(1, [1, 2], deadline=soon()) == [2, 3]
        await queue.close()

    run(scenario())
