"""Late interaction, all scores and the best of them, against the research loop, plain PyTorch and installed peers.

On a CPU 1,000 images meet 1,000 captions (the research loop a fiftieth of that, scaled up); on a GPU 1, 8 and 64 queries meet
``FINELIP_BENCH_ITEMS`` (100,000) images in float16. Each machine's targets are in its own groups.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from baselines import one_caption_at_a_time, plain_torch
from contest import Contender, Result, clock, compete
from torch import Tensor

from finelip_fast.aggregator import TokenAggregator
from finelip_fast.kernels import clim_scores, clim_topk, clim_topk_int8, quantize, quantize_items

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOKENS, WIDTH, HIDDEN, PATCHES, WORDS = 40, 512, 102, 196, 181
ITEMS = int(os.environ.get("FINELIP_BENCH_ITEMS", 100_000 if ON_GPU else 1_000))
QUERIES = (1, 8, 64) if ON_GPU else (1, min(1_000, ITEMS))
HALF = torch.float16 if ON_GPU else torch.bfloat16
ROUNDS = 20 if ON_GPU else 3
CHECKED = 1_000  # items whose scores are compared with float64's

# What a right answer may be off by: rounding of sums in float32, of scores and sums in half precision, of int8 rows.
EXACT, ROUNDED, QUANTISED = 1e-5, 3e-2, 3e-2

LOOP, PEER = "research loop", "late-interaction-kernels, once a direction"


def rows(count: int, tokens: int = TOKENS, *, seed: int) -> Tensor:
    """Unit rows ``[count, tokens, WIDTH]``, made on the device in parts."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    parts = [
        F.normalize(torch.randn(min(5_000, count - first), tokens, WIDTH, generator=generator, device=DEVICE), dim=-1)
        for first in range(0, count, 5_000)
    ]
    return torch.cat([part.to(HALF) for part in parts])


def exact(queries: Tensor, items: Tensor) -> Tensor:
    """float64 scores ``[Q, n]`` of the first items."""
    some = items[:CHECKED].double()
    return torch.cat([plain_torch(some, part.double(), at_once=4).T for part in queries.split(64)])


def peer(queries: Tensor, items: Tensor, alpha: float = 0.8) -> Tensor:
    """Its sums, which become our score where every maximum is positive, as those of many random rows are."""
    if ON_GPU:
        from late_interaction_kernels import maxsim
    else:
        from late_interaction_kernels.reference import maxsim_reference as maxsim

    over_items = torch.cat([maxsim(queries, some) for some in items.split(50_000)], dim=1) / queries.shape[1]
    over_queries = torch.cat([maxsim(some, queries) for some in items.split(50_000)]).T / items.shape[1]
    cosine = queries[:, 0].float() @ items[:, 0].float().T
    return alpha * cosine + (1 - alpha) * (over_items.float() + over_queries.float())


def first_items(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The whole run; of its answer the part that is checked."""
    return lambda: run()[:, :CHECKED]


@cache
def scores_race(n_queries: int) -> dict[str, Result]:
    queries, items = rows(n_queries, seed=0), rows(ITEMS, seed=1)
    wide_queries, wide_items = queries.float(), items.float()
    few = min(n_queries, 20)
    int8_queries, query_scales = quantize(queries)
    int8_items, item_scales = quantize(items)
    contenders = {
        f"finelip_fast, {HALF}": Contender(lambda: clim_scores(queries, items), EXACT),
        "finelip_fast, torch.float32": Contender(lambda: clim_scores(wide_queries, wide_items), EXACT),
        "finelip_fast, torch.int8": Contender(
            lambda: clim_scores(int8_queries, int8_items, query_scales=query_scales, item_scales=item_scales), QUANTISED
        ),
        f"plain torch, {HALF}": Contender(lambda: plain_torch(items, queries).T, ROUNDED),
        "plain torch, torch.float32": Contender(lambda: plain_torch(wide_items, wide_queries).T, EXACT),
        LOOP: Contender(lambda: one_caption_at_a_time(wide_items, wide_queries[:few]).T, EXACT, few / n_queries),
    }
    if importlib.util.find_spec("late_interaction_kernels"):
        share = few / n_queries
        contenders[PEER] = Contender(lambda: peer(wide_queries[:few], wide_items), EXACT, share)
        contenders[f"{PEER}, {HALF}"] = Contender(lambda: peer(queries[:few], items), ROUNDED, share)
    checked = {name: Contender(first_items(one.run), one.tolerance, one.share) for name, one in contenders.items()}
    return compete(checked, exact(queries, items), rounds=ROUNDS)


@cache
def from_tokens_race() -> dict[str, Result]:
    """1,000 pictures' patches and 1,000 captions' words to all scores: aggregation of both sides included."""
    count = min(1_000, ITEMS)
    patches, words = rows(count, PATCHES, seed=0).float(), rows(count, WORDS, seed=1).float()
    torch.manual_seed(0)
    image_aggregator, text_aggregator = (TokenAggregator(WIDTH, HIDDEN, TOKENS - 1).to(DEVICE) for _ in range(2))

    def embed(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (
            image_aggregator(patches, anchor=patches[:, 0]).to(dtype),
            text_aggregator(words, anchor=words[:, -1]).to(dtype),
        )

    def ours(dtype: torch.dtype) -> Tensor:
        images, texts = embed(dtype)
        return clim_scores(texts, images)

    def loop() -> Tensor:
        images = image_aggregator(patches, anchor=patches[:, 0])
        aggregate = lambda caption: text_aggregator(caption, anchor=caption[:, -1])  # noqa: E731
        return one_caption_at_a_time(images, words[: count // 50], aggregate=aggregate).T

    with torch.no_grad():
        images, texts = embed(torch.float64)
        contenders = {
            f"finelip_fast, {HALF}": Contender(partial(ours, HALF), ROUNDED),
            "finelip_fast, torch.float32": Contender(partial(ours, torch.float32), EXACT),
            LOOP: Contender(loop, EXACT, (count // 50) / count),
        }
        return compete(contenders, exact(texts, images), rounds=ROUNDS)


@cache
def topk_race(n_queries: int) -> dict[str, Result]:
    queries, items = rows(n_queries, seed=0), rows(ITEMS, seed=1)
    quantized = quantize_items(items)
    best = exact(queries, items).topk(10).values if ITEMS <= CHECKED else clim_topk(queries, items, 10)[0].double()
    contenders = {
        "finelip_fast, exact": Contender(lambda: clim_topk(queries, items, 10)[0], EXACT),
        "finelip_fast, exact by int8": Contender(lambda: clim_topk_int8(queries, items, quantized, 10)[0], EXACT),
        "plain torch and topk": Contender(lambda: plain_torch(items, queries).T.float().topk(10).values, ROUNDED),
    }
    return compete(contenders, best, rounds=ROUNDS)


def cases() -> list[Any]:
    names = [f"finelip_fast, {HALF}", "finelip_fast, torch.float32", LOOP]
    scored = [*names, "finelip_fast, torch.int8", f"plain torch, {HALF}", "plain torch, torch.float32"]
    scored += [PEER, f"{PEER}, {HALF}"]
    found = ["finelip_fast, exact", "finelip_fast, exact by int8", "plain torch and topk"]
    return [
        *((f"{count} x {ITEMS} scores", partial(scores_race, count), name) for count in QUERIES for name in scored),
        *(("from tokens", from_tokens_race, name) for name in names),
        *((f"best 10 of {ITEMS} for {count}", partial(topk_race, count), name) for count in QUERIES for name in found),
    ]


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(
    ("group", "race", "contender"), cases(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_late_interaction(benchmark: Any, group: str, race: Callable[[], dict[str, Result]], contender: str) -> None:
    results = race()
    if contender not in results:
        pytest.skip("not installed")
    benchmark.extra_info["tokens"], benchmark.extra_info["width"] = TOKENS, WIDTH
    clock.into(benchmark, results[contender], group)
