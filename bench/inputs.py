"""Inputs of the contenders: random embeddings with the shape of a model's, created where they are used."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

# ViT-B/16: rows of an embedding, width, hidden width of an aggregator, patches of a picture, words of a caption.
TOKENS, WIDTH, HIDDEN, PATCHES, WORDS = 40, 512, 102, 196, 181

_PART = 5_000  # items generated at once

ITEMS = int(os.environ.get("FINELIP_BENCH_ITEMS", 100_000 if ON_GPU else 1_000))


def unit_rows(count: int, tokens: int = TOKENS, *, dtype: torch.dtype, seed: int) -> Tensor:
    """Return random unit rows ``[count, tokens, WIDTH]``."""
    rows, first = torch.empty(count, tokens, WIDTH, dtype=dtype, device=DEVICE), 0
    for part in unit_row_parts(count, tokens, dtype=dtype, seed=seed):
        rows[first : first + len(part)] = part
        first += len(part)
    return rows


def unit_row_parts(count: int, tokens: int = TOKENS, *, dtype: torch.dtype, seed: int) -> Iterator[Tensor]:
    """Yield the rows of :func:`unit_rows` in parts, so that they are never all in memory as float32."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for first in range(0, count, _PART):
        part = torch.randn(min(_PART, count - first), tokens, WIDTH, generator=generator, device=DEVICE)
        yield F.normalize(part, dim=-1).to(dtype)
