"""Token aggregation, forward and with its gradient, against the reference in eager and compiled PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from contest import Contender, Entries, Result, clock, race
from inputs import DEVICE, HIDDEN, ON_GPU, TOKENS, WIDTH
from inputs import PATCHES as TOKENS_IN
from torch import Tensor

from finelip_fast.aggregator import TokenAggregator
from finelip_fast.kernels import atrm, floor
from finelip_fast.kernels.atrm.formula import AtrmInputs, atrm_reference

AGGREGATED = TOKENS - 1
DTYPE = torch.float16 if ON_GPU else torch.float32
LARGEST = int(os.environ.get("FINELIP_BENCH_BATCH", 2048))
BATCHES = tuple(batch for batch in ((1, 32, 256, 1024) if ON_GPU else (1, 32, 256)) if batch <= LARGEST)
ROUNDS = 20 if ON_GPU else 5
TOLERANCE = 2e-3 if ON_GPU else 1e-5
GRADIENT_TOLERANCE = 5e-2 if ON_GPU else 1e-3  # for sums over all tokens
BASELINE = "eager reference"
CONTENDERS = ("finelip_fast", BASELINE, "torch.compile")


def entries(batch: int, with_gradient: bool) -> Entries:
    tolerance = GRADIENT_TOLERANCE if with_gradient else TOLERANCE
    work = floor.atrm(batch, TOKENS_IN, WIDTH, HIDDEN, AGGREGATED, DTYPE, backward=with_gradient)
    runs = {"finelip_fast": our_atrm, BASELINE: plain, "torch.compile": torch.compile(plain)}

    def contender(operation: Callable[..., Tensor]) -> Contender:
        return Contender(prepared(operation, DTYPE, batch, with_gradient), tolerance, work=work)

    return {name: partial(contender, operation) for name, operation in runs.items()}


def prepared(
    operation: Callable[..., Tensor], dtype: torch.dtype, batch: int, with_gradient: bool
) -> Callable[[], Tensor]:
    """Return the operation on random tokens, ready to run."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    patches = torch.randn(batch, TOKENS_IN, WIDTH, generator=generator, device=DEVICE)
    anchor = torch.randn(batch, WIDTH, generator=generator, device=DEVICE)
    torch.manual_seed(0)
    aggregator = TokenAggregator(WIDTH, HIDDEN, AGGREGATED).to(DEVICE)
    norm, hidden, logits = aggregator.norm, aggregator.hidden, aggregator.logits
    parameters = [norm.weight, norm.bias, hidden.weight, hidden.bias, logits.weight, logits.bias, aggregator.scale]
    leaves = [tensor.detach().to(dtype).requires_grad_(with_gradient) for tensor in (patches, *parameters)]
    first_rows = anchor.to(dtype)

    def run() -> Tensor:
        if not with_gradient:
            with torch.no_grad():
                return operation(*leaves, None, first_rows).flatten(1)
        out = operation(*leaves, None, first_rows)
        return torch.autograd.grad(out.float().square().sum() + out.float()[:, 1:, 0].sum(), leaves)[1][None]

    return run


def our_atrm(*arguments: Any) -> Tensor:
    *tensors, lengths, first_rows = arguments
    return atrm(*tensors, lengths=lengths, anchor=first_rows)


def plain(*inputs: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return atrm_reference(AtrmInputs(*inputs), dtype=dtype)


@cache
def aggregation_race(batch: int, with_gradient: bool) -> dict[str, Result]:
    expected = prepared(partial(plain, dtype=torch.float64), torch.float64, batch, with_gradient)()
    return race(entries, batch, with_gradient, expected=expected, rounds=ROUNDS)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("with_gradient", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("batch", BATCHES)
def test_aggregation(benchmark: Any, batch: int, with_gradient: bool, contender: str) -> None:
    sizes = {"tokens": TOKENS_IN, "width": WIDTH, "aggregated": AGGREGATED, "dtype": floor.name(DTYPE)}
    benchmark.extra_info.update(sizes)
    group = f"{batch} x {TOKENS_IN} tokens, {'forward and backward' if with_gradient else 'forward'}"
    clock.into(benchmark, aggregation_race(batch, with_gradient), contender, group=group, baseline=BASELINE)
