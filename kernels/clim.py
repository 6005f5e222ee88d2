"""Late interaction (CLIM): the score of two sets of unit rows, compared in both directions.

For the rows ``A [L_q, D]`` of a query and ``B [L_i, D]`` of an item (FineLIP, arXiv 2504.01916, section 3)::

    S     = leaky_relu(A @ B.T, 0.1)                                  [L_q, L_i]
    fine  = mean over rows (max over columns) + mean over columns (max over rows)      in [-0.2, 2]
    score = alpha * (A[0] . B[0]) + (1 - alpha) * fine

Row 0 is the global embedding (CLS or EOT). Leaky ReLU is monotonic, so it is applied to the maxima only. The score is
symmetric: swapping query and item changes nothing. An empty set of rows scores 0. NaN in an embedding gives NaN scores,
and :func:`clim_topk` ranks those last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast._errors import InputError

LEAKY_SLOPE = 0.1

# Elements of the similarity tile that one block may hold: 64 MiB in float32.
_TILE_ELEMENTS = 1 << 24


def clim_reference(queries: Tensor, items: Tensor, alpha: float) -> Tensor:
    """The operation in plain PyTorch, in float32 whatever the inputs, all of ``S`` at once; shapes as :func:`clim_scores`."""
    n_queries, n_items = queries.shape[0], items.shape[0]
    if queries.shape[1] == 0 or items.shape[1] == 0:
        return torch.zeros(n_queries, n_items, device=queries.device)
    queries, items = queries.float(), items.float()
    similarity = (queries.flatten(0, 1) @ items.flatten(0, 1).T).view(
        n_queries, queries.shape[1], n_items, items.shape[1]
    )
    # max(dim).values sends the gradient of a tie to one winner, amax would split it.
    over_items = F.leaky_relu(similarity.max(dim=3).values, LEAKY_SLOPE).mean(dim=1)  # [Q, N]
    over_queries = F.leaky_relu(similarity.max(dim=1).values, LEAKY_SLOPE).mean(dim=2)  # [Q, N]
    return alpha * similarity[:, 0, :, 0] + (1 - alpha) * (over_items + over_queries)


def clim_scores(queries: Tensor, items: Tensor, *, alpha: float = 0.8) -> Tensor:
    """Score every query against every item.

    Args:
        queries: Embeddings ``[Q, L_q, D]``, unit rows, float32, float16 or bfloat16.
        items: Embeddings ``[N, L_i, D]``.
        alpha: Weight of the global cosine. 1 gives the cosine alone, 0 gives ``fine`` alone.

    Returns:
        float32 ``[Q, N]``. Differentiable; products are accumulated in float32. Without a gradient the memory beside
        inputs and result is bounded by a tile of 64 MiB (or one query against one item, if that is more).

    Raises:
        InputError: Shapes that do not fit together.

    Example:
        >>> a = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> b = torch.tensor([[[1.0, 0.0]]])
        >>> clim_scores(a, b, alpha=0.0)  # mean(1, 0) + 1
        tensor([[1.5000]])
    """
    _check(queries, items)
    n_queries, n_items = queries.shape[0], items.shape[0]
    per_pair = max(1, queries.shape[1] * items.shape[1])
    block_items = max(1, min(n_items, _TILE_ELEMENTS // per_pair))
    block_queries = max(1, min(n_queries, _TILE_ELEMENTS // (per_pair * block_items)))
    with torch.autocast(queries.device.type, enabled=False):
        rows = [
            torch.cat([clim_reference(some_queries, some, alpha) for some in items.split(block_items)], dim=1)
            for some_queries in queries.split(block_queries)
        ]
    return torch.cat(rows)


def clim_topk(queries: Tensor, items: Tensor, k: int, *, alpha: float = 0.8) -> tuple[Tensor, Tensor]:
    """The ``k`` best items of each query.

    Args:
        queries, items, alpha: As :func:`clim_scores`.
        k: How many; more than ``N`` is taken as ``N``.

    Returns:
        ``(scores [Q, k], indices [Q, k])``, float32 and int64, best first, NaN last. Equal scores come by lower index;
        copies of an item may differ in the last bit, because a matrix product rounds by position.

    Raises:
        InputError: Shapes that do not fit together, or ``k < 1``.
    """
    _check(queries, items)
    if not isinstance(k, int) or k < 1:
        raise InputError(f"expected k of at least 1, got {k!r}")
    with torch.no_grad():
        scores = clim_scores(queries, items, alpha=alpha)
        # A stable descending sort keeps equal scores in order of index; topk does not promise that.
        _, order = scores.masked_fill(scores.isnan(), -torch.inf).sort(dim=1, descending=True, stable=True)
        order = order[:, : min(k, items.shape[0])]
        return scores.gather(1, order), order


def _check(queries: Tensor, items: Tensor) -> None:
    if queries.dim() != 3 or items.dim() != 3 or queries.shape[2] != items.shape[2]:
        raise InputError(
            f"expected queries [Q, L_q, D] and items [N, L_i, D], got {list(queries.shape)} and {list(items.shape)}"
        )
