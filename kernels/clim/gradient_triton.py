"""The gradient of late interaction on the GPU: one byte saved for each maximum, and no atomics.

In the forward pass, the sweep of ``triton.py`` also records the winner of each maximum: a 7-bit index, with the high bit set
if the maximum is not positive, so that leaky ReLU's slope applies. For a score gradient of 1, the gradient of ``S`` for one
pair is then a matrix with one entry for each maximum and one for the global cosine::

    P[s, t] = (1 - alpha) * (slope_s [query_winner_s = t] / L_q + slope_t [item_winner_t = s] / L_i) + alpha [s = t = 0]

    grad_queries[q] = sum over n of grad_scores[q, n] * P(q, n)   @ items[n]
    grad_items[n]   = sum over q of grad_scores[q, n] * P(q, n).T @ queries[q]

``P`` is rebuilt pair by pair in registers, and each program sums its rows in a fixed order, so every run gives the same bits.
The score gradients are multiplied in float32, after the product, because float16 would lose the small ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finelip_fast.errors import InputError
from finelip_fast.kernels import settings as _settings
from finelip_fast.kernels.clim.formula import LEAKY_SLOPE, MAX_GRADIENT_TOKENS
from finelip_fast.kernels.clim.launches import ClimSettings
from finelip_fast.kernels.clim.triton import (
    FLOATS,
    INTERPRETED,
    check_inputs,
    is_nothing,
    launch,
    readable,
)

_SLOPE = tl.constexpr(LEAKY_SLOPE)


@dataclass(frozen=True)
class ClimGradientSettings:
    """Tiling of the gradient; it affects only the speed and the order of rounding."""

    block_sets: int  # queries (or items) of one program, a power of two
    block_width: int  # piece of D of one program, a power of two, at least 16
    num_warps: int = 4
    num_stages: int = 3


def default_settings(*, capability: int, dtype: torch.dtype, width: int, tokens: int) -> ClimGradientSettings:
    """Default settings for a case that was not tuned.

    Args:
        capability: Compute capability of the GPU: 80, 90, 120, ...
        dtype: Dtype of the embeddings.
        width: ``D``.
        tokens: The larger of ``L_q`` and ``L_i``.
    """
    if dtype == torch.float32 or tokens > 64:
        # Full products, and long rows of the one-hot matrix, are held in registers.
        return ClimGradientSettings(1, 32 if dtype == torch.float32 else 64, num_warps=8, num_stages=2)
    stages = 3 if capability in (80, 90, 100, 103) else 2  # the others have 99 KB of shared memory
    return ClimGradientSettings(1, min(256, max(16, triton.next_power_of_2(width))), num_warps=8, num_stages=stages)


class Launch(NamedTuple):
    """Launch that settings are chosen for; its fields are the arguments of :func:`default_settings`."""

    capability: int
    dtype: torch.dtype
    width: int
    tokens: int

    @property
    def case(self) -> str:
        """Name in the table of tuned settings."""
        sizes = {"D": self.width, "L": self.tokens}
        return _settings.key("clim_gradient", capability=self.capability, dtype=self.dtype, **sizes)


@_settings.until_saved
def settings_for(launch: Launch) -> ClimGradientSettings:
    """Tuned settings if there are any, otherwise the default ones."""
    return _settings.tuned(launch.case, ClimGradientSettings) or default_settings(**launch._asdict())


@triton.jit
def load_pairs(grad_scores, x_winners, y_winners, pair, s, t, X_TOKENS: tl.constexpr, Y_TOKENS: tl.constexpr):
    """Each pair's gradient of the score, and the bytes of its winners, ``[SETS, X_ROWS]`` and ``[SETS, Y_ROWS]``."""
    by_s = tl.load(x_winners + (pair * X_TOKENS)[:, None] + s[None, :], mask=(s < X_TOKENS)[None, :], other=0)
    by_t = tl.load(y_winners + (pair * Y_TOKENS)[:, None] + t[None, :], mask=(t < Y_TOKENS)[None, :], other=0)
    return tl.load(grad_scores + pair), by_s.to(tl.int32), by_t.to(tl.int32)


@triton.jit(do_not_specialize=["n_x", "n_y", "x_stride", "y_stride"])
def gradient_kernel(
    grad_scores,
    x_winners,
    y_winners,
    y,
    grad_x,
    n_x,
    n_y,
    alpha,
    x_stride,
    y_stride,
    y_set_stride,
    y_token_stride,
    X_TOKENS: tl.constexpr,
    Y_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SETS: tl.constexpr,
    X_ROWS: tl.constexpr,
    Y_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The gradient of one side, ``x``: ``BLOCK_SETS`` of its sets against every set of the other side, ``y``.

    Pair ``(x, y)`` is number ``x * x_stride + y * y_stride`` of the scores and of the winners.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_SETS + tl.arange(0, BLOCK_SETS)
    pair = tl.minimum(row, n_x - 1) * x_stride  # past the end: the last set once more, never stored
    s = tl.arange(0, X_ROWS)
    t = tl.arange(0, Y_ROWS)
    d = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    is_y = (t < Y_TOKENS)[:, None] & (d < WIDTH)[None, :]
    y_rows = y + t.to(tl.int64)[:, None] * y_token_stride + d[None, :]

    last_pair = n_x.to(tl.int64) * n_y - 1
    grad, by_s, by_t = load_pairs(grad_scores, x_winners, y_winners, pair, s, t, X_TOKENS, Y_TOKENS)
    total = tl.zeros([BLOCK_SETS * X_ROWS, BLOCK_WIDTH], tl.float32)
    for _ in range(n_y):
        # The next pairs are loaded before these are processed, because every use of a byte waits for it.
        pair = tl.minimum(pair + y_stride, last_pair)
        next_grad, next_by_s, next_by_t = load_pairs(grad_scores, x_winners, y_winners, pair, s, t, X_TOKENS, Y_TOKENS)
        share_s = tl.where(by_s < 128, 1.0, _SLOPE) * ((1.0 - alpha) / X_TOKENS)
        share_t = tl.where(by_t < 128, 1.0, _SLOPE) * ((1.0 - alpha) / Y_TOKENS)
        p = tl.where((by_s & 127)[:, :, None] == t[None, None, :], share_s[:, :, None], 0.0)
        p += tl.where((by_t & 127)[:, None, :] == s[None, :, None], share_t[:, None, :], 0.0)
        p += tl.where((s[:, None] == 0) & (t[None, :] == 0), alpha, 0.0)[None, :, :]
        y_tile = tl.load(y_rows, mask=is_y, other=0.0)
        p = tl.reshape(p, [BLOCK_SETS * X_ROWS, Y_ROWS]).to(y_tile.dtype)
        product = tl.dot(p, y_tile, input_precision="ieee")
        grad_rows = tl.reshape(tl.broadcast_to(grad[:, None], [BLOCK_SETS, X_ROWS]), [BLOCK_SETS * X_ROWS])
        total += grad_rows[:, None] * product
        y_rows += y_set_stride
        grad, by_s, by_t = next_grad, next_by_s, next_by_t

    at = tl.reshape(row[:, None] * X_TOKENS + s[None, :], [BLOCK_SETS * X_ROWS])
    stored = tl.reshape((row < n_x)[:, None] & (s < X_TOKENS)[None, :], [BLOCK_SETS * X_ROWS])
    stored = stored[:, None] & (d < WIDTH)[None, :]
    tl.store(grad_x + at[:, None] * WIDTH + d[None, :], total.to(grad_x.dtype.element_ty), mask=stored)


def scores_with_winners(
    queries: Tensor, items: Tensor, *, alpha: float, settings: ClimSettings | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the scores, and the winner of each maximum for :func:`gradient`.

    Args:
        queries: ``[Q, L_q, D]``, float32, float16 or bfloat16.
        items: ``[N, L_i, D]`` in the same dtype. Both sides have at most 128 tokens.
        alpha: Weight of the global cosine.
        settings: Launch settings; None means :func:`~finelip_fast.kernels.clim.launches.settings_for`.

    Returns:
        ``(scores float32 [Q, N], query_winners uint8 [Q, N, L_q], item_winners uint8 [Q, N, L_i])``. The low 7 bits of
        ``query_winners[q, n, s]`` are the item token that row ``s`` of query ``q`` is most similar to, the first of
        equals; the high bit is set if that similarity is not positive. ``item_winners`` is the other direction. If the
        other side's set is empty, nothing wins and these bytes have no meaning.

    Raises:
        InputError: Shapes or dtypes that do not fit together, or too many tokens.
        KernelError: No GPU.
    """
    capability = _check(queries, items)
    out = torch.empty(queries.shape[0], items.shape[0], dtype=torch.float32, device=queries.device)
    query_winners = torch.empty(*out.shape, queries.shape[1], dtype=torch.uint8, device=out.device)
    item_winners = torch.empty(*out.shape, items.shape[1], dtype=torch.uint8, device=out.device)
    if is_nothing(queries, items):
        return out.zero_(), query_winners.zero_(), item_winners.zero_()
    launch(queries, items, out, alpha, capability, settings, winners=(query_winners, item_winners))
    return out, query_winners, item_winners


def gradient(
    grad_scores: Tensor,
    queries: Tensor,
    items: Tensor,
    query_winners: Tensor,
    item_winners: Tensor,
    *,
    alpha: float,
    settings: ClimGradientSettings | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of queries and items from the gradient of their scores.

    Args:
        grad_scores: ``[Q, N]``, any strides, any floating dtype.
        queries, items, alpha: As given to :func:`scores_with_winners`.
        query_winners, item_winners: As returned by it.
        settings: Settings of the gradient; None means :func:`settings_for`.

    Returns:
        ``(grad_queries [Q, L_q, D], grad_items [N, L_i, D])`` in the inputs' dtype, summed in float32. A maximum's
        gradient goes to its single winner, with leaky ReLU's slope if it is not positive, as in PyTorch.

    Raises:
        InputError: Shapes or dtypes that do not fit together, or too many tokens.
        KernelError: No GPU.
    """
    capability = _check(queries, items)
    pairs = (queries.shape[0], items.shape[0])
    expected = (pairs, (*pairs, queries.shape[1]), (*pairs, items.shape[1]))
    got_shapes = (grad_scores.shape, query_winners.shape, item_winners.shape)
    if got_shapes != expected:
        shapes = [[list(shape) for shape in shapes] for shapes in (expected, got_shapes)]
        raise InputError(f"expected grad_scores, query_winners, item_winners of shapes {shapes[0]}, got {shapes[1]}")
    grad_queries, grad_items = (
        torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) for rows in (queries, items)
    )
    if is_nothing(queries, items):
        return grad_queries.zero_(), grad_items.zero_()
    if settings is None:
        tokens = max(queries.shape[1], items.shape[1])
        settings = settings_for(Launch(capability, queries.dtype, queries.shape[2], tokens))
    grad_scores = grad_scores.float().contiguous()
    query_winners, item_winners = query_winners.contiguous(), item_winners.contiguous()
    _one_side(grad_scores, query_winners, item_winners, items, grad_queries, (pairs[1], 1), alpha, settings)
    _one_side(grad_scores, item_winners, query_winners, queries, grad_items, (1, pairs[1]), alpha, settings)
    return grad_queries, grad_items


def _one_side(
    grad_scores: Tensor,
    x_winners: Tensor,
    y_winners: Tensor,
    y: Tensor,
    grad_x: Tensor,
    pair_strides: tuple[int, int],
    alpha: float,
    settings: ClimGradientSettings,
) -> None:
    """Fill `grad_x`."""
    y = readable(y)
    grid = (triton.cdiv(grad_x.shape[0], settings.block_sets), triton.cdiv(grad_x.shape[2], settings.block_width))
    result = grad_x.float() if INTERPRETED else grad_x
    with torch.cuda.device_of(y):
        gradient_kernel[grid](
            grad_scores,
            x_winners,
            y_winners,
            y,
            result,
            grad_x.shape[0],
            y.shape[0],
            float(alpha),
            *pair_strides,
            *y.stride()[:2],
            X_TOKENS=grad_x.shape[1],
            Y_TOKENS=y.shape[1],
            WIDTH=y.shape[2],
            BLOCK_SETS=settings.block_sets,
            X_ROWS=max(16, triton.next_power_of_2(grad_x.shape[1])),
            Y_ROWS=max(16, triton.next_power_of_2(y.shape[1])),
            BLOCK_WIDTH=settings.block_width,
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
            enable_fp_fusion=True,  # explicit, because Triton 3.9 warns if it is omitted
        )
    if result is not grad_x:
        grad_x.copy_(result)


def _check(queries: Tensor, items: Tensor) -> int:
    """Check the inputs and return the GPU's compute capability."""
    capability = check_inputs(queries, items, MAX_GRADIENT_TOKENS)
    if items.shape[1] > MAX_GRADIENT_TOKENS:
        raise InputError(
            f"expected at most {MAX_GRADIENT_TOKENS} item tokens, got {items.shape[1]}; use the gradient of clim_scores"
        )
    if queries.dtype not in FLOATS:
        raise InputError(f"expected float32, float16 or bfloat16 embeddings, got {queries.dtype}")
    return capability
