"""Encoding and searching for many concurrent requests: the answers equal the library's, regardless of other requests."""

from __future__ import annotations

import asyncio
import io
import threading
import warnings
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from finelip_fast import Hits, ImageError, InputError, Retriever
from finelip_fast.datasets import Scenes
from finelip_fast.serve.batching import Overloaded
from finelip_fast.serve.collection import Found
from finelip_fast.serve.index_collection import IndexCollection
from finelip_fast.serve.pipeline import Pipeline
from finelip_fast.serve.settings import Limits, ServeSettings

ITEMS = 12
LONG = "a red house beside a tall tree and a blue car " * 40


class Holdings(IndexCollection):
    """A retriever's items, with a shard reported missing; records sizes of searches; blocks while its gate is shut."""

    def __init__(self, retriever: Retriever) -> None:
        super().__init__(retriever)
        self.searches: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def search(self, queries: Tensor, k: int, **options: Any) -> Found:
        self.searches.append((len(queries), k))
        assert self.gate.wait(10)
        hits = super().search(queries, k, **options).hits
        return Found(hits, 0.5, {"other": "gone"})


@pytest.fixture(scope="module")
def retriever() -> Retriever:
    retriever = Retriever(engine="torch", device="cpu")
    scenes = list(Scenes("test", ITEMS, image_size=64))
    retriever.add_images(
        [scene.draw() for scene in scenes], metadata=[{"number": n} for n in range(ITEMS)], progress=False
    )
    return retriever


@pytest.fixture
def holdings(retriever: Retriever) -> Holdings:
    return Holdings(retriever)


def with_pipeline(
    holdings: Holdings, scenario: Callable[[Pipeline, float], Coroutine[Any, Any, None]], **settings: Any
) -> None:
    async def bounded() -> None:
        pipeline = Pipeline(holdings, ServeSettings(**settings))
        await pipeline.start()
        await asyncio.wait_for(scenario(pipeline, asyncio.get_running_loop().time() + 30), 60)
        await pipeline.close()

    asyncio.run(bounded())


def file(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_texts_of_all_lengths_are_embedded_as_the_library_does(holdings: Holdings) -> None:
    texts = ["", "a house", LONG, "a tree left of a red house. " * 5, "a house", "Ein Haus & ein Baum €"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = holdings.engine.embed_texts(texts)

    async def scenario(pipeline: Pipeline, deadline: float) -> None:
        answers = await asyncio.gather(
            pipeline.embed_texts(texts, deadline=deadline),
            *(pipeline.embed_texts([text], deadline=deadline) for text in texts),
        )
        for embedded in (answers[0], [answer[0] for answer in answers[1:]]):
            torch.testing.assert_close(torch.stack([text.embedding for text in embedded]), expected, atol=1e-5, rtol=0)
        context = holdings.engine.config.context_length
        assert [text.tokens - text.tokens_cut for text in answers[0]][:3] == [2, 4, context]
        assert answers[0][2].tokens == 2 + 40 * 11
        assert answers[0][1].tokens_cut == 0

    with_pipeline(holdings, scenario)


def test_a_text_that_comes_again_is_not_encoded_again(holdings: Holdings, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    encode = holdings.engine.encode_text
    monkeypatch.setattr(holdings.engine, "encode_text", lambda ids: batches.append(len(ids)) or encode(ids))

    async def scenario(pipeline: Pipeline, deadline: float) -> None:
        await pipeline.embed_texts(["a house", "a tree"], deadline=deadline)
        await pipeline.embed_texts(["a tree", "a car", "a tree"], deadline=deadline)
        assert sum(batches) == 3
        await pipeline.embed_texts(["a tree"], deadline=deadline, recent=False)
        assert sum(batches) == 4
        for number in range(300):
            await pipeline.embed_texts([f"house {number}"], deadline=deadline)
        await pipeline.embed_texts(["a tree"], deadline=deadline)
        assert sum(batches) == 305  # the cache is bounded

    with_pipeline(holdings, scenario)


def test_short_texts_are_not_padded_to_long_ones(holdings: Holdings, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    encode = holdings.engine.encode_text
    monkeypatch.setattr(holdings.engine, "encode_text", lambda ids: shapes.append(tuple(ids.shape)) or encode(ids))

    async def scenario(pipeline: Pipeline, deadline: float) -> None:
        await pipeline.embed_texts([LONG, *(f"house {number}" for number in range(6))], deadline=deadline)
        assert sorted(shapes) == [(1, holdings.engine.config.context_length), (6, 4)]

    with_pipeline(holdings, scenario)


def test_pictures_are_embedded_as_the_library_does(holdings: Holdings) -> None:
    pictures = [Image.new("RGB", (90, 70), colour) for colour in ("red", "blue", "green")]
    expected = holdings.engine.embed_images(pictures)

    async def scenario(pipeline: Pipeline, deadline: float) -> None:
        embedded = await pipeline.embed_images([file(picture) for picture in pictures], deadline=deadline)
        torch.testing.assert_close(torch.stack(embedded), expected, atol=1e-5, rtol=0)

    with_pipeline(holdings, scenario)


def test_a_broken_picture_fails_alone_and_is_named(holdings: Holdings) -> None:
    sound = file(Image.new("RGB", (80, 80), "red"))
    bomb = file(Image.new("L", (300, 200)))
    requests = [[sound], [b""], [sound[:60]], [sound, bomb], [b"no picture"], [file(Image.new("RGB", (1, 1)))], [sound]]

    async def scenario(pipeline: Pipeline, deadline: float) -> None:
        answers = await asyncio.gather(
            *(pipeline.embed_images(images, deadline=deadline) for images in requests), return_exceptions=True
        )
        for number, answer in enumerate(answers):
            assert isinstance(answer, ImageError) == (number in (1, 2, 3, 4)), answer
        assert "picture 2 of 2: " in str(answers[3])
        assert "at most 10,000 pixels, got 300 x 200" in str(answers[3])
        assert "picture" not in str(answers[2])
        torch.testing.assert_close(answers[0][0], answers[6][0])

    with_pipeline(holdings, scenario, limits=Limits(pixels=10_000))


async def waiting(pipeline: Any, stage: str, count: int) -> None:
    for _ in range(2000):
        if len(getattr(pipeline, f"_{stage}")) == count:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"{len(getattr(pipeline, f'_{stage}'))} wait, not {count}")


def test_searches_are_batched_and_answered_as_if_alone(holdings: Holdings) -> None:
    captions = [scene.caption for scene in Scenes("test", 4)]

    async def scenario(pipeline: Pipeline, deadline: float) -> None:
        queries = [text.embedding for text in await pipeline.embed_texts(captions, deadline=deadline)]
        holdings.gate.clear()
        first = asyncio.create_task(pipeline.search(queries[:1], 3, deadline=deadline))
        await waiting(pipeline, "search", 0)
        tasks = [
            asyncio.create_task(pipeline.search([query], k, deadline=deadline))
            for query, k in zip(queries, (2, 5, 10, 9), strict=True)
        ]
        tasks.append(asyncio.create_task(pipeline.search(queries[:2], 4, where="number < 2", deadline=deadline)))
        tasks.append(asyncio.create_task(pipeline.search(queries[:1], 4, alpha=1.0, deadline=deadline)))
        await waiting(pipeline, "search", 7)
        holdings.gate.set()
        answers = await asyncio.gather(first, *tasks)
        assert holdings.searches == [(1, 10), (4, 10), (2, 10), (1, 10)]
        for answer, query, k in zip(answers[1:5], queries, (2, 5, 10, 9), strict=True):
            alone = holdings.search(query[None], k, mode="auto", where=None, alpha=holdings.alpha)
            assert [hit.id for hit in answer.hits[0]] == [hit.id for hit in alone.hits[0]]
            assert isinstance(answer.hits[0], Hits)
            assert (answer.covered, answer.missing) == (0.5, {"other": "gone"})
        assert [len(hits) for hits in answers[5].hits] == [2, 2]

    with_pipeline(holdings, scenario)


def test_a_query_that_is_refused_fails_alone(holdings: Holdings) -> None:
    async def scenario(pipeline: Pipeline, deadline: float) -> None:
        (text,) = await pipeline.embed_texts(["a house"], deadline=deadline)
        holdings.gate.clear()
        first = asyncio.create_task(pipeline.search([text.embedding], 3, deadline=deadline))
        await waiting(pipeline, "search", 0)
        queries = [text.embedding, text.embedding * float("nan"), text.embedding]
        tasks = [asyncio.create_task(pipeline.search([query], 3, deadline=deadline)) for query in queries]
        tasks.append(asyncio.create_task(pipeline.search([text.embedding], 3, where="number <", deadline=deadline)))
        await waiting(pipeline, "search", 4)
        holdings.gate.set()
        answers = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [isinstance(answer, InputError) for answer in answers] == [False, False, True, False, True]

    with_pipeline(holdings, scenario)


def test_a_full_stage_refuses(holdings: Holdings) -> None:
    async def scenario(pipeline: Pipeline, deadline: float) -> None:
        (text,) = await pipeline.embed_texts(["a house"], deadline=deadline)
        holdings.gate.clear()
        tasks = [asyncio.create_task(pipeline.search([text.embedding], 3, deadline=deadline)) for _ in range(8)]
        refused = [task for task in await _finished(tasks) if isinstance(task.exception(), Overloaded)]
        assert len(refused) == 3
        holdings.gate.set()
        await asyncio.gather(*(task for task in tasks if task not in refused))

    with_pipeline(holdings, scenario, queue=4)


async def _finished(tasks: Sequence[asyncio.Task[Any]]) -> list[asyncio.Task[Any]]:
    await asyncio.sleep(0.1)
    return [task for task in tasks if task.done()]


def test_anything_else_runs_in_a_thread(holdings: Holdings) -> None:
    async def scenario(pipeline: Pipeline, deadline: float) -> None:
        assert await pipeline.run(divmod, 7, 2, deadline=deadline) == (3, 1)
        assert await pipeline.run(threading.current_thread, deadline=deadline) is not threading.current_thread()
        with pytest.raises(ZeroDivisionError):
            await pipeline.run(divmod, 7, 0, deadline=deadline)

    with_pipeline(holdings, scenario)
