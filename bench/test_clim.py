"""Late interaction, all scores and the best ones, against the research loop, plain PyTorch and installed peers.

On a CPU, 1,000 images are scored against 1,000 captions (for the research loop, a fiftieth of that, scaled up); on a GPU, 1, 8
and 64 queries against ``FINELIP_BENCH_ITEMS`` (100,000) images in float16. Each machine has its own groups of targets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import peers
import pytest
import torch
from baselines import compiled_block, exact_scores, images_that_suit, one_caption_at_a_time, plain_torch
from contest import Contender, Entries, Result, clock, race
from inputs import DEVICE, HIDDEN, ITEMS, ON_GPU, PATCHES, TOKENS, WIDTH, WORDS, unit_row_parts, unit_rows
from torch import Tensor

from finelip_fast.aggregator import TokenAggregator
from finelip_fast.kernels import clim_scores, clim_topk, clim_topk_int8, floor, quantize, quantize_items

QUERIES = (1, 8, 64) if ON_GPU else (1, min(1_000, ITEMS))
HALF = torch.float16 if ON_GPU else torch.bfloat16
ROUNDS = 20 if ON_GPU else 3
CHECKED = 1_000  # items whose scores are checked against float64
FEW = 20  # captions for slow contenders
MOST_WIDE = 100_000  # items for contenders in float32, which need twice the memory
PAIRS = 1_000  # pairs for contenders that take one pair at a time

# Tolerances for float32 sums, for scores and sums in half precision, and for int8 rows.
EXACT, ROUNDED, QUANTISED = 1e-5, 3e-2, 3e-2

LOOP, CHAMFER = "research loop", f"{peers.FLASH}, chamfer, a pair at a time"
HALF_NAME = floor.name(HALF)
# On a GPU, the plain contender also gets the number of images at once that suits it.
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


def scores_entries(n_queries: int) -> Entries:
    """Return contenders for all scores; shared inputs are created once per process."""
    queries = unit_rows(n_queries, dtype=HALF, seed=0)
    items = cache(lambda: unit_rows(ITEMS, dtype=HALF, seed=1))
    wide = cache(lambda: items()[:MOST_WIDE].float())
    n_wide, n_small = min(ITEMS, MOST_WIDE) / ITEMS, min(n_queries, FEW)
    part = n_small / n_queries

    def contender(
        run: Callable[[], Tensor], tolerance: float, dtype: torch.dtype = HALF, share: float = 1.0
    ) -> Contender:
        work = floor.clim(n_queries, ITEMS, TOKENS, WIDTH, dtype)
        return Contender(run, tolerance, share, work, answer=lambda scores: scores[:, :CHECKED])

    def of_int8() -> Contender:
        (int8_queries, query_scales), quantized = quantize(queries), quantize_items(items())
        int8_items, item_scales = quantized.values, quantized.scales
        run = partial(clim_scores, int8_queries, int8_items, query_scales=query_scales, item_scales=item_scales)
        return contender(run, QUANTISED, torch.int8)

    def compiled() -> Contender:
        plain = suited(items(), queries)
        # CUDA graphs are disabled because they would first copy all items.
        block = compiled_block("max-autotune-no-cudagraphs")
        return contender(lambda: plain(items(), queries, block=block).T, ROUNDED)

    def plain_half() -> Contender:
        plain = suited(items(), queries)
        return contender(lambda: plain(items(), queries).T, ROUNDED)

    def peer(maxsim: peers.MaxSim, in_half: bool) -> Contender:
        if ON_GPU:  # both round float32 to half precision
            return contender(partial(peers.scores, maxsim, queries, items()), ROUNDED)
        if in_half:
            return contender(partial(peers.scores, maxsim, queries[:n_small], items()), ROUNDED, share=part)
        wide_queries = queries[:n_small].float()
        return contender(partial(peers.scores, maxsim, wide_queries, wide()), EXACT, torch.float32, part)

    def chamfer() -> Contender:
        pairs = items()[:PAIRS]
        share = len(pairs) / (ITEMS * n_queries)
        return contender(partial(peers.chamfer_scores, queries[0], pairs), ROUNDED, share=share)

    full = queries.float()
    entries: dict[str, Callable[[], Contender]] = {
        OURS_HALF: lambda: contender(partial(clim_scores, queries, items()), EXACT),
        OURS_FULL: lambda: contender(partial(clim_scores, full, wide()), EXACT, torch.float32, n_wide),
        OURS_INT8: of_int8,
        PLAIN_HALF: plain_half,
        PLAIN_FULL: lambda: contender(lambda: plain_torch(wide(), full).T, EXACT, torch.float32, n_wide),
        LOOP: lambda: contender(
            lambda: one_caption_at_a_time(wide(), full[:n_small]).T, EXACT, torch.float32, n_wide * part
        ),
    }
    if ON_GPU:
        entries[COMPILED] = compiled
    for name, maxsim in peers.maxsims().items():
        entries[PEERS[name, HALF_NAME]] = partial(peer, maxsim, True)
        if not ON_GPU:
            entries[PEERS[name, "float32"]] = partial(peer, maxsim, False)
    if peers.has_chamfer():
        entries[CHAMFER] = chamfer
    return entries


def suited(items: Tensor, queries: Tensor) -> Callable[..., Tensor]:
    """Return plain PyTorch; on a GPU, with the number of images at once that suits it."""
    if not ON_GPU:
        return plain_torch
    return partial(plain_torch, at_once=len(queries), images_at_once=images_that_suit(items, queries))


@cache
def scores_race(n_queries: int) -> dict[str, Result]:
    queries, items = unit_rows(n_queries, dtype=HALF, seed=0), next(unit_row_parts(ITEMS, dtype=HALF, seed=1))
    expected = exact_scores(items[:CHECKED], queries).T
    return race(scores_entries, n_queries, expected=expected, rounds=ROUNDS)


def from_tokens_entries() -> Entries:
    """Return contenders from 1,000 pictures' patches and 1,000 captions' words to all scores, including aggregation."""
    patches, words, image_aggregator, text_aggregator = from_tokens()
    n_small = max(1, len(words) // 50)

    @torch.no_grad()
    def our_scores(dtype: torch.dtype) -> Tensor:
        images, texts = embeddings_from_tokens(dtype)
        return clim_scores(texts, images)

    @torch.no_grad()
    def loop() -> Tensor:
        images = image_aggregator(patches, anchor=patches[:, 0])
        aggregate = lambda caption: text_aggregator(caption, anchor=caption[:, -1])  # noqa: E731
        return one_caption_at_a_time(images, words[:n_small], aggregate=aggregate).T

    return {
        OURS_HALF: lambda: Contender(partial(our_scores, HALF), ROUNDED),
        OURS_FULL: lambda: Contender(partial(our_scores, torch.float32), EXACT),
        LOOP: lambda: Contender(loop, EXACT, n_small / len(words)),
    }


@cache
def from_tokens() -> tuple[Tensor, Tensor, TokenAggregator, TokenAggregator]:
    count = min(1_000, ITEMS)
    patches = unit_rows(count, PATCHES, dtype=HALF, seed=0).float()
    words = unit_rows(count, WORDS, dtype=HALF, seed=1).float()
    torch.manual_seed(0)
    image_aggregator, text_aggregator = (TokenAggregator(WIDTH, HIDDEN, TOKENS - 1).to(DEVICE) for _ in range(2))
    return patches, words, image_aggregator, text_aggregator


def embeddings_from_tokens(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    patches, words, image_aggregator, text_aggregator = from_tokens()
    return (
        image_aggregator(patches, anchor=patches[:, 0]).to(dtype),
        text_aggregator(words, anchor=words[:, -1]).to(dtype),
    )


@cache
@torch.no_grad()
def from_tokens_race() -> dict[str, Result]:
    expected = exact_scores(*embeddings_from_tokens(torch.float64)).T
    return race(from_tokens_entries, expected=expected, rounds=ROUNDS)


def topk_entries(n_queries: int) -> Entries:
    queries, items = unit_rows(n_queries, dtype=HALF, seed=0), cache(lambda: unit_rows(ITEMS, dtype=HALF, seed=1))
    work, int8_work = (floor.clim(n_queries, ITEMS, TOKENS, WIDTH, dtype) for dtype in (HALF, torch.int8))

    def by_int8() -> Contender:
        run = partial(clim_topk_int8, queries, items(), quantize_items(items()), 10)
        rescored = lambda result: {"rescored": result[2].double().mean().item()}  # noqa: E731
        return Contender(run, EXACT, work=int8_work, answer=ranked, notes=rescored)

    def plain_best() -> Contender:
        plain = suited(items(), queries)
        return Contender(lambda: plain(items(), queries).T.float().topk(10).values, ROUNDED, work=work)

    return {
        TOPK: lambda: Contender(partial(clim_topk, queries, items(), 10), EXACT, work=work, answer=ranked),
        TOPK_INT8: by_int8,
        PLAIN_TOPK: plain_best,
    }


def ranked(result: tuple[Tensor, ...]) -> Tensor:
    """Return the scores followed by the indices, which must equal those of float64."""
    return torch.cat([part.double() for part in result[:2]], dim=1)


@cache
def topk_race(n_queries: int) -> dict[str, Result]:
    queries, items = unit_rows(n_queries, dtype=HALF, seed=0), unit_rows(ITEMS, dtype=HALF, seed=1)
    expected = ranked(exact_scores(items, queries).T.topk(10))
    del items  # another process creates them
    return race(topk_entries, n_queries, expected=expected, rounds=ROUNDS)


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
