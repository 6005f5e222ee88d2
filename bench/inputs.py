"""What the contenders are given: random embeddings of a model's shape, made where they are used."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

# ViT-B/16: rows of an embedding, width, hidden width of an aggregator, patches of a picture, words of a caption.
TOKENS, WIDTH, HIDDEN, PATCHES, WORDS = 40, 512, 102, 196, 181

ITEMS = int(os.environ.get("FINELIP_BENCH_ITEMS", 100_000 if ON_GPU else 1_000))


def unit_rows(count: int, tokens: int = TOKENS, *, dtype: torch.dtype, seed: int) -> Tensor:
    """Unit rows ``[count, tokens, WIDTH]``, in parts, so that float32 of all of them never lies in memory."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    parts = [
        F.normalize(torch.randn(min(5_000, count - first), tokens, WIDTH, generator=generator, device=DEVICE), dim=-1)
        for first in range(0, count, 5_000)
    ]
    return torch.cat([part.to(dtype) for part in parts])
