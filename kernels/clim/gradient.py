"""The gradient of late interaction in plain PyTorch, on any device; only the winners of the maxima are saved.

A winner is the index of the token that a maximum selected, an unsigned byte for up to 128 tokens and int16 for more. Its
highest bit is set if the maximum is not positive, so that leaky ReLU's slope applies. With the winners, the gradient of
``S`` for a pair is a matrix with one entry for each maximum and one for the global cosine::

    P[s, t] = (1 - alpha) * (slope_s [query_winner_s = t] / L_q + slope_t [item_winner_t = s] / L_i) + alpha [s = t = 0]

    grad_queries[q] = sum over n of grad_scores[q, n] * P(q, n)   @ items[n]
    grad_items[n]   = sum over q of grad_scores[q, n] * P(q, n).T @ queries[q]

``P`` is built for a few queries at a time, so that it takes no more memory than a tile of the forward pass. It is bfloat16 if
the embeddings are and the processor multiplies bfloat16 faster.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast.kernels.clim.formula import LEAKY_SLOPE, TILE_ELEMENTS
from finelip_fast.kernels.cpu import has_bfloat16, product

# Elements of a tile on a CPU, 16 MiB in float32: it stays in the cache.
_CPU_ELEMENTS = 1 << 22


def winner_dtype(tokens: int) -> torch.dtype:
    """Dtype that holds an index below ``tokens`` and one more bit."""
    return torch.uint8 if tokens <= 128 else torch.int16


def scores_with_winners(queries: Tensor, items: Tensor, *, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the scores, and the winner of each maximum.

    Args:
        queries: ``[Q, L_q, D]``, with at least one token.
        items: ``[N, L_i, D]``, with at least one token.
        alpha: Weight of the global cosine.

    Returns:
        Scores ``[Q, N]`` in float32, the item token most similar to each query token ``[Q, N, L_q]``, and the query token
        most similar to each item token ``[Q, N, L_i]``. The first of equals wins.
    """
    (n_queries, query_tokens, _), (n_items, item_tokens, _) = queries.shape, items.shape
    scores = queries.new_empty(n_queries, n_items, dtype=torch.float32)
    query_winners = queries.new_empty(n_queries, n_items, query_tokens, dtype=winner_dtype(item_tokens))
    item_winners = queries.new_empty(n_queries, n_items, item_tokens, dtype=winner_dtype(query_tokens))
    flat = items.float().flatten(0, 1)
    for rows in _query_blocks(queries, items):
        block = queries[rows].float()
        similarity = product(block.flatten(0, 1), flat.T).view(len(block), query_tokens, n_items, item_tokens)
        over_items, met_items = similarity.max(dim=3)
        over_queries, met_queries = similarity.max(dim=1)
        fine = F.leaky_relu(over_items, LEAKY_SLOPE).mean(dim=1) + F.leaky_relu(over_queries, LEAKY_SLOPE).mean(dim=2)
        scores[rows] = alpha * similarity[:, 0, :, 0] + (1 - alpha) * fine
        query_winners[rows] = _packed(met_items, over_items, query_winners.dtype).transpose(1, 2)
        item_winners[rows] = _packed(met_queries, over_queries, item_winners.dtype)
    return scores, query_winners, item_winners


def gradient(
    grad_scores: Tensor, queries: Tensor, items: Tensor, query_winners: Tensor, item_winners: Tensor, *, alpha: float
) -> tuple[Tensor, Tensor]:
    """Compute the gradients ``[Q, L_q, D]`` and ``[N, L_i, D]`` of scores, in the dtypes of the two sides.

    Args:
        grad_scores: ``[Q, N]``.
        queries, items, query_winners, item_winners, alpha: As given to and returned by :func:`scores_with_winners`.
    """
    (n_queries, query_tokens, width), (n_items, item_tokens, _) = queries.shape, items.shape
    grad_queries = queries.new_empty(n_queries, query_tokens, width)
    grad_items = items.new_zeros(n_items * item_tokens, width, dtype=torch.float32)
    dtype = _product_dtype(queries, items)
    flat = items.to(dtype).flatten(0, 1)
    for rows in _query_blocks(queries, items):
        block = queries[rows].to(dtype)
        grad = grad_scores[rows].float()
        p = flat.new_zeros(len(block), query_tokens, n_items, item_tokens)
        at, slope = _unpacked(query_winners[rows].transpose(1, 2))
        share = grad * ((1 - alpha) / query_tokens)
        p.scatter_(3, at[..., None], (slope * share[:, None])[..., None].to(dtype))
        at, slope = _unpacked(item_winners[rows])
        share = grad * ((1 - alpha) / item_tokens)
        p.scatter_add_(1, at[:, None], (slope * share[..., None])[:, None].to(dtype))
        p[:, 0, :, 0] += alpha * grad
        flat_p = p.view(-1, n_items * item_tokens)
        grad_queries[rows] = product(flat_p, flat).view_as(block)
        grad_items += product(flat_p.T, block.flatten(0, 1))
    return grad_queries, grad_items.view(items.shape).to(items.dtype)


def _product_dtype(queries: Tensor, items: Tensor) -> torch.dtype:
    is_bfloat16 = queries.dtype == items.dtype == torch.bfloat16
    return torch.bfloat16 if is_bfloat16 and queries.device.type == "cpu" and has_bfloat16() else torch.float32


def _query_blocks(queries: Tensor, items: Tensor) -> Iterator[slice]:
    """Slices of queries whose similarities with all items fit a tile; at least one query at a time."""
    elements = _CPU_ELEMENTS if queries.device.type == "cpu" else TILE_ELEMENTS
    per_query = max(1, queries.shape[1] * items.shape[0] * items.shape[1])
    size = max(1, elements // per_query)
    return (slice(first, first + size) for first in range(0, queries.shape[0], size))


def _packed(index: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    flag = 128 if dtype == torch.uint8 else torch.iinfo(dtype).min
    return torch.where(value > 0, index, index | flag).to(dtype)


def _unpacked(winners: Tensor) -> tuple[Tensor, Tensor]:
    """Index (int64) and leaky ReLU's slope (float32) of each winner."""
    flag = 128 if winners.dtype == torch.uint8 else torch.iinfo(winners.dtype).min
    wide = winners.long()
    sloped = wide & flag != 0 if flag > 0 else wide < 0
    return torch.where(sloped, wide - flag, wide), torch.where(sloped, LEAKY_SLOPE, 1.0)
