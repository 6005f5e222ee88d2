"""Ray processes on this machine: bulk indexing against one process, shards against one index, and recovery of a shard.

*Bulk* indexes ``FINELIP_BENCH_BULK`` (4,000) pictures of Scenes with the bundled model on two workers; its time includes
starting Ray and the workers. *Shards* are two of 10,000 random items of the bundled model's size, 13 x 128.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contest import Result, clock
from torch import Tensor

from finelip_fast import Retriever
from finelip_fast.datasets import Scenes
from finelip_fast.distributed import Shards, index_images
from finelip_fast.index import Index, IndexSpec

PICTURES = int(os.environ.get("FINELIP_BENCH_BULK", 4_000))
ITEMS, QUERIES, KILLS = 10_000, 100, 3
SPEC = IndexSpec("bench", 13, 128)

ONE, BULK, SHARDS = "one process", "two workers", "two shards"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ray", reason="not installed")
    return tmp_path_factory.mktemp("distributed")


@cache
def indexed(folder: Path) -> dict[str, Result]:
    (folder / "pictures").mkdir()
    for scene in Scenes("train", PICTURES, image_size=256):
        scene.draw().save(folder / "pictures" / f"{scene.id}.png")
    retriever = Retriever(engine="torch", index=folder / "by one")
    start = time.perf_counter()
    retriever.add_images(folder / "pictures", progress=False)
    by_one = time.perf_counter() - start
    start = time.perf_counter()
    index_images(folder / "pictures", folder / "by two", engine="torch", workers=2, progress=False)
    by_two = time.perf_counter() - start
    with closing(Index(retriever.index.spec, folder / "by two")) as index:
        is_same = index.ids == retriever.index.ids and index.check() == {}
    two = Result([by_two], {"items_per_second": PICTURES / by_two}) if is_same else Result(refusal="other items")
    return {ONE: Result([by_one], {"items_per_second": PICTURES / by_one}), BULK: two}


def rows(count: int, seed: int) -> Tensor:
    values = torch.randn(count, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(values, dim=-1)


@cache
def searched(folder: Path) -> dict[str, dict[str, Result]]:
    """Return results by mode, and the time from a kill until the answers were complete again."""
    names = [str(folder / name) for name in ("a", "b")]
    single = Index(SPEC, folder / "whole")
    for seed, name in enumerate(names):
        ids, values = [f"{seed}-{number}" for number in range(ITEMS)], rows(ITEMS, seed)
        with closing(Index(SPEC, name)) as part:
            for index in (part, single):
                index.add(ids, values, [{}] * ITEMS)
    queries = rows(QUERIES, 9)
    with Shards(names, partial="mark") as shards:
        results = {}
        for mode in ("exact", "two-stage"):
            expected = single.search(queries, 10, mode="exact").scores
            results[mode] = {
                name: _timed(
                    lambda query, target=target, mode=mode: target.search(query, 10, mode=mode).scores,
                    queries,
                    expected,
                )
                for name, target in ((ONE, single), (SHARDS, shards))
            }
        results["kill"] = {SHARDS: Result([_until_whole(shards, queries[:1]) for _ in range(KILLS)])}
    single.close()
    return results


def _timed(search: Callable[[Tensor], Tensor], queries: Tensor, expected: Tensor) -> Result:
    search(queries[:1])
    result, scores = Result(), []
    for query in queries.split(1):
        start = time.perf_counter()
        scores.append(search(query))
        result.seconds.append(time.perf_counter() - start)
    low, middle, high = np.quantile(result.seconds, [0.2, 0.5, 0.8]).tolist()
    result.info = {"p20": low, "p50": middle, "p80": high}
    result.info["agreement"] = (torch.cat(scores) == expected).float().mean().item()
    return result


def _until_whole(shards: Shards, query: Tensor) -> float:
    """Return the seconds from a ``kill -9`` of a shard until all items are searched again."""
    process = shards._ray.get(shards._shards[1].server.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(process, signal.SIGKILL)
    start = time.perf_counter()
    shards.search(query, 10)
    while shards.search(query, 10).covered < 1:
        time.sleep(0.02)
    return time.perf_counter() - start


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", [ONE, BULK])
def test_bulk(benchmark: Any, folder: Path, contender: str) -> None:
    clock.into(benchmark, indexed(folder), contender, group=f"index {PICTURES:,} pictures", baseline=ONE)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("mode", ["exact", "two-stage"])
@pytest.mark.parametrize("contender", [ONE, SHARDS])
def test_shards(benchmark: Any, folder: Path, mode: str, contender: str) -> None:
    group = f"best 10 of 2 x {ITEMS:,} items, {mode}"
    clock.into(benchmark, searched(folder)[mode], contender, group=group, baseline=ONE)


@pytest.mark.benchmark(timer=clock)
def test_return(benchmark: Any, folder: Path) -> None:
    group = "whole again after kill -9 of a shard"
    clock.into(benchmark, searched(folder)["kill"], SHARDS, group=group, baseline=SHARDS)
