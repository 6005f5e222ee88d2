"""How far a hit stands out of an index: whether it matches, or is only the best of what is there.

Scores have no scale of their own: what is high depends on the checkpoint, on ``alpha`` and on the query. So a score is
compared with those of the same query and a sample of the items: ``z`` counts standard deviations above their mean. The best of
``n`` items that have nothing to do with the query lies at about ``sqrt(2 ln n)`` where scores are normally distributed; ``z``
is divided by that, so that 1 is what chance gives in an index of any size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAMPLED = 512  # items that a score is compared with
FEWEST = 50  # items of which something can be said

# Logistic regression on the ratio of best hits with and without the described picture in the index; the bundled model, 500
# descriptions each of Scenes' validation split, in indexes of 100, 1,000 and 2,500. The study standing-out fits one anew.
CENTRE, SLOPE = 0.955, 33.0


def sampled_rows(rows: int, among: Tensor | None) -> Tensor:
    """Choose at most ``SAMPLED`` of the rows that are searched, evenly spread.

    Args:
        rows: Number of all rows.
        among: The only rows that are searched, ascending; None: all.
    """
    count = rows if among is None else len(among)
    if count <= SAMPLED:
        return torch.arange(count) if among is None else among
    at = torch.arange(SAMPLED) * count // SAMPLED
    return at if among is None else among[at]


def ratios(scores: Tensor, sampled: Tensor, items: int) -> Tensor:
    """How far scores lie above the mean, as a multiple of what is expected of the best of ``items`` by chance.

    Args:
        scores: ``[Q, k]``.
        sampled: Scores ``[Q, n]`` of the same queries and a sample of the items.
        items: Number of items that were searched, 2 or more.

    Returns:
        float32 ``[Q, k]``; NaN where all sampled scores are equal.
    """
    deviation, mean = torch.std_mean(sampled.float(), dim=1, keepdim=True)
    z = (scores.float() - mean) / deviation.where(deviation > 1e-6, math.nan)
    return z / math.sqrt(2 * math.log(items))


def stands_out(scores: Tensor, sampled: Tensor, items: int) -> Tensor:
    """Probability, as calibrated, that hits match, where half of all queries have a match; arguments as :func:`ratios`.

    Returns:
        float32 ``[Q, k]`` in [0, 1]; NaN where nothing can be said.
    """
    return torch.sigmoid(SLOPE * (ratios(scores, sampled, items) - CENTRE))
