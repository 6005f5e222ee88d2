"""First stage of a two-stage search: the items with the highest int8 cosine, to be scored next.

The product of two rows of integers is exact, so it does not depend on the order of its terms, the processor or the other rows
in the operation. One float32 product with the item's scale follows. The query's scale is left out: it is the same for all
items and positive, so it does not change their order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finelip_fast._arguments import whole_number
from finelip_fast.errors import InputError
from finelip_fast.kernels import cpu, derivatives
from finelip_fast.kernels.checks import check_floats
from finelip_fast.kernels.clim.cpu import Scratch
from finelip_fast.kernels.clim.quantize import quantize
from finelip_fast.kernels.clim.rows import Pieces, Rows, chunks, is_gpu
from finelip_fast.kernels.threads import side_by_side, size_of_blocks

# Widths at which products of int8 rows are exact: 2^14 * 2^10 = 2^24 in float32, 2^15 (oneDNN shifts one side to uint8) * 2^16
# = 2^31 in int32.
_FLOAT_WIDTH, _INTEGER_WIDTH = 1 << 10, (1 << 16) - 1
# Elements of int8 rows converted to float32 at a time: 4 MiB, within a CPU's cache; 512 MiB on a GPU, where launches dominate.
_PRODUCT_ELEMENTS, _GPU_PRODUCT_ELEMENTS = 1 << 20, 1 << 27
# Number of waiting cosines from which the best are selected: 16 MiB, on a GPU 128 MiB.
_WAITING_ELEMENTS, _GPU_WAITING_ELEMENTS = 1 << 22, 1 << 25


def cosine_candidates(
    queries: Tensor, items: Rows, item_scales: Rows, count: int, *, among: Tensor | None = None
) -> Tensor:
    """Find the ``count`` items with the highest int8 cosine for each query, whatever the pieces and the batch.

    Args:
        queries: Global embeddings ``[Q, D]`` of any float dtype, which are converted to int8 by :func:`quantize`.
        items: int8 ``[N, D]`` from :func:`quantize`, in memory, mapped from a file, or a sequence of pieces ``[n_i, D]``, as
            for :func:`clim_topk`.
        item_scales: float32 ``[N]``, whole or in any pieces.
        count: Number of items; all items if there are fewer.
        among: The only items to consider, int64 ``[n]``, ascending, each once, on any device; None means all.

    Returns:
        int64 ``[Q, min(count, n)]`` on the device of the queries: indices of items, counted across all pieces, in ascending
        order, not by cosine. Among items that tie, the first are taken. A NaN cosine counts as lowest; for a query that is
        not finite, all items are alike.

    Raises:
        InputError: Shapes, dtypes or pieces that do not fit together, an ``among`` not as described, or ``count < 1``.
        KernelError: Call under ``torch.func`` or in forward mode: a search has no derivative.

    Example:
        >>> values, scales = quantize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]))
        >>> cosine_candidates(torch.tensor([[1.0, 0.1]]), values, scales, 2)
        tensor([[0, 2]])
    """
    advice = "search outside of it, and take the cosines of the items found"
    derivatives.refuse("cosine_candidates", advice, queries, items, item_scales)
    pieces, their_scales = Pieces(items), Pieces(item_scales)
    _check(queries, pieces, their_scales, count)
    pieces, their_scales = pieces.only(among), their_scales.only(among)
    n_items, device = pieces.shape[0], queries.device
    best = torch.empty(len(queries), 0, device=device)  # the highest cosines up to `start`, and their positions
    candidates = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    most_waiting = _GPU_WAITING_ELEMENTS if is_gpu(device) else _WAITING_ELEMENTS
    start, waiting = 0, []  # cosines from `start` on, not compared yet
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        values = quantize(queries)[0]
        for first, (rows, scales) in chunks([pieces, their_scales], len(queries), device):
            waiting.append(cosines_int8(values, rows, scales))
            end = first + len(rows)
            if end == n_items or (end - start) * len(queries) >= most_waiting:
                best, candidates = merged((best, candidates), torch.cat(waiting, dim=1), start, count)
                start, waiting = end, []
    return pieces.numbers(candidates)


def cosines_int8(queries: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """Cosines up to the norms and the queries' scales, ``[Q, n]``; NaN becomes the lowest, infinities stay."""
    cosines = _products(queries, rows).mul_(scales)
    return cosines.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _products(queries: Tensor, rows: Tensor) -> Tensor:
    """Dot products of int8 ``queries [Q, D]`` and ``rows [n, D]``, exact except for one rounding to float32, ``[Q, n]``."""
    width = rows.shape[1]
    # Rows of a single number count as contiguous with any strides, and oneDNN reads past their end.
    if rows.device.type == "cpu" and cpu.has_int8() and 1 < width <= _INTEGER_WIDTH:
        return torch._int_mm(queries.contiguous(), rows.contiguous().T).float()  # pyright: ignore[reportPrivateImportUsage]
    scratch, on_gpu = Scratch(), is_gpu(rows.device)

    def product(block: Tensor) -> Tensor:
        block = block.float() if on_gpu else scratch("rows", block.shape).copy_(block)
        sides = zip(queries.split(_FLOAT_WIDTH, dim=1), block.split(_FLOAT_WIDTH, dim=1), strict=True)
        # TF32 and bfloat16, which float32 products may be configured to use, hold int8 and accumulate in float32: also exact.
        exact, *rest = (cpu.product(left.float(), right.T) for left, right in sides)
        return sum((part.double() for part in rest), exact.double()).float() if rest else exact

    if on_gpu:
        products = list(map(product, rows.split(max(1, _GPU_PRODUCT_ELEMENTS // width))))
    else:
        products = side_by_side(product, rows.split(size_of_blocks(len(rows), max(1, _PRODUCT_ELEMENTS // width))))
    return torch.cat(products, dim=1)


def merged(best: tuple[Tensor, Tensor], scores: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest of the best before ``start`` and the scores ``[Q, n]`` from there on, with their positions."""
    chosen = first_best(scores, count)
    scores, positions = scores.gather(1, chosen), chosen + start
    if not best[0].shape[1]:
        return scores, positions
    scores, positions = torch.cat([best[0], scores], dim=1), torch.cat([best[1], positions], dim=1)
    chosen = first_best(scores, count)
    return scores.gather(1, chosen), positions.gather(1, chosen)


def first_best(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest of ``[Q, n]``, in ascending order; among those that tie, the first are taken."""
    n_queries, n_items = scores.shape
    if count >= n_items:
        return torch.arange(n_items, device=scores.device).expand(n_queries, -1)
    least = _least(scores, count)
    chosen = scores >= least
    if chosen.count_nonzero() > n_queries * count:
        ties = scores == least
        room = count - (chosen & ~ties).sum(dim=1, keepdim=True)
        chosen &= ~ties | (ties.cumsum(dim=1) <= room)
    return chosen.nonzero()[:, 1].view(n_queries, count)


def _least(scores: Tensor, count: int) -> Tensor:
    """The ``count``-th highest of each row, ``[Q, 1]``."""
    if scores.device.type == "cpu":  # several times as fast as with PyTorch
        at = scores.shape[1] - count
        return torch.from_numpy(np.partition(scores.numpy(), at, axis=1)[:, at, None])
    return scores.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def _check(queries: Tensor, items: Pieces, item_scales: Pieces, count: int) -> None:
    check_floats("queries", queries)
    if queries.ndim != 2 or len(items.shape) != 2 or queries.shape[1] != items.shape[1]:
        raise InputError(f"expected queries [Q, D] and items [N, D], got {list(queries.shape)} and {list(items.shape)}")
    if items.dtype != torch.int8:
        raise InputError(f"expected items in int8, got {items.dtype}; see quantize")
    if item_scales.dtype != torch.float32 or item_scales.shape != items.shape[:1]:
        raise InputError(
            f"expected scales [{items.shape[0]}] in float32, got {list(item_scales.shape)} in {item_scales.dtype};"
            " see quantize"
        )
    count = whole_number("count", count)
