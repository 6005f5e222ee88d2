"""Late interaction, all scores and the best of them, against the research loop, plain PyTorch and installed peers.

On a CPU 1,000 images meet 1,000 captions (the research loop a fiftieth of that, scaled up); on a GPU 1, 8 and 64 queries meet
``FINELIP_BENCH_ITEMS`` (100,000) images in float16. Each machine's targets are in its own groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import peers
import pytest
import torch
from baselines import compiled_block, exact_scores, images_that_suit, one_caption_at_a_time, plain_torch
from contest import Contender, Result, clock, compete
from inputs import DEVICE, HIDDEN, ITEMS, ON_GPU, PATCHES, TOKENS, WIDTH, WORDS, unit_rows
from torch import Tensor

from finelip_fast.aggregator import TokenAggregator
from finelip_fast.kernels import clim_scores, clim_topk, clim_topk_int8, floor, quantize, quantize_items

QUERIES = (1, 8, 64) if ON_GPU else (1, min(1_000, ITEMS))
HALF = torch.float16 if ON_GPU else torch.bfloat16
ROUNDS = 20 if ON_GPU else 3
CHECKED = 1_000  # items whose scores are compared with float64's
FEW = 20  # captions of the slow ones
MOST_WIDE = 100_000  # items of those in float32, twice the memory of the others
PAIRS = 1_000  # of what takes one pair at a time

# What a right answer may be off by: rounding of sums in float32, of scores and sums in half precision, of int8 rows.
EXACT, ROUNDED, QUANTISED = 1e-5, 3e-2, 3e-2

LOOP, CHAMFER = "research loop", f"{peers.FLASH}, chamfer, a pair at a time"
HALF_NAME = floor.name(HALF)
# On a GPU the plain one, too, is given the images that suit it.
PLAIN = "tuned plain torch" if ON_GPU else "plain torch"
PLAIN_HALF, PLAIN_FULL, PLAIN_TOPK = (
    f"{PLAIN}, {HALF_NAME}",
    "plain torch, float32",
    f"{PLAIN}, rounded scores, {HALF_NAME}",
)
COMPILED = f"torch.compile(max-autotune), {HALF_NAME}"
OURS = "finelip_fast"
OURS_HALF, OURS_FULL, OURS_INT8 = (f"{OURS}, {dtype}" for dtype in (HALF_NAME, "float32", "int8"))
PEERS = {
    (name, dtype): f"{name}, once a direction, {dtype}"
    for name in (peers.LATE, peers.FLASH)
    for dtype in dict.fromkeys(("float32", HALF_NAME))
}


@cache
def scores_race(n_queries: int) -> dict[str, Result]:
    queries, items = unit_rows(n_queries, dtype=HALF, seed=0), unit_rows(ITEMS, dtype=HALF, seed=1)
    wide_queries, wide_items = queries.float(), items[:MOST_WIDE].float()
    int8_queries, query_scales = quantize(queries)
    quantized = quantize_items(items)
    int8_items, item_scales = quantized.values, quantized.scales
    wide, n_small = len(wide_items) / ITEMS, min(n_queries, FEW)
    part = n_small / n_queries
    plain = plain_torch
    if ON_GPU:
        suited = images_that_suit(items, queries)
        plain = partial(plain_torch, at_once=n_queries, images_at_once=suited)

    def contender(
        run: Callable[[], Tensor], tolerance: float, dtype: torch.dtype = HALF, share: float = 1.0
    ) -> Contender:
        work = floor.clim(n_queries, ITEMS, TOKENS, WIDTH, dtype)
        return Contender(run, tolerance, share, work, answer=lambda scores: scores[:, :CHECKED])

    contenders = {
        OURS_HALF: contender(lambda: clim_scores(queries, items), EXACT),
        OURS_FULL: contender(lambda: clim_scores(wide_queries, wide_items), EXACT, torch.float32, wide),
        OURS_INT8: contender(
            lambda: clim_scores(int8_queries, int8_items, query_scales=query_scales, item_scales=item_scales),
            QUANTISED,
            torch.int8,
        ),
        PLAIN_HALF: contender(lambda: plain(items, queries).T, ROUNDED),
        PLAIN_FULL: contender(lambda: plain_torch(wide_items, wide_queries).T, EXACT, torch.float32, wide),
        LOOP: contender(
            lambda: one_caption_at_a_time(wide_items, wide_queries[:n_small]).T, EXACT, torch.float32, wide * part
        ),
    }
    if ON_GPU:
        # Without CUDA graphs, which would first copy all items.
        block = compiled_block("max-autotune-no-cudagraphs")
        contenders[COMPILED] = contender(lambda: plain(items, queries, block=block).T, ROUNDED)
    for name, maxsim in peers.maxsims().items():
        in_half, in_full = PEERS[name, HALF_NAME], PEERS[name, "float32"]
        if ON_GPU:  # float32 is rounded to half precision by both of them
            contenders[in_half] = contender(partial(peers.scores, maxsim, queries, items), ROUNDED)
        else:
            contenders[in_half] = contender(
                partial(peers.scores, maxsim, queries[:n_small], items), ROUNDED, share=part
            )
            contenders[in_full] = contender(
                partial(peers.scores, maxsim, wide_queries[:n_small], wide_items), EXACT, torch.float32, part
            )
    if peers.has_chamfer():
        pairs = items[:PAIRS]
        contenders[CHAMFER] = contender(
            partial(peers.chamfer_scores, queries[0], pairs), ROUNDED, share=len(pairs) / (ITEMS * n_queries)
        )
    return compete(contenders, exact_scores(items[:CHECKED], queries).T, rounds=ROUNDS)


@cache
def from_tokens_race() -> dict[str, Result]:
    """1,000 pictures' patches and 1,000 captions' words to all scores: aggregation of both sides included."""
    count = min(1_000, ITEMS)
    patches = unit_rows(count, PATCHES, dtype=HALF, seed=0).float()
    words = unit_rows(count, WORDS, dtype=HALF, seed=1).float()
    n_small = max(1, count // 50)
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
        return one_caption_at_a_time(images, words[:n_small], aggregate=aggregate).T

    with torch.no_grad():
        images, texts = embed(torch.float64)
        contenders = {
            OURS_HALF: Contender(partial(ours, HALF), ROUNDED),
            OURS_FULL: Contender(partial(ours, torch.float32), EXACT),
            LOOP: Contender(loop, EXACT, n_small / count),
        }
        return compete(contenders, exact_scores(images, texts).T, rounds=ROUNDS)


@cache
def topk_race(n_queries: int) -> dict[str, Result]:
    queries, items = unit_rows(n_queries, dtype=HALF, seed=0), unit_rows(ITEMS, dtype=HALF, seed=1)
    quantized = quantize_items(items)
    plain = plain_torch
    if ON_GPU:
        plain = partial(plain_torch, at_once=n_queries, images_at_once=images_that_suit(items, queries))
    work, int8_work = (floor.clim(n_queries, ITEMS, TOKENS, WIDTH, dtype) for dtype in (HALF, torch.int8))
    best = exact_scores(items, queries).T.topk(10)

    def ranked(result: tuple[Tensor, ...]) -> Tensor:
        """The scores, then the indices, which must be float64's."""
        return torch.cat([part.double() for part in result[:2]], dim=1)

    contenders = {
        TOPK: Contender(lambda: clim_topk(queries, items, 10), EXACT, work=work, answer=ranked),
        TOPK_INT8: Contender(
            lambda: clim_topk_int8(queries, items, quantized, 10), EXACT, work=int8_work, answer=ranked
        ),
        PLAIN_TOPK: Contender(lambda: plain(items, queries).T.float().topk(10).values, ROUNDED, work=work),
    }
    results = compete(contenders, ranked(best), rounds=ROUNDS)
    if TOPK_INT8 in results:
        results[TOPK_INT8].info["rescored"] = clim_topk_int8(queries, items, quantized, 10)[2].double().mean().item()
    return results


TOPK, TOPK_INT8 = f"{OURS}, exact", f"{OURS}, exact by int8"


def cases() -> list[Any]:
    scored = [OURS_HALF, OURS_FULL, OURS_INT8, PLAIN_HALF, PLAIN_FULL, LOOP, COMPILED, *PEERS.values(), CHAMFER]
    tokens, searches = [OURS_HALF, OURS_FULL, LOOP], [TOPK, TOPK_INT8, PLAIN_TOPK]
    plain = PLAIN_HALF if ON_GPU else PLAIN_FULL
    races = [
        *((f"{count} x {ITEMS} scores", partial(scores_race, count), plain, scored) for count in QUERIES),
        ("from tokens", from_tokens_race, LOOP, tokens),
        *((f"best 10 of {ITEMS} for {count}", partial(topk_race, count), PLAIN_TOPK, searches) for count in QUERIES),
    ]
    return [(group, race, baseline, name) for group, race, baseline, names in races for name in names]


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(
    ("group", "race", "baseline", "contender"), cases(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_late_interaction(
    benchmark: Any, group: str, race: Callable[[], dict[str, Result]], baseline: str, contender: str
) -> None:
    benchmark.extra_info["tokens"], benchmark.extra_info["width"] = TOKENS, WIDTH
    clock.into(benchmark, race(), contender, group=group, baseline=baseline)
