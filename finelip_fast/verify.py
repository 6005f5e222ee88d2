"""Checks of the kernels on this machine: each against float64, for the same bits twice, and captured in a CUDA graph.

The checks run what a search or a training would run here: the fused kernels on a GPU that supports them, elsewhere their
replacements. Shapes are small and odd, so that every block has an edge; a GPU gets one more that keeps all of it busy, for
errors that occur only then. On a GPU, late interaction and aggregation are also timed, relative to what the same GPU copies
and multiplies in the same minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast._arguments import one_of
from finelip_fast.kernels import (
    atrm,
    clim_scores,
    clim_topk,
    clim_topk_int8,
    describe,
    floor,
    quantize,
    quantize_items,
)
from finelip_fast.kernels.atrm.formula import LAYER_NORM_EPS
from finelip_fast.kernels.clim.formula import LEAKY_SLOPE

ALPHA, BEST = 0.8, 5

# Q, L_q, N, L_i, D: one query, several, and no size a multiple of a block's.
CLIM_SHAPES = ((1, 40, 67, 11, 512), (9, 13, 37, 17, 80), (3, 52, 35, 5, 768))
# Items, tokens, D, hidden width, aggregated tokens.
ATRM_SHAPES = ((1, 53, 96, 19, 7), (3, 37, 512, 102, 39))
# Only for a GPU, which runs many programs in parallel.
BUSY_CLIM_SHAPE, BUSY_ATRM_SHAPE = (8, 40, 1_000, 40, 512), (200, 196, 512, 102, 39)

# For results computed and stored in float32. A gradient or a row stored in half precision may also be off by its rounding.
_FLOAT32_ERROR = 1e-5
_ROUNDINGS = 2

# Numbers of items and pictures for timing: larger than any cache, and quick to create.
_TIMED_ITEMS, _TIMED_PICTURES, _ROUNDS = 100_000, 1_024, 11


class Trial(NamedTuple):
    """One call to check.

    Args:
        run: Function that makes the call.
        exact: Expected result, float64.
        tolerance: Largest acceptable error.
        captured: Whether the call can be captured in a CUDA graph.
    """

    run: Callable[[], Tensor]
    exact: Tensor
    tolerance: float
    captured: bool = False


@dataclass(frozen=True)
class Verdict:
    """Result for a kernel: the worst of its shapes.

    Attributes:
        kernel: Name in :data:`KERNELS`.
        error: Largest difference from float64; for gradients relative to the largest entry.
        allowed: Largest acceptable error.
        wrong: Description of the fault; empty: none.
    """

    kernel: str
    error: float
    allowed: float
    wrong: str

    def __str__(self) -> str:
        return f"{self.kernel:24}error {self.error:8.2g} of {self.allowed:.2g}   {self.wrong or 'right'}"


@dataclass(frozen=True)
class Speed:
    """Speed of a kernel relative to the measured rates of this GPU.

    Attributes:
        kernel: Operation, dtype and size.
        milliseconds: Median of its runs, with a cold L2 cache.
        copy_share: Bytes that it must move per second, relative to those of a copy.
        product_share: Operations per second, relative to those of a square matrix product.
    """

    kernel: str
    milliseconds: float
    copy_share: float
    product_share: float

    def __str__(self) -> str:
        return (
            f"{self.kernel:40}{self.milliseconds:9.3f} ms, {self.copy_share:4.0%} of a copy's bytes, "
            f"{self.product_share:4.0%} of a product's rate"
        )


@dataclass(frozen=True)
class Report:
    """Result of :func:`verify`.

    Attributes:
        device: Name of the GPU, or ``CPU``.
        implementation: Implementation that ran, and why no faster one did.
        verdicts: One verdict per kernel.
        speeds: Timings; none on a CPU.
    """

    device: str
    implementation: str
    verdicts: tuple[Verdict, ...]
    speeds: tuple[Speed, ...] = ()

    @property
    def wrong(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.wrong)

    def __str__(self) -> str:
        return "\n".join([f"{self.device}: {self.implementation}", *map(str, self.verdicts), *map(str, self.speeds)])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(kernels: Sequence[str] = (), *, timed: bool = True) -> Report:
    """Check the kernels that run on this machine.

    Args:
        kernels: Names in :data:`KERNELS`; empty: all.
        timed: Whether the kernels are timed if all are right and there is a GPU.

    Returns:
        Every verdict, including those of kernels that are wrong or that failed.

    Raises:
        InputError: A name is unknown.
    """
    for name in kernels:
        one_of("kernels", name, KERNELS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    implementation, reason = describe()
    verdicts = tuple(_verdict(name, device) for name in kernels or KERNELS)
    on_gpu = device.type == "cuda"
    speeds = tuple(_speeds(device)) if timed and on_gpu and not any(verdict.wrong for verdict in verdicts) else ()
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    return Report(name, f"{implementation} ({reason})", verdicts, speeds)


def _verdict(kernel: str, device: torch.device) -> Verdict:
    worst = Verdict(kernel, 0.0, _FLOAT32_ERROR, "")
    try:
        for trial in KERNELS[kernel](device):
            verdict = _tried(kernel, trial)
            if verdict.wrong:
                return verdict
            worst = max(worst, verdict, key=lambda verdict: verdict.error / verdict.allowed)
    except Exception as error:  # compilers, drivers and allocators raise many kinds
        return Verdict(kernel, float("nan"), worst.allowed, f"{type(error).__name__}: {str(error).strip():.200}")
    return worst


def _tried(kernel: str, trial: Trial) -> Verdict:
    result = trial.run()
    error = (result.double() - trial.exact).abs().max().item()
    wrong = ""
    if not error <= trial.tolerance:  # NaN is wrong, too
        wrong = f"wrong: off by {error:.2g} where {trial.tolerance:.2g} is allowed"
    elif not torch.equal(trial.run(), result):
        wrong = "wrong: not the same bits twice"
    elif trial.captured and result.is_cuda and not torch.equal(_replayed(trial.run), result):
        wrong = "wrong: a captured CUDA graph gives another result"
    return Verdict(kernel, error, trial.tolerance, wrong)


def _replayed(run: Callable[[], Tensor]) -> Tensor:
    """Result of a call that is captured, and run by its graph alone."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.zero_()  # stays so if a launch was not captured
    graph.replay()
    return captured


# Late interaction -----------------------------------------------------------------------------------------------------


def exact_scores(queries: Tensor, items: Tensor, alpha: float = ALPHA) -> Tensor:
    """Late interaction in float64, ``[Q, N]``, implemented independently; differentiable."""
    similarity = torch.einsum("qsd,ntd->qnst", queries.double(), items.double())
    over_items = F.leaky_relu(similarity.max(dim=3).values, LEAKY_SLOPE).mean(dim=2)
    over_queries = F.leaky_relu(similarity.max(dim=2).values, LEAKY_SLOPE).mean(dim=2)
    return alpha * similarity[:, :, 0, 0] + (1 - alpha) * (over_items + over_queries)


def _embeddings(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    shapes = (*CLIM_SHAPES, BUSY_CLIM_SHAPE) if device.type == "cuda" else CLIM_SHAPES
    for seed, (n_queries, query_tokens, n_items, item_tokens, width) in enumerate(shapes):
        draw = _source(device, seed)
        yield (
            F.normalize(draw(n_queries, query_tokens, width), dim=-1).to(dtype),
            F.normalize(draw(n_items, item_tokens, width), dim=-1).to(dtype),
        )


def _clim(dtype: torch.dtype, device: torch.device) -> Iterator[Trial]:
    for queries, items in _embeddings(device, dtype):
        run = partial(clim_scores, queries, items, alpha=ALPHA)
        yield Trial(run, exact_scores(queries, items), _FLOAT32_ERROR, captured=True)


def _clim_int8(device: torch.device) -> Iterator[Trial]:
    for queries, items in _embeddings(device, torch.float32):
        (values, scales), (item_values, item_scales) = quantize(queries), quantize(items)
        run = partial(clim_scores, values, item_values, alpha=ALPHA, query_scales=scales, item_scales=item_scales)
        exact = exact_scores(_stored(values, scales), _stored(item_values, item_scales))
        yield Trial(run, exact, _FLOAT32_ERROR, captured=True)


def _stored(values: Tensor, scales: Tensor) -> Tensor:
    return values.double() * scales.double()[..., None]


def _clim_gradient(dtype: torch.dtype, device: torch.device) -> Iterator[Trial]:
    for seed, (queries, items) in enumerate(_embeddings(device, dtype)):
        weights = _source(device, seed)(len(queries), len(items))
        yield _gradient_trial(
            lambda *leaves, weights=weights: (clim_scores(*leaves, alpha=ALPHA) * weights).sum(),
            lambda *leaves, weights=weights: (exact_scores(*leaves) * weights.double()).sum(),
            [queries, items],
        )


def _topk(by_int8: bool, device: torch.device) -> Iterator[Trial]:
    """Scores and positions; positions are integers, so one that differs from float64's is off by at least 1."""
    for queries, items in _embeddings(device, torch.float16):
        search: Callable[[], tuple[Tensor, ...]] = partial(clim_topk, queries, items, BEST, alpha=ALPHA)
        if by_int8:
            search = partial(clim_topk_int8, queries, items, quantize_items(items), BEST, alpha=ALPHA)
        best = exact_scores(queries, items).topk(BEST)
        yield Trial(partial(_ranked, search), torch.cat([part.double() for part in best]), _FLOAT32_ERROR)


def _ranked(search: Callable[[], tuple[Tensor, ...]]) -> Tensor:
    return torch.cat([part.double() for part in search()[:2]])


# Token aggregation ----------------------------------------------------------------------------------------------------


def exact_aggregate(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    scale: Tensor,
    anchor: Tensor,
    *,
    lengths: Tensor,
) -> Tensor:
    """Token aggregation in float64, ``[B, K + 1, D]``, one item at a time, implemented independently; differentiable."""
    items = []
    for tokens, length, first in zip(x, lengths.tolist(), anchor, strict=True):
        tokens = tokens[:length]
        hidden = F.gelu(
            F.linear(F.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, LAYER_NORM_EPS), w1, b1)
        )
        weights = (F.linear(hidden, w2, b2) * scale).softmax(dim=0)
        items.append(F.normalize(torch.cat([first[None], weights.T @ tokens]), dim=-1))
    return torch.stack(items)


def _aggregations(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] | None = None
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Tensors in the order of :func:`exact_aggregate`, and lengths: the first item is full, the last of several empty."""
    if shapes is None:
        shapes = (*ATRM_SHAPES, BUSY_ATRM_SHAPE) if device.type == "cuda" else ATRM_SHAPES
    for seed, (batch, tokens, width, hidden, aggregated) in enumerate(shapes):
        draw = _source(device, seed)
        tensors = [
            draw(batch, tokens, width),
            1 + draw(width) / 10,
            draw(width) / 10,
            draw(hidden, width) / width**0.5,
            draw(hidden) / 10,
            draw(aggregated, hidden) / hidden**0.5,
            draw(aggregated) / 10,
            torch.ones((), device=device),
            draw(batch, width),
        ]
        steps = torch.arange(batch, device=device)
        lengths = tokens - tokens * steps // max(1, batch - 1)
        yield [tensor.to(dtype) for tensor in tensors], lengths


def _aggregate(tensors: Sequence[Tensor], lengths: Tensor) -> Tensor:
    *inputs, anchor = tensors
    return atrm(*inputs, lengths=lengths, anchor=anchor)


def _atrm(dtype: torch.dtype, device: torch.device) -> Iterator[Trial]:
    for tensors, lengths in _aggregations(device, dtype):
        exact = exact_aggregate(*(tensor.double() for tensor in tensors), lengths=lengths)
        yield Trial(partial(_aggregate, tensors, lengths), exact, _tolerance(dtype), captured=True)


def _atrm_gradient(dtype: torch.dtype, device: torch.device) -> Iterator[Trial]:
    for seed, (tensors, lengths) in enumerate(_aggregations(device, dtype)):
        weights = _source(device, seed)(len(lengths), tensors[6].shape[0] + 1, tensors[0].shape[2])
        yield _gradient_trial(
            lambda *leaves, lengths=lengths, weights=weights: (_aggregate(leaves, lengths).float() * weights).sum(),
            lambda *leaves, lengths=lengths, weights=weights: (
                exact_aggregate(*leaves, lengths=lengths) * weights.double()
            ).sum(),
            tensors,
        )


# Timing ---------------------------------------------------------------------------------------------------------------


def _speeds(device: torch.device) -> Iterator[Speed]:
    """Time late interaction at 40 x 512, and aggregation to as many rows, as in ViT-B/16."""
    free, _ = torch.cuda.mem_get_info(device)
    n_items = min(_TIMED_ITEMS, free // (8 * 40 * 512))  # in float16, quantised, and what the benchmark keeps free
    items = torch.empty(n_items, 40, 512, dtype=torch.float16, device=device).normal_().mul_(512**-0.5)
    item_values, item_scales = map(torch.cat, zip(*map(quantize, items.split(5_000)), strict=True))
    for n_queries in (1, 8, 64):
        queries = items[:n_queries].flip(1).contiguous()
        values, scales = quantize(queries)
        runs: dict[torch.dtype, Callable[[], Tensor]] = {
            torch.float16: partial(clim_scores, queries, items),
            torch.int8: partial(clim_scores, values, item_values, query_scales=scales, item_scales=item_scales),
        }
        for dtype, run in runs.items():
            work = floor.clim(n_queries, n_items, 40, 512, dtype)
            yield _speed(f"clim {n_queries} x {n_items} {floor.name(dtype)}", run, work)
    (*inputs, anchor), _ = next(_aggregations(device, torch.float16, ((_TIMED_PICTURES, 196, 512, 102, 39),)))
    work = floor.atrm(_TIMED_PICTURES, 196, 512, 102, 39, torch.float16)
    yield _speed(f"atrm {_TIMED_PICTURES} x 196 float16", partial(atrm, *inputs, anchor=anchor), work)


def _speed(name: str, run: Callable[[], Tensor], work: floor.Work) -> Speed:
    run()
    seconds = median(floor.timed(run) for _ in range(_ROUNDS))
    peaks = floor.peaks()
    product_rate = peaks["flops/s"].get(floor.name(work.dtype), float("inf"))
    return Speed(name, 1e3 * seconds, work.bytes / seconds / peaks["bytes/s"], work.flops / seconds / product_rate)


# Shared ---------------------------------------------------------------------------------------------------------------


def _source(device: torch.device, seed: int) -> Callable[..., Tensor]:
    """Source of normal random numbers of any shape, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


def _tolerance(dtype: torch.dtype) -> float:
    return max(_FLOAT32_ERROR, _ROUNDINGS * torch.finfo(dtype).eps)


def _gradient_trial(loss: Callable[..., Tensor], exact_loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Trial:
    """The gradients of all inputs, each relative to its largest entry."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = torch.autograd.grad(exact_loss(*exact_leaves), exact_leaves)
    # A gradient that is 0 by nature, such as that of a bias before a softmax, is taken relative to the largest of all.
    sizes = [gradient.abs().max().item() for gradient in exact]
    largest = [size if size > 1e-9 * max(sizes) else max(sizes) for size in sizes]

    def beside_largest(gradients: Sequence[Tensor]) -> Tensor:
        parts = zip(gradients, largest, strict=True)
        return torch.cat([(gradient.double() / size).flatten() for gradient, size in parts])

    def run() -> Tensor:
        with torch.enable_grad():
            return beside_largest(torch.autograd.grad(loss(*leaves), leaves))

    return Trial(run, beside_largest(exact), 2 * _tolerance(inputs[0].dtype))


KERNELS: dict[str, Callable[[torch.device], Iterator[Trial]]] = {
    "clim-float32": partial(_clim, torch.float32),
    "clim-float16": partial(_clim, torch.float16),
    "clim-bfloat16": partial(_clim, torch.bfloat16),
    "clim-int8": _clim_int8,
    "clim-gradient-float32": partial(_clim_gradient, torch.float32),
    "clim-gradient-float16": partial(_clim_gradient, torch.float16),
    "topk": partial(_topk, False),
    "topk-int8": partial(_topk, True),
    "atrm-float32": partial(_atrm, torch.float32),
    "atrm-float16": partial(_atrm, torch.float16),
    "atrm-bfloat16": partial(_atrm, torch.bfloat16),
    "atrm-gradient-float32": partial(_atrm_gradient, torch.float32),
    "atrm-gradient-float16": partial(_atrm_gradient, torch.float16),
}
"""Checks by name."""
