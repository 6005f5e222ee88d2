"""Captions per second: only up to the longest end token of a batch, in order of length, against always all 256 positions.

Both ways give the same embeddings, checked before either is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import finelip_fast
from finelip_fast.datasets import Scenes
from finelip_fast.embed import embed_tokens
from finelip_fast.encoders import caption_lengths
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import encode_batch

BATCH = 32


def _all_positions(model: FineLIP, ids: Tensor) -> Tensor:
    """Every position of the context, as the padded ids stand."""
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
