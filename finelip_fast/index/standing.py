"""How far a hit stands out in an index: whether it matches, or is only the best available.

Scores have no absolute scale: what is high depends on the checkpoint, ``alpha`` and the query. So a score is compared with
those of the same query on a sample of the items: ``z`` is its number of standard deviations above their mean. If scores are
normally distributed, the best of ``n`` items unrelated to the query is at about ``sqrt(2 ln n)``. ``z`` is divided by that, so
that 1 is what chance gives in an index of any size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAMPLED = 512  # items that a score is compared with
FEWEST = 50  # items that allow a conclusion

# Centre and slope of a logistic regression on the ratio of best hits with and without the described picture in the index, at
# alpha 0 and at alpha 1: the bundled model, 500 descriptions each from Scenes' validation split, indexes of 100, 1,000 and
# 2,500. In between, both are about linear in alpha. The study standing-out fits them at a checkpoint's own alpha.
TOKENS, GLOBALS = (1.29, 16.5), (1.04, 32.1)


def sampled_rows(rows: int, among: Tensor | None) -> Tensor:
    """Choose at most ``SAMPLED`` of the rows that are searched, evenly spread.

    Args:
        rows: Number of all rows.
        among: Rows that are searched, ascending; None: all.
    """
    count = rows if among is None else len(among)
    if count <= SAMPLED:
        return torch.arange(count) if among is None else among
    at = torch.arange(SAMPLED) * count // SAMPLED
    return at if among is None else among[at]


def ratios(scores: Tensor, sampled: Tensor, items: int) -> Tensor:
    """Distance of scores above the mean, as a multiple of what chance gives the best of ``items``.

    Args:
        scores: ``[Q, k]``.
        sampled: Scores ``[Q, n]`` of the same queries on a sample of the items.
        items: Number of items that were searched, 2 or more.

    Returns:
        float32 ``[Q, k]``; NaN if all sampled scores are equal.
    """
    deviation, mean = torch.std_mean(sampled.float(), dim=1, keepdim=True)
    z = (scores.float() - mean) / deviation.where(deviation > 1e-6, math.nan)
    return z / math.sqrt(2 * math.log(items))


def stands_out(scores: Tensor, sampled: Tensor, items: int, alpha: float) -> Tensor:
    """Calibrated probability that hits match, if half of all queries have a match; other arguments as in :func:`ratios`.

    Args:
        alpha: Weight of the global cosine in the scores.

    Returns:
        float32 ``[Q, k]`` in [0, 1]; NaN if no conclusion is possible.
    """
    centre, slope = (
        alpha * of_globals + (1 - alpha) * of_tokens for of_globals, of_tokens in zip(GLOBALS, TOKENS, strict=True)
    )
    return torch.sigmoid(slope * (ratios(scores, sampled, items) - centre))
