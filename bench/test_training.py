"""Late interaction in training: the scores of all pairs of a batch, and the gradients of both sides.

The baselines are PyTorch's autograd (plain, checkpointed and compiled) and installed peers.

``FINELIP_BENCH_BATCH`` leaves out larger batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import peers
import pytest
import torch
from baselines import checkpointed_block, compiled_block, plain_block, plain_torch
from contest import Contender, Entries, Result, clock, race
from inputs import DEVICE, ON_GPU, TOKENS, WIDTH, unit_rows
from torch import Tensor

from finelip_fast.kernels import clim_scores, floor

DTYPES = (torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.bfloat16)
LARGEST = int(os.environ.get("FINELIP_BENCH_BATCH", 2048))
BATCHES = tuple(batch for batch in ((128, 512, 2048) if ON_GPU else (64, 256)) if batch <= LARGEST)
ROUNDS = 20 if ON_GPU else 3

# Errors relative to the largest gradient. If rows are nearly equally similar, rounding occasionally selects another maximum,
# more often if products are rounded before the maximum is taken; autograd splits the gradient of a tie.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
ROUNDED = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}

PLAIN = "plain torch"
PEERS = {name: f"{name}, once a direction" for name in (peers.LATE, peers.FLASH)}
CONTENDERS = ("finelip_fast", PLAIN, "plain torch, checkpointed", "torch.compile", *PEERS.values())


Gradients = tuple[Tensor, ...]


def inputs_of(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return captions, images, and the weights of their scores."""
    generator = torch.Generator(DEVICE).manual_seed(2)
    weights = torch.randn(batch, batch, generator=generator, device=DEVICE)
    return unit_rows(batch, dtype=dtype, seed=0), unit_rows(batch, dtype=dtype, seed=1), weights


def gradients(
    score: Callable[[Tensor, Tensor], Tensor], captions: Tensor, images: Tensor, weights: Tensor
) -> Gradients:
    leaves = [rows.detach().requires_grad_() for rows in (captions, images)]
    return torch.autograd.grad((score(*leaves) * weights).sum(), leaves)


def by_blocks(block: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda captions, images: plain_torch(images, captions, block=block).T


def entries(batch: int, dtype: torch.dtype, largest: float) -> Entries:
    work = floor.clim(batch, batch, TOKENS, WIDTH, dtype, backward=True)

    def contender(score: Callable[[Tensor, Tensor], Tensor], tolerance: dict[torch.dtype, float]) -> Contender:
        relative = lambda measured_gradients: torch.stack(measured_gradients) / largest  # noqa: E731
        run = partial(gradients, score, *inputs_of(batch, dtype))
        return Contender(run, tolerance[dtype], work=work, answer=relative)

    makers: dict[str, Callable[[], Contender]] = {
        "finelip_fast": lambda: contender(clim_scores, TOLERANCE),
        PLAIN: lambda: contender(by_blocks(plain_block), ROUNDED),
        "plain torch, checkpointed": lambda: contender(by_blocks(checkpointed_block), ROUNDED),
        "torch.compile": lambda: contender(by_blocks(compiled_block()), ROUNDED),
    }
    for name, maxsim in peers.maxsims(gradient=True).items():
        makers[PEERS[name]] = partial(contender, partial(peers.scores, maxsim), ROUNDED)
    return makers


@cache
def gradients_race(batch: int, dtype: torch.dtype) -> dict[str, Result]:
    captions, images, weights = inputs_of(batch, dtype)
    exact = torch.stack(gradients(by_blocks(checkpointed_block), captions.double(), images.double(), weights))
    largest = exact.abs().max().item()
    return race(entries, batch, dtype, largest, expected=exact / largest, rounds=ROUNDS)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=floor.name)
@pytest.mark.parametrize("batch", BATCHES)
def test_scores_and_gradients(benchmark: Any, batch: int, dtype: torch.dtype, contender: str) -> None:
    benchmark.extra_info.update({"tokens": TOKENS, "width": WIDTH, "dtype": floor.name(dtype)})
    group = f"batch {batch}, {floor.name(dtype)}"
    clock.into(benchmark, gradients_race(batch, dtype), contender, group=group, baseline=PLAIN)
