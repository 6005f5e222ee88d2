"""Retrieval metrics over a score matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(scores: Tensor) -> Tensor:
    """Rank of each query's own item: 1 is best, ties count against it.

    Args:
        scores: ``[N, N]``, a row for each query; the right item of query ``i`` is ``i``.

    Returns:
        int64 ``[N]``.
    """
    own = scores.diagonal()[:, None]
    return (~(scores < own)).sum(dim=1)  # so written that NaN counts against, too


def recall(scores: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries whose own item is among the ``k`` best, both directions.

    Args:
        scores: ``[N, N]``, a row for each picture, a column for each caption; pair ``i`` belongs together.
        ks: Cut-offs.

    Returns:
        ``{"i2t_recall@1": ..., "t2i_recall@1": ...}``, in [0, 1].
    """
    result = {}
    for direction, matrix in (("i2t", scores), ("t2i", scores.T)):
        position = ranks(matrix)
        for k in ks:
            result[f"{direction}_recall@{k}"] = (position <= k).to(torch.float64).mean().item()
    return result
