"""Token aggregation as two Triton launches; the operation itself is defined in :mod:`finelip_fast.kernels.atrm.formula`.

1. *Logits*, one program for each tile of an item's tokens. LayerNorm is folded into the first product,
   ``LayerNorm(x) @ W1.T + b1 = rstd * (x @ W'.T - mean * u) + c`` with ``W' = W1 * norm_weight``, ``u = W'.sum(1)`` and
   ``c = W1 @ norm_bias + b1``, so that ``x`` goes to the tensor cores as stored in memory; GELU and the second product
   follow in registers. A tile past its item's length exits at once, so nothing is repacked and the host reads no lengths.
2. *Pool*, one program for each item and each tile of aggregated tokens: the softmax's maximum and sum over the logits,
   then ``weights.T @ x`` with all of ``D`` in registers, so that the row's norm is known before anything is written.

Sums, softmax and norms are float32; float32 inputs are multiplied in full float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from finelip_fast.kernels import settings as _settings
from finelip_fast.kernels.atrm.formula import LAYER_NORM_EPS, AtrmInputs
from finelip_fast.kernels.atrm.parts_triton import (
    INTERPRETED,
    LAUNCH_OPTIONS,
    NORMALIZE_EPS,
    SMALLEST_TILE,
    capability_of,
    has_own_products,
    pooled_sum,
    power_of_two,
    softmax_statistics,
    unit_stride,
    valid_tokens,
)

_LAYER_NORM_EPS = tl.constexpr(LAYER_NORM_EPS)
# With fewer items than this, an item is pooled by more programs, although each reads all of its tokens.
_FEW_ITEMS = 32
# Most rows of one program of the pool. From 64 on, Hopper's products run asynchronously and take the weights from registers,
# which Triton then writes while they are read (triton-lang/triton#9433). As measured on an H200, 16 rows are also faster.
_MOST_ROWS = 32


@triton.jit
def _second_layer(
    product, mean, rstd, h, k, column_sum, constant, w2, logits, H: tl.constexpr, K: tl.constexpr, dtype: tl.constexpr
):
    """Add to `logits` what the hidden units `h` give: the rest of the folded LayerNorm, GELU, second product."""
    u = tl.load(column_sum + h, mask=h < H, other=0.0)
    c = tl.load(constant + h, mask=h < H, other=0.0)
    before = (product - mean[:, None] * u[None, :]) * rstd[:, None] + c[None, :]
    hidden = 0.5 * before * (1.0 + tl.erf(before * 0.7071067811865476))
    weight = tl.load(w2 + k[None, :] * H + h[:, None], mask=(k < K)[None, :] & (h < H)[:, None], other=0.0)
    return tl.dot(hidden.to(dtype), weight.to(dtype), logits, input_precision="ieee")


@triton.jit
def logits_kernel(
    x,
    weight,
    column_sum,
    constant,
    w2,
    b2,
    scale,
    lengths,
    logits,
    tokens,
    stride_item,
    stride_token,
    D: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TWICE: tl.constexpr,
):
    """``x [B, N, D]`` to ``logits [B, N, K]``; rows at and after an item's length are left as they are.

    The ``H`` hidden units are held as ``HEAD + REST``, two powers of two: 153 as 128 + 32 instead of 256.

    With ``TWICE`` each tile is loaded once for its product and once for its mean and variance. If products run
    asynchronously, Triton gives a tile that is also read into registers one buffer too few, and the next tiles overwrite it
    while it is multiplied (triton-lang/triton#6691).
    """
    tiles = tl.cdiv(tokens, BLOCK_N)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK_N
    length = valid_tokens(lengths, item, tokens)
    if start >= length:
        return
    dtype: tl.constexpr = x.dtype.element_ty
    n = start + tl.arange(0, BLOCK_N)
    valid = (n < length)[:, None]
    rows = (x + item * stride_item + n.to(tl.int64) * stride_token)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    h = tl.arange(0, HEAD)
    head = tl.zeros([BLOCK_N, HEAD], tl.float32)
    if REST > 0:
        h_rest = HEAD + tl.arange(0, REST)
        rest = tl.zeros([BLOCK_N, REST], tl.float32)

    # The variance is taken about the mean of the first columns: its loss of digits is then bounded (by D / BLOCK_D),
    # however large a token's mean is beside its spread.
    first = tl.load(rows + d, mask=valid & (d < D), other=0.0).to(tl.float32)
    shift = tl.sum(first, axis=1) * (1.0 / min(BLOCK_D, D))
    total = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        inside = start_d + d < D
        tile = tl.load(rows + start_d + d, mask=valid & inside, other=0.0)
        statistics_tile = tile
        if TWICE:  # the policy distinguishes the two loads, which would otherwise be merged
            statistics_tile = tl.load(rows + start_d + d, mask=valid & inside, other=0.0, eviction_policy="evict_first")
        centred = tl.where(inside, statistics_tile.to(tl.float32) - shift[:, None], 0.0)
        total += tl.sum(centred, axis=1)
        squares += tl.sum(centred * centred, axis=1)
        if dtype == tl.float32:
            # Half precision needs no such care: its products are exact, and no value is far below the mean's last bit.
            tile = centred
        columns = start_d + tl.arange(0, BLOCK_D)[:, None]
        weight_tile = tl.load(weight + h[None, :] * D + columns, mask=(h < H)[None, :] & (columns < D), other=0.0)
        head = tl.dot(tile, weight_tile, head, input_precision="ieee")
        if REST > 0:
            weight_tile = tl.load(
                weight + h_rest[None, :] * D + columns, mask=(h_rest < H)[None, :] & (columns < D), other=0.0
            )
            rest = tl.dot(tile, weight_tile, rest, input_precision="ieee")
    mean = total * (1.0 / D)  # of `centred`
    rstd = tl.rsqrt(tl.maximum(squares * (1.0 / D) - mean * mean, 0.0) + _LAYER_NORM_EPS)
    if dtype != tl.float32:
        mean += shift  # of `tile`, which was not centred

    k = tl.arange(0, BLOCK_K)
    result = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    result = _second_layer(head, mean, rstd, h, k, column_sum, constant, w2, result, H, K, dtype)
    if REST > 0:
        result = _second_layer(rest, mean, rstd, h_rest, k, column_sum, constant, w2, result, H, K, dtype)
    bias = tl.load(b2 + k, mask=k < K, other=0.0).to(tl.float32)
    result = (result + bias[None, :]) * tl.load(scale).to(tl.float32)
    tl.store(logits + (item * tokens + n)[:, None] * K + k[None, :], result, mask=valid & (k < K)[None, :])


@triton.jit
def pool_kernel(
    x,
    logits,
    lengths,
    anchor,
    out,
    tokens,
    stride_item,
    stride_token,
    stride_anchor,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out [B, K + 1, D]``: the normalised anchor, then the normalised ``softmax(logits).T @ x``."""
    k_tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    item = (tl.program_id(0) // k_tiles).to(tl.int64)
    k_tile = tl.program_id(0) % k_tiles
    k = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = out.dtype.element_ty
    length = valid_tokens(lengths, item, tokens)
    out += item * ((K + 1) * D)
    logits += item * tokens * K

    largest, total = softmax_statistics(logits, k, length, K, BLOCK_K, BLOCK_N)
    rows = x + item * stride_item
    sums = pooled_sum(rows, stride_token, logits, k, largest, length, D, K, BLOCK_K, BLOCK_N, BLOCK_D, dtype, "ieee")
    # Without a token the sum is 0, and so must the row be; with one it is at least 1, the largest logit's own share.
    scale = 1.0 / tl.maximum(total, 1.0)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for chunk in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        pooled = sums[chunk] * scale[:, None]
        squares += tl.sum(pooled * pooled, axis=1)
    scale /= tl.maximum(tl.sqrt(squares), NORMALIZE_EPS)
    for chunk in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        columns = chunk * BLOCK_D + d
        tl.store(
            out + (k + 1)[:, None] * D + columns[None, :],
            (sums[chunk] * scale[:, None]).to(dtype),
            mask=(k < K)[:, None] & (columns < D)[None, :],
        )
    if k_tile == 0:
        square = 0.0
        for start in range(0, D, BLOCK_D):
            part = tl.load(anchor + item * stride_anchor + start + d, mask=start + d < D, other=0.0).to(tl.float32)
            square += tl.sum(part * part)
        norm = tl.maximum(tl.sqrt(square), NORMALIZE_EPS)
        for start in range(0, D, BLOCK_D):
            part = tl.load(anchor + item * stride_anchor + start + d, mask=start + d < D, other=0.0).to(tl.float32)
            tl.store(out + start + d, (part / norm).to(dtype), mask=start + d < D)


class Folded(NamedTuple):
    """LayerNorm and the first linear layer as one: ``rstd * (x @ weight.T - mean * column_sum) + constant``."""

    weight: Tensor  # [h, D], in the tokens' dtype
    column_sum: Tensor  # [h], float32, of the weight as rounded
    constant: Tensor  # [h], float32


def fold(inputs: AtrmInputs) -> Folded:
    """Fold LayerNorm's weights into the first linear layer; for the same parameters and dtype of ``x``, once is enough."""
    wide = inputs.w1.float()
    weight = (wide * inputs.norm_weight.float()).to(inputs.x.dtype)
    return Folded(
        weight=weight,
        column_sum=weight.sum(dim=1, dtype=torch.float32),
        constant=(wide * inputs.norm_bias.float()).sum(dim=1) + inputs.b1.float(),
    )


@dataclass(frozen=True)
class AtrmSettings:
    """Tile sizes of the two launches, all powers of two."""

    logits_tokens: int  # per program
    logits_width: int  # columns of D per step
    logits_warps: int
    logits_stages: int
    pool_rows: int  # aggregated tokens of one program, 16 or 32
    pool_tokens: int  # per step
    pool_width: int  # columns of one accumulator
    pool_warps: int
    pool_stages: int


def default_settings(
    *, capability: int, width: int, aggregated: int, dtype: torch.dtype, items: int = 1024
) -> AtrmSettings:
    """Settings that fit any GPU of capability 80 or more, up to ``D = 1280``, ``h = 256`` and ``K = 64``.

    In half precision they spill nothing. Float32 is for exactness rather than speed, and may spill.

    Args:
        capability: Compute capability of the GPU: 80, 90, 120, ...
        width: ``D``.
        aggregated: ``K``.
        dtype: Dtype of the tokens.
        items: ``B``. If there are few, each is spread over more programs.
    """
    half = dtype.itemsize == 2
    pool_width = min(256 if half else 128, power_of_two(width))
    accumulated = triton.cdiv(width, pool_width) * pool_width  # columns of a row of accumulators
    few_rows = not half or items < _FEW_ITEMS or capability == 90 or accumulated > 768
    if not half:  # multiplied without tensor cores, which takes registers: small tiles, many threads
        tokens, columns, warps, stages = 16, 16, 16, 2
    else:
        tokens, columns, warps, stages = 64, 64 if capability == 90 else 32, 4 if width <= 768 else 8, 3
    return AtrmSettings(
        logits_tokens=tokens,
        logits_width=columns,
        logits_warps=warps,
        logits_stages=stages,
        pool_rows=min(16 if few_rows else 32, power_of_two(aggregated)),
        pool_tokens=32 if half else 16,
        pool_width=pool_width,
        pool_warps=8,
        pool_stages=2,
    )


class Launch(NamedTuple):
    """Launch that settings are chosen for; its fields are the arguments of :func:`default_settings`."""

    capability: int
    width: int
    aggregated: int
    dtype: torch.dtype
    items: int

    @property
    def case(self) -> str:
        """Name in the table of tuned settings, which distinguishes few and many items."""
        sizes = {"D": self.width, "K": self.aggregated, "B": 1 if self.items < _FEW_ITEMS else 1024}
        return _settings.key("atrm", capability=self.capability, dtype=self.dtype, **sizes)


@_settings.until_saved
def settings_for(launch: Launch) -> AtrmSettings:
    """Tuned settings if there are any, otherwise the default ones."""
    return _settings.tuned(launch.case, AtrmSettings) or default_settings(**launch._asdict())


def aggregate(inputs: AtrmInputs, *, settings: AtrmSettings | None = None) -> Tensor:
    """:func:`finelip_fast.kernels.atrm` without its checks: ``x [B, N, D]`` to ``[B, K + 1, D]`` in ``x``'s dtype.

    Takes any strides and any ``B``, ``N``, ``D``, ``h`` and ``K``; parameters and anchor may have another dtype than ``x``.

    Raises:
        KernelError: No GPU.
    """
    return aggregate_folded(inputs, fold(inputs), settings=settings)


def aggregate_folded(inputs: AtrmInputs, folded: Folded, *, settings: AtrmSettings | None = None) -> Tensor:
    """:func:`aggregate` with parameters that were folded before."""
    x = inputs.x
    if INTERPRETED and x.dtype == torch.bfloat16:  # which the interpreter multiplies as integers
        folded = folded._replace(weight=folded.weight.float())
        return aggregate_folded(inputs._replace(x=x.float()), folded, settings=settings).to(x.dtype)
    (items, tokens, width), aggregated = x.shape, inputs.w2.shape[0]
    settings = settings or settings_for(Launch(capability_of(x.device), width, aggregated, x.dtype, items))
    if aggregated == 0:  # no program would write the anchors
        return F.normalize(inputs.anchor.float(), dim=-1).to(x.dtype)[:, None]
    x, anchor = unit_stride(x), unit_stride(inputs.anchor)
    lengths = None if inputs.lengths is None else inputs.lengths.contiguous()
    logits = token_logits(inputs._replace(x=x, lengths=lengths), folded, settings)
    out = torch.empty(items, aggregated + 1, width, dtype=x.dtype, device=x.device)
    pool_rows = min(settings.pool_rows, _MOST_ROWS)
    with torch.cuda.device_of(x):
        pool_kernel[(items * triton.cdiv(aggregated, pool_rows),)](
            x,
            logits,
            lengths,
            anchor,
            out,
            tokens,
            x.stride(0),
            x.stride(1),
            anchor.stride(0),
            D=width,
            K=aggregated,
            BLOCK_K=pool_rows,
            BLOCK_N=settings.pool_tokens,
            BLOCK_D=settings.pool_width,
            num_warps=settings.pool_warps,
            num_stages=settings.pool_stages,
            **LAUNCH_OPTIONS,
        )
    return out


def token_logits(inputs: AtrmInputs, folded: Folded, settings: AtrmSettings) -> Tensor:
    """Run the first launch: float32 ``[B, N, K]``, undefined at and after each item's length.

    The last dimension of ``x`` and ``lengths`` must be contiguous.
    """
    x = inputs.x
    (items, tokens, width), (aggregated, hidden) = x.shape, inputs.w2.shape
    head, rest = split_hidden(hidden)
    logits = torch.empty(items, tokens, aggregated, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        logits_kernel[(items * triton.cdiv(tokens, settings.logits_tokens),)](
            x,
            folded.weight,
            folded.column_sum,
            folded.constant,
            inputs.w2.contiguous(),
            inputs.b2.contiguous(),
            inputs.scale,
            inputs.lengths,
            logits,
            tokens,
            x.stride(0),
            x.stride(1),
            D=width,
            H=hidden,
            K=aggregated,
            HEAD=head,
            REST=rest,
            BLOCK_K=power_of_two(aggregated),
            BLOCK_N=settings.logits_tokens,
            BLOCK_D=settings.logits_width,
            TWICE=x.dtype.itemsize == 2 and has_own_products(x.device),
            num_warps=settings.logits_warps,
            num_stages=settings.logits_stages,
            **LAUNCH_OPTIONS,
        )
    return logits


def split_hidden(hidden: int) -> tuple[int, int]:
    """Split ``h`` into one or two powers of two that hold it, whichever wastes less; the second is 0 if one does."""
    rounded = power_of_two(hidden)
    head = rounded // 2
    rest = power_of_two(hidden - head)
    return (head, rest) if head >= SMALLEST_TILE and head + rest < rounded else (rounded, 0)
