"""Token aggregation, forward and with its gradient, against the reference in eager PyTorch and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from contest import Contender, Result, clock, compete
from torch import Tensor

from finelip_fast.aggregator import TokenAggregator
from finelip_fast.kernels.atrm import atrm_reference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOKENS, WIDTH, HIDDEN, AGGREGATED = 196, 512, 102, 39
DTYPE = torch.float16 if ON_GPU else torch.float32
BATCHES = (1, 32, 256, 1024) if ON_GPU else (1, 32, 256)
ROUNDS = 20 if ON_GPU else 5
TOLERANCE = 2e-3 if ON_GPU else 1e-5
GRADIENT_TOLERANCE = 5e-2 if ON_GPU else 1e-3  # of sums over all tokens
CONTENDERS = ("finelip_fast", "eager reference", "torch.compile")


@cache
def race(batch: int, with_gradient: bool) -> dict[str, Result]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    patches = torch.randn(batch, TOKENS, WIDTH, generator=generator, device=DEVICE)
    anchor = torch.randn(batch, WIDTH, generator=generator, device=DEVICE)
    torch.manual_seed(0)
    aggregator = TokenAggregator(WIDTH, HIDDEN, AGGREGATED).to(DEVICE)
    norm, hidden, logits = aggregator.norm, aggregator.hidden, aggregator.logits
    parameters = [norm.weight, norm.bias, hidden.weight, hidden.bias, logits.weight, logits.bias, aggregator.scale]

    def arguments(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_(with_gradient) for tensor in (patches, *parameters)]
        return leaves, anchor.to(dtype)

    def contender(operation: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
        leaves, first_rows = arguments(dtype)

        def run() -> Tensor:
            if not with_gradient:
                with torch.no_grad():
                    return operation(*leaves, None, first_rows).flatten(1)
            out = operation(*leaves, None, first_rows)
            return torch.autograd.grad(out.float().square().sum() + out.float()[:, 1:, 0].sum(), leaves)[1][None]

        return run

    def ours(*given: Any) -> Tensor:
        *tensors, lengths, first_rows = given
        from finelip_fast.kernels import atrm

        return atrm(*tensors, lengths=lengths, anchor=first_rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the reference, as exact as can be
        expected = contender(atrm_reference, torch.float64)()
    tolerance = GRADIENT_TOLERANCE if with_gradient else TOLERANCE
    compiled = torch.compile(atrm_reference)
    runs = {"finelip_fast": ours, "eager reference": atrm_reference, "torch.compile": compiled}
    return compete(
        {name: Contender(contender(run, DTYPE), tolerance) for name, run in runs.items()}, expected, rounds=ROUNDS
    )


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("with_gradient", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("batch", BATCHES)
def test_aggregation(benchmark: Any, batch: int, with_gradient: bool, contender: str) -> None:
    benchmark.extra_info.update({"tokens": TOKENS, "width": WIDTH, "aggregated": AGGREGATED, "dtype": str(DTYPE)})
    group = f"{batch} x {TOKENS} tokens, {'forward and backward' if with_gradient else 'forward'}"
    clock.into(benchmark, race(batch, with_gradient)[contender], group)
