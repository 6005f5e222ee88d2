"""Embeddings in int8 with one scale per row, and a proven bound on the resulting error of a score.

The bound. Let ``a_s`` be the rows of a query and ``b_t`` those of an item, ``a'_s`` and ``b'_t`` the rows that their integers
represent, and ``r(a_s) = |a_s - a'_s|`` the norm of a row's error. By Cauchy-Schwarz::

    |a_s . b_t - a'_s . b'_t| = |(a_s - a'_s) . b_t + a'_s . (b_t - b'_t)| <= r(a_s) n(b_t) + n(a_s) r(b_t) =: e(s, t)

with ``n(x) = max(|x|, |x'|)``. A maximum over a set changes by at most the largest change of its members, leaky ReLU with a
slope of 0.1 by at most the change of its argument, and a mean by at most the mean change. So a score changes by at most::

    |alpha| e(0, 0) + |1 - alpha| (mean_s max_t e(s, t) + mean_t max_s e(s, t))

Everything is non-negative, so ``mean_s max_t e <= mean(r_a) max(n_b) + mean(n_a) max(r_b)``, and likewise the other way
round. Six numbers per query and six per item are enough: row 0, mean and maximum of ``r`` and of ``n``.

Rounding. Both scores are computed in float32. A dot product of ``D`` terms, summed in any order, is off by at most
``D u |a| |b|`` with ``u = 2^-23`` (round to nearest needs ``2^-24``; matrix units may truncate). The means add ``L u`` each,
scales and sums less than ``64 u``. Half of ``(D + 64) u n`` and a set's own ``L u n`` are added to its ``r``, so that ``e``
covers all of these errors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finelip_fast.errors import InputError
from finelip_fast.kernels.checks import check_floats
from finelip_fast.kernels.clim.rows import Rows

_LARGEST = 127
_UNIT = 2.0**-23
_UP = 1 + 2.0**-16  # more than the float32 and float64 steps from the residuals to the bound can lose
_UNDERFLOW = 2.0**-100  # possible loss when products are too small for float32
_BLOCK_ELEMENTS = 1 << 23


class QuantizedItems(NamedTuple):
    """Data of ``N`` items for a search in int8; every field may be moved to another device, mapped from a file or in pieces.

    Attributes:
        values: int8 ``[N, L, D]``.
        scales: float32 ``[N, L]``.
        terms: float32 ``[N, 6]``, from :func:`error_terms`.
        anchors: ``[N, 1, D]``, row 0 unchanged: the global cosine is most of the score and costs little in full precision.
    """

    values: Rows
    scales: Rows
    terms: Rows
    anchors: Rows


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows symmetrically, with a scale per row: a row is approximately its integers times its scale.

    Args:
        rows: ``[..., L, D]`` of any float dtype, ``D`` at least 1.

    Returns:
        int8 ``[..., L, D]`` in -127..127, and float32 ``[..., L]``. A row that is not finite gets a scale that is not finite,
        so its scores are NaN.

    Raises:
        InputError: Rows that are not of a float dtype or have no width.

    Example:
        >>> quantize(torch.tensor([[0.5, -1.0, 0.0]]))
        (tensor([[  64, -127,    0]], dtype=torch.int8), tensor([0.0079]))
    """
    check_floats("rows", rows)
    if rows.dim() < 2 or rows.shape[-1] == 0:
        raise InputError(f"expected rows [..., L, D] with D of at least 1, got {list(rows.shape)}")
    rows = rows.float()
    scales = rows.abs().amax(dim=-1) / _LARGEST
    divisors = scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    values = (rows / divisors).nan_to_num(0.0).round().clamp(-_LARGEST, _LARGEST)
    return values.to(torch.int8), scales


def quantize_items(items: Tensor) -> QuantizedItems:
    """Compute all that an int8 search needs from ``items [N, L, D]``, in blocks of 64 MiB of float64.

    Raises:
        InputError: Items that have another shape, are not of a float dtype or have no width.
    """
    check_floats("items", items)
    if items.ndim != 3:
        raise InputError(f"expected items [N, L, D], got {list(items.shape)}")
    _, tokens, width = items.shape
    blocks = []
    for block in items.split(max(1, _BLOCK_ELEMENTS // max(1, tokens * width))):
        values, scales = quantize(block)
        blocks.append((values, scales, error_terms(block, values, scales)))
    values, scales, terms = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return QuantizedItems(values, scales, terms, items[:, :1].clone())


def error_terms(rows: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Compute the six numbers of each set that :func:`error_bound` needs, rounded up; shapes as for :func:`quantize`.

    Returns:
        float32 ``[..., 6]``: row 0, mean and maximum of the rows' errors, then of their norms. Zeros for a set without rows.
    """
    tokens, width = rows.shape[-2:]
    if tokens == 0:
        return torch.zeros(*rows.shape[:-2], 6, device=rows.device)
    exact, stored = rows.double(), values.double() * scales.double()[..., None]
    norms = torch.maximum(exact.norm(dim=-1), stored.norm(dim=-1))
    lost = (exact - stored).norm(dim=-1) + rounding(width, tokens) * norms
    terms = [term for rows in (lost, norms) for term in (rows[..., 0], rows.mean(dim=-1), rows.amax(dim=-1))]
    return (torch.stack(terms, dim=-1) * _UP).float()


def rounding(width: int, tokens: int) -> float:
    """One side's share of the rounding error of a score, relative to the product of the norms; the two shares add up."""
    return (width / 2 + tokens + 32) * _UNIT


def error_bound(query_terms: Tensor, item_terms: Tensor, *, alpha: float) -> Tensor:
    """Bound the difference between int8 and full-precision scores, both computed in float32; proof in the module docstring.

    Args:
        query_terms: Result of :func:`error_terms` for ``Q`` queries, ``[Q, 6]``.
        item_terms: Error terms of ``N`` items, ``[N, 6]``.
        alpha: Weight of the global cosine.

    Returns:
        float32 ``[Q, N]``; not finite for embeddings that are not.
    """
    lost_0, lost_mean, lost_max, norm_0, norm_mean, norm_max = query_terms.double().unbind(-1)
    item_lost_0, item_lost_mean, item_lost_max, item_norm_0, item_norm_mean, item_norm_max = item_terms.double().unbind(
        -1
    )
    first, fine = abs(alpha), abs(1 - alpha)
    # In float64, because float32 products may be configured to round more coarsely.
    left = torch.stack(
        [first * lost_0, first * norm_0, fine * lost_mean, fine * norm_mean, fine * lost_max, fine * norm_max], dim=-1
    )
    right = torch.stack(
        [item_norm_0, item_lost_0, item_norm_max, item_lost_max, item_norm_mean, item_lost_mean], dim=-1
    )
    return ((left @ right.T) * _UP + _UNDERFLOW).float()


def cosine_rounding(query_terms: Tensor, item_terms: Tensor, *, width: int) -> Tensor:
    """Bound the error of global cosines of full-precision rows, ``[Q, N]``; terms as for :func:`error_bound`."""
    return 2 * rounding(width, 1) * torch.outer(query_terms[:, 3], item_terms[:, 3])
