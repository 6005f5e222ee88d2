"""Late interaction (CLIM): the score of two sets of unit rows, compared in both directions.

For the rows ``A [L_q, D]`` of a query and ``B [L_i, D]`` of an item (FineLIP, arXiv 2504.01916, section 3)::

    S     = leaky_relu(A @ B.T, 0.1)                                  [L_q, L_i]
    fine  = mean over rows (max over columns) + mean over columns (max over rows)      in [-0.2, 2]
    score = alpha * (A[0] . B[0]) + (1 - alpha) * fine

Row 0 is the global embedding (CLS or EOT). Leaky ReLU is monotonic, so it is applied to the maxima only. The score is
symmetric: swapping query and item changes nothing. An empty set of rows scores 0. NaN in an embedding gives NaN scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.1

# Limits of the fused kernels: the columns of a tile, and the bits of a winner.
MAX_QUERY_TOKENS, MAX_GRADIENT_TOKENS = 256, 128

# Elements of the similarity tile that one block may hold: 64 MiB in float32.
TILE_ELEMENTS = 1 << 24


def clim_reference(queries: Tensor, items: Tensor, alpha: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The operation in plain PyTorch, computed in ``dtype`` with all of ``S`` at once; shapes as for :func:`clim_scores`."""
    n_queries, n_items = queries.shape[0], items.shape[0]
    if queries.shape[1] == 0 or items.shape[1] == 0:
        return torch.zeros(n_queries, n_items, dtype=dtype, device=queries.device)
    queries, items = queries.to(dtype), items.to(dtype)
    similarity = (queries.flatten(0, 1) @ items.flatten(0, 1).T).view(
        n_queries, queries.shape[1], n_items, items.shape[1]
    )
    # max(dim).values sends the gradient of a tie to one winner; amax would split it.
    over_items = F.leaky_relu(similarity.max(dim=3).values, LEAKY_SLOPE).mean(dim=1)  # [Q, N]
    over_queries = F.leaky_relu(similarity.max(dim=1).values, LEAKY_SLOPE).mean(dim=2)  # [Q, N]
    return alpha * similarity[:, 0, :, 0] + (1 - alpha) * (over_items + over_queries)


def match_weights(similarity: Tensor) -> Tensor:
    """Weights with which matches between the rows of one query and one item count in ``fine``.

    Args:
        similarity: ``A @ B.T`` ``[L_q, L_i]``, floats.

    Returns:
        Weights of the cosines in ``fine``, ``[L_q, L_i]``: their products with ``similarity`` add up to ``fine``. 0 where
        neither row is the most similar to the other.
    """
    weights = torch.zeros_like(similarity)
    rows, columns = (torch.arange(size, device=similarity.device) for size in similarity.shape)
    weights[rows, similarity.argmax(dim=1)] += 1 / len(rows)
    weights[similarity.argmax(dim=0), columns] += 1 / len(columns)
    return weights * torch.where(similarity < 0, LEAKY_SLOPE, 1.0)


def clim_reference_in_blocks(
    queries: Tensor,
    items: Tensor,
    *,
    alpha: float,
    query_scales: Tensor | None = None,
    item_scales: Tensor | None = None,
) -> Tensor:
    """:func:`clim_reference` in blocks of pairs whose ``S`` has at most :data:`TILE_ELEMENTS` elements."""
    queries, items = scaled_rows(queries, query_scales), scaled_rows(items, item_scales)
    per_pair = max(1, queries.shape[1] * items.shape[1])
    block_items = max(1, min(items.shape[0], TILE_ELEMENTS // per_pair))
    block_queries = max(1, min(queries.shape[0], TILE_ELEMENTS // (per_pair * block_items)))
    rows = [
        torch.cat([clim_reference(some_queries, some_items, alpha) for some_items in items.split(block_items)], dim=1)
        for some_queries in queries.split(block_queries)
    ]
    return torch.cat(rows)


def scaled_rows(values: Tensor, scales: Tensor | None) -> Tensor:
    """Multiply values by their scales, if any."""
    return values if scales is None else values.float() * scales[..., None]
