"""Pictures and descriptions of Scenes, embedded by the bundled model, and the exact scores for every description.

Pictures are drawn and encoded a thousand at a time, and their embeddings are cached in a folder: larger races only add to it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from baselines import plain_block
from ring_contenders import BOTH_WAYS, ONE_WAY
from torch import Tensor

from finelip_fast import Retriever
from finelip_fast.datasets import Scenes

AT_ONCE, PRACTICE = 1_000, 30
_IN_FLOAT64 = 200  # number of items at once
_MIXED_IN, _MIXED_AT_ONCE = 0.3, 10_000

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Inputs:
    """Items to search, and the descriptions to search with.

    Args:
        items: File of float16 ``[N, L, D]``.
        queries, practice: Descriptions that are raced, and those for tuning knobs, float32 ``[Q, L, D]``.
        exact, practice_exact: Scores of each, float64 ``[Q, N]``, by question.
        alpha: Weight of the global cosine in scores both ways.
    """

    items: Path
    queries: Array
    practice: Array
    exact: dict[str, Tensor]
    practice_exact: dict[str, Tensor]
    alpha: float


def scenes(folder: Path, count: int, queries: int, *, alpha: float | None = None, drawn: int | None = None) -> Inputs:
    """Return pictures of Scenes, and the descriptions of some of them.

    Args:
        folder: Folder where embeddings are cached.
        count: Number of items, in whole thousands.
        queries: Number of descriptions.
        alpha: Weight of the global cosine; None: the model's.
        drawn: Number of pictures, in whole thousands; None: all of ``count``. Further items are :func:`mixed`.
    """
    engine = Retriever(engine="torch", device="cpu").engine
    cache = folder / f"scenes-{engine.fingerprint[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    drawn = count if drawn is None else min(drawn, count)
    items = cache / f"items-{count}-{drawn}.npy"
    if not items.exists():
        save(items, mixed(_drawn(cache, drawn), count))
    world = Scenes("train", drawn)
    numbers = np.random.default_rng(0).permutation(np.linspace(0, drawn - 1, queries + PRACTICE).astype(int))
    captions = engine.embed_texts([world[number].caption for number in numbers.tolist()]).float()
    alpha = engine.alpha if alpha is None else alpha
    exact = exact_scores(captions, torch.from_numpy(np.load(items)), alpha)
    return Inputs(
        items,
        captions[:queries].numpy(),
        captions[queries:].numpy(),
        {question: scores[:queries] for question, scores in exact.items()},
        {question: scores[queries:] for question, scores in exact.items()},
        alpha,
    )


def mixed(items: Array, count: int) -> Array:
    """Extend the items to ``count``: each added item is a drawn one with its rows moved by 30 % toward those of another.

    Added items lie in the same region as drawn ones, but closer together: more rivals for every place among the best.
    """
    rounds, rows = np.divmod(np.arange(len(items), count), len(items))
    partners = (rows + 7_919 * rounds) % len(items)
    further = np.empty((len(rows), *items.shape[1:]), items.dtype)
    for first in range(0, len(rows), _MIXED_AT_ONCE):
        part = slice(first, first + _MIXED_AT_ONCE)
        moved = (1 - _MIXED_IN) * items[rows[part]].astype(np.float32) + _MIXED_IN * items[partners[part]]
        further[part] = moved / np.linalg.norm(moved, axis=2, keepdims=True)
    return np.concatenate([items, further])


def exact_scores(queries: Tensor, items: Tensor, alpha: float) -> dict[str, Tensor]:
    """Return scores ``[Q, N]`` by question, in float64."""
    captions, width = queries.double(), queries.shape[2]
    both_ways, one_way = [], []
    for part in items.split(_IN_FLOAT64):
        block = part.double()
        both_ways.append(plain_block(block, captions, alpha).T)
        similarity = captions.reshape(-1, width) @ block.reshape(-1, width).T
        one_way.append(similarity.view(*captions.shape[:2], *part.shape[:2]).amax(dim=3).sum(dim=1))
    return {BOTH_WAYS: torch.cat(both_ways, dim=1), ONE_WAY: torch.cat(one_way, dim=1)}


def agreement(hits: Sequence[Sequence[int]], exact: Tensor, k: int) -> float:
    """Return the mean share of the exact ``k`` best among the first ``k`` hits of each query.

    Ties are equally good: a hit counts if its score reaches the ``k``-th best. Repeated hits count once.

    Args:
        hits: Item numbers for the first queries, or for all of them.
        exact: Scores ``[Q, N]``.
    """
    k = min(k, exact.shape[1])
    least = exact.topk(k).values[:, -1] - 1e-12
    right = [
        int((scores[sorted(set(numbers[:k]))] >= limit).sum())
        for numbers, scores, limit in zip(hits, exact, least, strict=False)
    ]
    return sum(right) / (k * len(hits))


def save(path: Path, array: Array) -> None:
    """Write the file atomically."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    with unfinished.open("wb") as file:
        np.save(file, array)
    unfinished.replace(path)


def _drawn(cache: Path, count: int) -> Array:
    """Return embeddings of the first pictures; those not in the cache are drawn and encoded on all processors."""
    paths = {first: cache / f"{first:08}.npy" for first in range(0, count, AT_ONCE)}
    missing = {first: path for first, path in paths.items() if not path.exists()}
    if missing:
        with ProcessPoolExecutor(
            mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            for number, _ in enumerate(pool.map(_embed, missing, missing.values()), start=1):
                print(f"drawn and encoded: {number * AT_ONCE:,} of {len(missing) * AT_ONCE:,}", flush=True)
    return np.concatenate([np.load(path) for path in paths.values()])


def _embed(first: int, path: Path) -> None:
    engine = Retriever(engine="torch", device="cpu").engine
    world = Scenes("train", first + AT_ONCE, image_size=engine.config.image_size)
    pictures = (world[number].draw() for number in range(first, first + AT_ONCE))
    save(path, engine.embed_images(pictures).half().numpy())
