"""Captions per second, encoded only up to a batch's longest end token, in order of length, against all 256 positions.

It also times a training batch's forward and backward pass through the text encoder: captions grouped by similar length against
all at once. Both ways give the same embeddings, which is checked before timing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import finelip_fast
from finelip_fast.datasets import Scenes, open_dataset
from finelip_fast.embed import embed_tokens
from finelip_fast.encoders import caption_lengths
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import encode_batch, expected_truncation
from finelip_fast.training.augment import Augmentation
from finelip_fast.training.config import load_recipe
from finelip_fast.training.start import autocast

BATCH = 32
TRAINING_BATCH = 128


def _all_positions(model: FineLIP, ids: Tensor) -> Tensor:
    """Encode every position of the padded ids."""
    lengths = caption_lengths(ids) - 1
    tokens = model.text(ids)
    return model.text_aggregator(tokens, anchor=tokens[torch.arange(len(ids)), lengths], lengths=lengths)


@pytest.fixture(scope="module", params=["scenes", "ViT-B-16"])
def case(request: Any) -> tuple[dict[str, Callable[[], Tensor]], int]:
    if request.param == "scenes":
        model, count = finelip_fast.load(), 256
    else:
        torch.manual_seed(0)
        model, count = FineLIP(finelip_fast.FineLIPConfig.preset(request.param)).eval(), 64
    captions = [scene.caption for scene in Scenes("test", count)]
    batch = encode_batch(captions)  # both ways start from ids
    ways = {
        "all 256 positions": lambda: torch.cat([_all_positions(model, ids) for ids in batch.ids.split(BATCH)]),
        "up to the longest": lambda: embed_tokens(model.encode_text, batch, batch_size=BATCH),
    }
    with torch.inference_mode():
        results = [way() for way in ways.values()]
    assert (results[0] - results[1]).abs().max() <= 1e-5
    return ways, count


@pytest.mark.parametrize("way", ["all 256 positions", "up to the longest"])
def test_captions(benchmark: Any, case: tuple[dict[str, Callable[[], Tensor]], int], way: str, request: Any) -> None:
    ways, count = case
    benchmark.group = f"captions, {request.node.callspec.params['case']}"
    benchmark.extra_info.update({"captions": count, "contender": way, "baseline": "all 256 positions"})
    with torch.inference_mode():
        benchmark.pedantic(ways[way], rounds=5, warmup_rounds=1)


@pytest.fixture(scope="module")
def training_ways() -> dict[str, Callable[[], None]]:
    """A batch of captions with sentences dropped or taken from others, as the recipe ``scenes-robust`` produces."""
    model = finelip_fast.load().train()
    augmentation = Augmentation.parse(load_recipe("scenes-robust")["augment"])
    pairs = open_dataset(f"scenes:train_mixed:{TRAINING_BATCH + 1}", image_size=16)
    captions = [
        augmentation(pairs[at], Random(at), lambda: pairs[TRAINING_BATCH].caption).caption
        for at in range(TRAINING_BATCH)
    ]
    with expected_truncation():
        ids = encode_batch(captions).ids
    longest = int(caption_lengths(ids).max())

    def at_once() -> Tensor:
        return model.text(ids[:, :longest])

    def of_like_length() -> Tensor:
        return model.text_tokens(ids)[0]

    inside = torch.arange(longest) < caption_lengths(ids)[:, None]
    with torch.inference_mode():
        assert (at_once() - of_like_length())[inside].abs().max() <= 1e-4

    def step(encode: Callable[[], Tensor]) -> None:
        with sdpa_kernel(SDPBackend.MATH), autocast(torch.device("cpu"), "auto"):
            (encode()[inside].float() ** 2).sum().backward()
        model.zero_grad()

    return {"all at once": partial(step, at_once), "of like length": partial(step, of_like_length)}


@pytest.mark.parametrize("way", ["all at once", "of like length"])
def test_training_batch(benchmark: Any, training_ways: dict[str, Callable[[], None]], way: str) -> None:
    benchmark.group = f"a training batch of {TRAINING_BATCH} captions, there and back"
    benchmark.extra_info.update({"captions": TRAINING_BATCH, "contender": way, "baseline": "all at once"})
    benchmark.pedantic(training_ways[way], rounds=5, warmup_rounds=1)
