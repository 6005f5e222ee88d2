"""Middle part of token aggregation's gradient on the GPU: from the gradients of rows to those of logits and tokens.

The formulas and the other parts are in ``gradient.py``. There are two kernels, one over rows and one over tokens. Every value
has one owner, so there are no atomics, and every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finelip_fast.kernels import settings as _settings
from finelip_fast.kernels.atrm import gradient as reference
from finelip_fast.kernels.atrm.formula import AtrmInputs
from finelip_fast.kernels.atrm.parts_triton import (
    LAUNCH_OPTIONS,
    NORMALIZE_EPS,
    capability_of,
    load_logits,
    pooled_sum,
    power_of_two,
    softmax_statistics,
    unit_stride,
    valid_tokens,
)

# Tensor cores at float32 precision: each product consists of three.
PRECISION = tl.constexpr("tf32x3")

# Elements of x in one block of items, 64 MiB in float32.
_BLOCK_ELEMENTS = 1 << 24


@triton.jit
def row_gradient_kernel(
    x,
    logits,
    lengths,
    grad_out,
    row_grad,
    log_total,
    offset,
    tokens,
    stride_grad_item,
    stride_grad_row,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``dp [B, K, D]``; ``log_total [B, K]`` with ``w = exp(l - log_total)``; ``offset [B, K]``, ``p . dp``."""
    k_tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    item = (tl.program_id(0) // k_tiles).to(tl.int64)
    k = tl.program_id(0) % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)[None, :]
    length = valid_tokens(lengths, item, tokens)
    x += item * tokens * D
    logits += item * tokens * K
    grad_rows = (grad_out + item * stride_grad_item + (k + 1).to(tl.int64) * stride_grad_row)[:, None]

    largest, total = softmax_statistics(logits, k, length, K, BLOCK_K, BLOCK_N)
    total = tl.maximum(total, 1.0)  # as in the forward pass: for an item without tokens
    sums = pooled_sum(x, D, logits, k, largest, length, D, K, BLOCK_K, BLOCK_N, BLOCK_D, tl.float32, PRECISION)
    scale = (1.0 / total)[:, None]
    squares = tl.zeros([BLOCK_K], tl.float32)
    product = tl.zeros([BLOCK_K], tl.float32)
    for chunk in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        columns = chunk * BLOCK_D + d
        grad = tl.load(grad_rows + columns, mask=(k < K)[:, None] & (columns < D), other=0.0).to(tl.float32)
        pooled = sums[chunk] * scale
        squares += tl.sum(pooled * pooled, axis=1)
        product += tl.sum(pooled * grad, axis=1)
    norm = tl.sqrt(squares)
    clamped = norm <= NORMALIZE_EPS
    norm = tl.maximum(norm, NORMALIZE_EPS)
    along = tl.where(clamped, 0.0, product / norm / norm)[:, None]
    # From dp as rounded, although p . dp is 0 except for clamped rows: its rounding error is in every x . dp, too.
    pooled_product = tl.zeros([BLOCK_K], tl.float32)
    for chunk in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        columns = chunk * BLOCK_D + d
        inside = (k < K)[:, None] & (columns < D)
        grad = tl.load(grad_rows + columns, mask=inside, other=0.0).to(tl.float32)
        pooled = sums[chunk] * scale
        through_norm = (grad - pooled * along) / norm[:, None]
        pooled_product += tl.sum(pooled * through_norm, axis=1)
        tl.store(row_grad + (item * K + k)[:, None] * D + columns, through_norm, mask=inside)
    tl.store(log_total + item * K + k, largest + tl.log(total), mask=k < K)
    tl.store(offset + item * K + k, pooled_product, mask=k < K)


@triton.jit
def token_gradient_kernel(
    x,
    logits,
    lengths,
    row_grad,
    log_total,
    offset,
    grad_logits,
    grad_x,
    tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``dl [B, N, K]`` and the direct part of ``dx [B, N, D]``; exactly 0 at and after an item's length."""
    tiles = tl.cdiv(tokens, BLOCK_N)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    length = valid_tokens(lengths, item, tokens)
    valid = (n < length)[:, None]
    exists = (n < tokens)[:, None]
    rows = (item * tokens + n)[:, None]
    row_grad += item * (K * D)

    grad_weights = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + d
        tile = tl.load(x + rows * D + columns[None, :], mask=valid & (columns < D)[None, :], other=0.0)
        inside = (k < K)[None, :] & (columns < D)[:, None]
        grad = tl.load(row_grad + k[None, :] * D + columns[:, None], mask=inside, other=0.0)
        grad_weights = tl.dot(tile, grad, grad_weights, input_precision=PRECISION)
    shift = tl.load(log_total + item * K + k, mask=k < K, other=0.0)[None, :]
    mean = tl.load(offset + item * K + k, mask=k < K, other=0.0)[None, :]
    values = load_logits(logits + item * tokens * K, n[:, None], k[None, :], length, K)
    weights = tl.where(valid, tl.exp(values - shift), 0.0)
    through_softmax = tl.where(valid, weights * (grad_weights - mean), 0.0)
    tl.store(grad_logits + rows * K + k[None, :], through_softmax, mask=exists & (k < K)[None, :])
    for start in range(0, D, BLOCK_D):
        columns = start + d
        inside = (k < K)[:, None] & (columns < D)[None, :]
        grad = tl.load(row_grad + k[:, None] * D + columns[None, :], mask=inside, other=0.0)
        direct = tl.where(valid, tl.dot(weights, grad, input_precision=PRECISION), 0.0)
        tl.store(grad_x + rows * D + columns[None, :], direct, mask=exists & (columns < D)[None, :])


@dataclass(frozen=True)
class AtrmGradientSettings:
    """Tile sizes of the two launches, all powers of two."""

    row_rows: int  # aggregated tokens of one program
    row_tokens: int  # per step
    row_width: int  # columns of one accumulator
    row_warps: int
    row_stages: int
    token_tokens: int  # per program
    token_width: int  # columns of D per step
    token_warps: int
    token_stages: int


def default_settings(*, capability: int, width: int, aggregated: int) -> AtrmGradientSettings:
    """Settings that fit any GPU of capability 80 or more and spill nothing, up to ``D = 1280`` and ``K = 64``.

    Args:
        capability: Compute capability of the GPU: 80, 90, 120, ...
        width: ``D``.
        aggregated: ``K``.
    """
    return AtrmGradientSettings(
        row_rows=16,
        row_tokens=16,
        row_width=min(256, power_of_two(width)),
        row_warps=8,
        row_stages=2,
        token_tokens=64 if capability == 90 and aggregated <= 64 else 32,
        token_width=32,
        token_warps=4,
        token_stages=2,
    )


class Launch(NamedTuple):
    """Launch that settings are chosen for; its fields are the arguments of :func:`default_settings`."""

    capability: int
    width: int
    aggregated: int

    @property
    def case(self) -> str:
        """Name in the table of tuned settings; internally, everything is float32."""
        sizes = {"D": self.width, "K": self.aggregated}
        return _settings.key("atrm_gradient", capability=self.capability, dtype=torch.float32, **sizes)


@_settings.until_saved
def settings_for(launch: Launch) -> AtrmGradientSettings:
    """Tuned settings if there are any, otherwise the default ones."""
    return _settings.tuned(launch.case, AtrmGradientSettings) or default_settings(**launch._asdict())


def gradient(
    grad_out: Tensor, inputs: AtrmInputs, *, settings: AtrmGradientSettings | None = None
) -> reference.Gradients:
    """Compute the gradient of :func:`finelip_fast.kernels.atrm.triton.aggregate`, with the same bits every time.

    Arguments and result are those of :func:`finelip_fast.kernels.atrm.gradient.gradient`.

    Raises:
        KernelError: No GPU.
    """
    x = inputs.x
    settings = settings or settings_for(Launch(capability_of(x.device), x.shape[2], inputs.w2.shape[0]))
    with torch.cuda.device_of(x):
        return reference.gradient(
            grad_out,
            inputs,
            through_softmax=partial(_through_softmax, settings=settings),
            block_elements=_BLOCK_ELEMENTS,
        )


def _through_softmax(
    grad_out: Tensor, x: Tensor, logits: Tensor, lengths: Tensor | None, settings: AtrmGradientSettings
) -> tuple[Tensor, Tensor]:
    if logits.shape[2] == 0:
        return torch.empty_like(logits), torch.zeros_like(x)
    grad_out = unit_stride(grad_out)
    (items, tokens, width), aggregated = x.shape, logits.shape[2]
    row_grad = x.new_empty(items, aggregated, width)
    log_total, offset = x.new_empty(2, items, aggregated)
    grad_logits, grad_x = torch.empty_like(logits), torch.empty_like(x)
    row_gradient_kernel[(items * triton.cdiv(aggregated, settings.row_rows),)](
        x,
        logits,
        lengths,
        grad_out,
        row_grad,
        log_total,
        offset,
        tokens,
        grad_out.stride(0),
        grad_out.stride(1),
        D=width,
        K=aggregated,
        BLOCK_K=settings.row_rows,
        BLOCK_N=settings.row_tokens,
        BLOCK_D=settings.row_width,
        num_warps=settings.row_warps,
        num_stages=settings.row_stages,
        **LAUNCH_OPTIONS,
    )
    token_gradient_kernel[(items * triton.cdiv(tokens, settings.token_tokens),)](
        x,
        logits,
        lengths,
        row_grad,
        log_total,
        offset,
        grad_logits,
        grad_x,
        tokens,
        D=width,
        K=aggregated,
        BLOCK_K=power_of_two(aggregated),
        BLOCK_N=settings.token_tokens,
        BLOCK_D=settings.token_width,
        num_warps=settings.token_warps,
        num_stages=settings.token_stages,
        **LAUNCH_OPTIONS,
    )
    return grad_logits, grad_x
