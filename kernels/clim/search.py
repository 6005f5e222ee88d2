"""Exact search by late interaction: the best of many items for a query, from full precision or by way of int8."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from finelip_fast.errors import InputError
from finelip_fast.kernels import derivatives, dispatch
from finelip_fast.kernels.checks import check_alpha, check_floats
from finelip_fast.kernels.clim import cpu
from finelip_fast.kernels.clim.ops import check_shapes, clim_scores
from finelip_fast.kernels.clim.quantize import QuantizedItems
from finelip_fast.kernels.clim.rows import Dequantized, Pieces, Rows
from finelip_fast.kernels.clim.topk import exact_topk_int8, topk

# Elements that are converted to the other side's dtype at a time, 64 MiB in float32.
_CONVERTED_ELEMENTS = 1 << 24
# Numbers of pairs and of rows of queries from which a pass of rounded products runs first.
_LEAST_ROUNDED_PAIRS, _LEAST_ROUNDED_ROWS = 1 << 14, 32


def clim_topk(
    queries: Tensor, items: Rows, k: int, *, alpha: float = 0.8, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the ``k`` best items of each query, exactly.

    A first pass scores all items, with a bound on the rounding error of each score; the few items that may be among the best
    are scored again in float64. The result therefore depends on neither the device nor the precision of the pass.

    Args:
        queries: Embeddings ``[Q, L_q, D]``, unit rows.
        items: ``[N, L_i, D]``, also unit rows, on the device of the queries, in host memory, or mapped from a file
            (``numpy.memmap``). Items elsewhere are copied to the device in chunks, to a GPU while the previous chunk is
            scored. Or a sequence of consecutive pieces ``[n_i, L_i, D]`` of the same dtype and device.
        k: Number of items; all items if there are fewer.
        alpha: Weight of the global cosine, as in :func:`clim_scores`.
        among: The only items to search, int64 ``[n]``, ascending, each once, on any device; None means all.

    Returns:
        ``(scores [Q, k], indices [Q, k])``, float32 and int64, best first, ties by lower index, NaN last. Indices count the
        items of all pieces, including those not in ``among``.

    Raises:
        InputError: Shapes, dtypes or pieces that do not fit together, an ``among`` not as described, ``k < 1``, an alpha
            outside [0, 1], or a best item whose rows are longer than 1.
        KernelError: Call under ``torch.func`` or in forward mode: a search has no derivative. Its results never require a
            gradient, even if the inputs do; :func:`clim_scores` of the items found does.
    """
    pieces = Pieces(items)
    _check_search("clim_topk", queries, items, pieces, alpha)
    search = partial(topk, queries, pieces, k, alpha=alpha, score=_scores, among=among)
    with torch.no_grad():
        error = _rounding_error(queries, pieces)
        if error is not None:
            return search(coarse=partial(cpu.scores, rounded=True), product_error=error)
        return search()


def _rounding_error(queries: Tensor, items: Pieces) -> float | None:
    """Largest error of a first pass of rounded products; None if it does not make a search faster."""
    if queries.shape[1] == items.shape[1] == 1:
        return None  # rounding the rows takes longer than their cosines
    if queries.shape[0] * items.shape[0] < _LEAST_ROUNDED_PAIRS:
        return None  # such as a first stage's candidates: a pass that leaves many of a few items open does not pay off
    if queries.shape[0] * queries.shape[1] < _LEAST_ROUNDED_ROWS:
        return None  # rounding the items takes longer than their products
    if dispatch.choose(queries.device).implementation != "blocked" or queries.device.type != "cpu":
        return None
    return cpu.rounding_error(queries.dtype) if queries.dtype == items.dtype else None


def clim_topk_int8(
    queries: Tensor,
    items: Rows | None,
    quantized: QuantizedItems,
    k: int,
    *,
    alpha: float = 0.8,
    among: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the result of :func:`clim_topk` with a pass over int8, and full precision for the few items that it leaves.

    Args:
        queries, items, k, alpha, among: As for :func:`clim_topk`; only the few rescored ``items`` are read. If int8 leaves
            more than an eighth of a chunk open, the whole chunk is read and scored in float32 first. None means that nothing
            is more exact than ``quantized``, whose anchors and integers times scales are the items.
        quantized: Result of :func:`quantize_items` for ``items``; each field whole or in any pieces.

    Returns:
        ``(scores [Q, k], indices [Q, k], rescored [Q])``; the last counts the items that were scored again in float64.

    Raises:
        InputError, KernelError: As for :func:`clim_topk`.
    """
    if not isinstance(quantized, QuantizedItems):
        raise InputError(f"expected quantized as QuantizedItems, got {type(quantized).__name__}; see quantize_items")
    pieces = Dequantized(quantized.values, quantized.scales, quantized.anchors) if items is None else Pieces(items)
    _check_search("clim_topk_int8", queries, items, pieces, alpha)
    with torch.no_grad():
        return exact_topk_int8(queries, pieces, quantized, k, alpha=alpha, score=_scores, among=among)


def _scores(
    queries: Tensor,
    items: Tensor,
    *,
    alpha: float,
    query_scales: Tensor | None = None,
    item_scales: Tensor | None = None,
) -> Tensor:
    """:func:`clim_scores`, with two float dtypes first converted to one if the fused kernels run, which need a single one."""
    one_dtype = partial(clim_scores, alpha=alpha, query_scales=query_scales, item_scales=item_scales)
    if queries.dtype == items.dtype or dispatch.choose(queries.device).implementation != "triton":
        return one_dtype(queries, items)
    dtype = torch.promote_types(queries.dtype, items.dtype)
    dtype = torch.float32 if dtype.itemsize > 4 else dtype
    at_once = max(1, _CONVERTED_ELEMENTS // max(1, items.shape[1] * items.shape[2]))
    return torch.cat([one_dtype(queries.to(dtype), part.to(dtype)) for part in items.split(at_once)], dim=1)


def _check_search(name: str, queries: Tensor, items: Rows | None, pieces: Pieces, alpha: float) -> None:
    derivatives.refuse(name, "search outside of it, and take clim_scores of the items found", queries, items)
    check_floats("queries", queries)
    if not pieces.dtype.is_floating_point:
        raise InputError(f"expected items in a float dtype, got {pieces.dtype}: convert them")
    check_shapes(queries, pieces)
    check_alpha(alpha)
