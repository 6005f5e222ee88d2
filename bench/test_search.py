"""End-to-end search, from captions to the ten best pictures, against the reference operations and against research code.

- *scenes*: the bundled model and ``FINELIP_BENCH_SCENES`` (300) pictures of the test scenes, through ``Retriever``.
- *ViT-B-16*: a model of that size with random weights, ``FINELIP_BENCH_ITEMS`` (100,000 on a GPU, else 1,000) random pictures.

Research code encodes all 256 positions, and compares one caption at a time with all pictures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from baselines import exact_scores, one_caption_at_a_time
from contest import Contender, Entries, Result, clock, race
from inputs import DEVICE, ITEMS, ON_GPU, unit_rows
from torch import Tensor

import finelip_fast
from finelip_fast.datasets import Scenes
from finelip_fast.embed import embed_texts
from finelip_fast.encoders import caption_lengths
from finelip_fast.kernels import clim_topk
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import encode_batch

SCENES = int(os.environ.get("FINELIP_BENCH_SCENES", 300))
CAPTIONS, BEST = (1, 32), 10
ROUNDS = 20 if ON_GPU else 5
# Caption embeddings are rounded to half precision, and computed in it on a GPU.
TOLERANCE = 2e-2 if ON_GPU else 2e-3

RESEARCH, REFERENCE = "research way", "reference operations"
CONTENDERS = ("finelip_fast", REFERENCE, RESEARCH)


@dataclass(frozen=True)
class Case:
    """A model, the embeddings of its pictures, and the library's search of them.

    Args:
        images: Embeddings ``[N, L, D]`` on the model's device.
        search: Function from captions to the best scores, ``[Q, BEST]``.
    """

    model: FineLIP
    images: Tensor
    search: Callable[[list[str]], Sequence[Any] | Tensor]
    alpha: float


@cache
def case(name: str) -> Case:
    if name == "scenes":
        retriever = finelip_fast.Retriever()
        scenes = Scenes("test", SCENES, image_size=retriever.engine.config.image_size)
        retriever.add_images((scene.draw() for scene in scenes), progress=False)
        search = lambda captions: [[hit.score for hit in hits] for hits in retriever.search(captions, k=BEST)]  # noqa: E731
        model: Any = retriever.engine
        return Case(model.model, retriever.index.embeddings, search, retriever.alpha)
    torch.manual_seed(0)
    dtype = torch.float16 if ON_GPU else torch.float32
    model = FineLIP(finelip_fast.FineLIPConfig.preset(name)).to(DEVICE, dtype).eval()
    images = unit_rows(ITEMS, dtype=torch.float16, seed=1)

    def search(captions: list[str]) -> Tensor:
        encode = lambda ids: model.encode_text(ids.to(DEVICE))  # noqa: E731
        queries = embed_texts(encode, captions, context_length=model.config.context_length)
        return clim_topk(queries.half(), images, BEST, alpha=model.alpha)[0]

    return Case(model, images, search, model.alpha)


@contextmanager
def reference_operations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINELIP_KERNELS", "reference")
        yield


def entries(name: str, n_captions: int) -> Entries:
    setting, captions = case(name), captions_of(n_captions)
    images = setting.images.to(setting.model.dtype)

    def research_way() -> Tensor:
        aggregate = partial(aggregated, setting.model)
        scores = one_caption_at_a_time(images, features(setting, captions), aggregate=aggregate, alpha=setting.alpha).T
        return scores.topk(BEST).values

    def with_the_reference() -> Sequence[Any] | Tensor:
        with reference_operations():
            return setting.search(captions)

    def contender(run: Callable[[], Any]) -> Contender:
        return Contender(torch.inference_mode()(run), TOLERANCE, answer=torch.as_tensor)

    runs = {"finelip_fast": lambda: setting.search(captions), REFERENCE: with_the_reference, RESEARCH: research_way}
    return {name: partial(contender, run) for name, run in runs.items()}


def captions_of(count: int) -> list[str]:
    return [scene.caption for scene in Scenes("test", count)]


def features(setting: Case, captions: list[str]) -> list[Tensor]:
    """Return the token features of each caption, the end token last."""
    ids = encode_batch(captions).ids.to(setting.images.device)
    return [row[:length] for row, length in zip(setting.model.text(ids), caption_lengths(ids).tolist(), strict=True)]


def aggregated(model: FineLIP, caption: Tensor) -> Tensor:
    return model.text_aggregator(caption[:, :-1], anchor=caption[:, -1])


@cache
def search_race(name: str, n_captions: int) -> dict[str, Result]:
    setting = case(name)
    with torch.inference_mode(), reference_operations():
        captions = features(setting, captions_of(n_captions))
        queries = torch.cat([aggregated(setting.model, caption[None]) for caption in captions])
        images = setting.images.to(setting.model.dtype)
        exact = exact_scores(images, queries, alpha=setting.alpha).T.topk(BEST).values
    return race(entries, name, n_captions, expected=exact, rounds=ROUNDS)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("n_captions", CAPTIONS)
@pytest.mark.parametrize("name", ["scenes", "ViT-B-16"])
def test_search(benchmark: Any, name: str, n_captions: int, contender: str) -> None:
    results = search_race(name, n_captions)
    benchmark.extra_info["pictures"] = len(case(name).images)
    group = f"{n_captions} captions among {len(case(name).images)} pictures, {name}"
    clock.into(benchmark, results, contender, group=group, baseline=RESEARCH)
