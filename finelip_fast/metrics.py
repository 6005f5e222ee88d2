"""Retrieval metrics over a score matrix, and how far to trust them.

Ranks come from scores (:func:`best_ranks`, :func:`pair_ranks`), metrics from ranks (:func:`summary`, :func:`pair_summary`,
:func:`recall`), and criteria for a choice from metrics (:func:`quality`); :func:`bootstrap_interval` and :func:`mcnemar` tell
how far the metrics of a finite test set generalise to others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from numbers import Real

import torch
from torch import Tensor

from finelip_fast._arguments import listed, whole_number
from finelip_fast.errors import InputError

WAYS = ("i2t", "t2i")  # a picture looks for its captions; a caption looks for its picture
SCORES = ("global", "fine", "combined")
ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))  # weights of the global cosine to choose from

_DRAWS = 1 << 22  # items that the bootstrap draws at once: 100 MiB at most, unless one resample alone is larger


def best_ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Rank of each query's best right item, of which there may be several: 1 is best, and ties count against it.

    Right items do not count against each other; a wrong item that ties or is NaN counts against them. A right item that is
    NaN ranks behind all wrong ones.

    Args:
        scores: Floats ``[Q, N]``, one row per query.
        right: Bool ``[Q, N]``, True where the item answers the query.

    Returns:
        int64 ``[Q]``, from 1 to one more than the query's number of wrong items.

    Raises:
        InputError: A shape or dtype is wrong, there is nothing to rank, or a query has no right item.
    """
    _check_tensors(scores=scores, right=right)
    if scores.ndim != 2 or not scores.numel() or not scores.is_floating_point():
        raise InputError(f"expected scores [Q, N] of floats, not empty, got {_described(scores)}")
    if right.shape != scores.shape or right.dtype != torch.bool:
        raise InputError(f"expected right {list(scores.shape)} of bools, like scores, got {_described(right)}")
    answered = right.any(dim=1)
    if not answered.all():
        query = int((~answered).nonzero()[0])
        raise InputError(f"expected a right item for each query, got none for query {query}; omit such queries")
    best = scores.masked_fill(~right | scores.isnan(), -torch.inf).amax(dim=1, keepdim=True)
    return 1 + (~(scores < best) & ~right).sum(dim=1)


def pair_ranks(scores: Tensor, picture_of: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ranks in both directions, for pictures that may have several captions.

    The protocol of COCO and Flickr30k: a picture is found at ``k`` when any of its captions is among its ``k`` best, a
    caption when its one picture is.

    Args:
        scores: Floats ``[P, C]``, one row per picture and one column per caption.
        picture_of: int64 ``[C]``, the row of the picture that each caption describes; None: caption ``i`` describes
            picture ``i``.

    Returns:
        ``i2t`` int64 ``[P]`` and ``t2i`` int64 ``[C]``, ties counted as by :func:`best_ranks`.

    Raises:
        InputError: A shape or dtype is wrong, there is nothing to rank, a row does not exist, or a picture has no caption.
    """
    _check_tensors(scores=scores)
    if scores.ndim != 2 or not scores.numel():
        raise InputError(f"expected scores [P, C] of floats, not empty, got {_described(scores)}")
    pictures, captions = scores.shape
    if picture_of is None:
        if pictures != captions:
            raise InputError(
                f"expected as many pictures as captions without picture_of, got scores {[pictures, captions]}; pass "
                "picture_of, the row of the picture that each caption describes"
            )
        picture_of = torch.arange(captions)
    _check_tensors(picture_of=picture_of)
    if picture_of.shape != (captions,) or picture_of.dtype != torch.int64:
        raise InputError(f"expected picture_of [{captions}] of int64, got {_described(picture_of)}")
    first, last = int(picture_of.min()), int(picture_of.max())
    if first < 0 or last >= pictures:
        raise InputError(f"expected picture_of from 0 to {pictures - 1}, got {first} to {last}")
    right = picture_of.to(scores.device) == torch.arange(pictures, device=scores.device)[:, None]
    return best_ranks(scores, right), best_ranks(scores.T, right.T)


def summary(ranks: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """The usual metrics of one direction's ranks.

    Args:
        ranks: Integers ``[Q]``, 1 is best.
        ks: Cut-offs.

    Returns:
        ``recall@k`` for each cut-off, in [0, 1]; ``mean_rank``; ``median_rank``, the mean of the middle two if ``Q`` is even;
        ``mrr``, the mean of 1 / rank (Voorhees, TREC-8, 1999).

    Raises:
        InputError: The shape or dtype is wrong, there are no ranks, or a rank or a cut-off is below 1.
    """
    _check_tensors(ranks=ranks)
    ks = tuple(whole_number("ks", k) for k in listed("ks", ks))
    if ranks.ndim != 1 or not ranks.numel() or ranks.is_floating_point() or ranks.dtype == torch.bool:
        raise InputError(f"expected ranks [Q] of integers, not empty, got {_described(ranks)}")
    if ranks.min() < 1:
        raise InputError(f"expected ranks from 1, got {int(ranks.min())}")
    position = ranks.sort().values.to(torch.float64)
    middle = position[(len(position) - 1) // 2 : len(position) // 2 + 1]  # torch.median takes the lower of two
    return {
        **{f"recall@{k}": _share_within(ranks, k) for k in ks},
        "mean_rank": position.mean().item(),
        "median_rank": middle.mean().item(),
        "mrr": position.reciprocal().mean().item(),
    }


def pair_summary(ranks: Iterable[Tensor], ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """:func:`summary` of both directions.

    Args:
        ranks: ``i2t`` and ``t2i``, as :func:`pair_ranks` returns them.
        ks: Cut-offs.

    Returns:
        ``{"i2t_recall@1": ..., "i2t_mrr": ..., "t2i_recall@1": ...}``.

    Raises:
        InputError: The ranks are refused by :func:`summary`.
    """
    return {
        f"{way}_{name}": value
        for way, values in zip(WAYS, ranks, strict=True)
        for name, value in summary(values, ks).items()
    }


def recall(scores: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries whose right item is among the ``k`` best, in both directions.

    Args:
        scores: Floats ``[N, N]``, one row per picture and one column per caption; pair ``i`` belongs together.
        ks: Cut-offs.

    Returns:
        ``{"i2t_recall@1": ..., "t2i_recall@1": ...}``, in [0, 1].

    Raises:
        InputError: The scores are refused by :func:`pair_ranks`.
    """
    return {name: value for name, value in pair_summary(pair_ranks(scores), ks).items() if "_recall@" in name}


def quality(*summaries: Mapping[str, float]) -> tuple[float, float]:
    """Criteria for a choice: recall@1, and mrr to break ties, each averaged over both directions.

    Args:
        summaries: Results of :func:`pair_summary`, with names such as ``i2t_recall@1``; several runs are averaged.

    Returns:
        ``(recall, mrr)``, in [0, 1], rounded, since means of equal shares in another order differ in their last bits.
    """
    recall, mrr = (
        round(statistics.fmean(summary[f"{way}_{name}"] for summary in summaries for way in WAYS), 9)
        for name in ("recall@1", "mrr")
    )
    return recall, mrr


def bootstrap_interval(
    values: Tensor,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    *,
    groups: Tensor | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. With ``groups``, whole groups are drawn
    (Cameron, Gelbach and Miller, Bootstrap-Based Improvements for Inference with Clustered Errors, 2008): the captions
    of one picture are found and missed together, and drawing them one by one would make the interval too narrow.

    Args:
        values: Numbers or bools ``[n]``, one for each query, such as hits ``ranks <= k`` or ``1 / ranks``.
        confidence: Share of intervals that should hold the true mean, in (0, 1).
        resamples: Number of test sets to draw.
        seed: Seed of the draws; equal seeds give equal intervals on any device.
        groups: Integers ``[n]``, equal for values that belong together, such as ``picture_of``; None: no groups.

    Returns:
        ``(low, high)``, in the unit of ``values``.

    Raises:
        InputError: A shape or dtype is wrong, there are no values, a value is not finite, or an option is out of range.
    """
    _check_tensors(values=values)
    if values.ndim != 1 or not values.numel() or values.is_complex():
        raise InputError(f"expected values [n] of numbers, not empty, got {_described(values)}")
    if not values.isfinite().all():
        raise InputError("expected finite values, got NaN or infinity")
    if not isinstance(confidence, Real) or not 0 < confidence < 1:
        raise InputError(f"expected confidence in (0, 1), got {confidence!r:.80}")
    resamples = whole_number("resamples", resamples)
    seed = whole_number("seed", seed, least=-(1 << 63), most=(1 << 64) - 1)
    sums = values.to("cpu", torch.float64)  # draws on the CPU, since devices have different generators
    sizes = torch.ones_like(sums)
    if groups is not None:
        _check_tensors(groups=groups)
        if groups.shape != values.shape or groups.is_floating_point() or groups.is_complex():
            raise InputError(f"expected groups [{len(values)}] of integers, got {_described(groups)}")
        member_of: Tensor = torch.unique(groups.cpu(), return_inverse=True)[1]
        empty = sums.new_zeros(int(member_of.max()) + 1)
        sums, sizes = empty.index_add(0, member_of, sums), empty.index_add(0, member_of, sizes)
    generator = torch.Generator().manual_seed(seed)
    block, means = max(1, _DRAWS // len(sums)), []
    for first in range(0, resamples, block):
        drawn = torch.randint(len(sums), (min(block, resamples - first), len(sums)), generator=generator)
        means.append(sums[drawn].sum(dim=1) / sizes[drawn].sum(dim=1))
    tail = (1 - confidence) / 2
    low, high = torch.cat(means).quantile(sums.new_tensor([tail, 1 - tail])).tolist()
    return low, high


def mcnemar(a: Tensor, b: Tensor) -> float:
    """Probability that two equally good runs differ by at least as much as these do, on the same queries.

    The exact test of McNemar, Note on the Sampling Error of the Difference between Correlated Proportions, 1947: only
    queries that one run finds and the other misses count, and each falls to either side with probability 1/2. Of ``n``
    such, with ``m`` on the rarer side, ``p = min(1, 2 * sum_{i <= m} binomial(n, i) / 2^n)``. Queries are assumed to be
    independent, so the p-value is too small if captions share a picture.

    Args:
        a, b: Bool ``[n]``, the hits of each run at one cut-off, query by query.

    Returns:
        The two-sided p-value, in [0, 1]; 1 when no query tells the runs apart.

    Raises:
        InputError: The shapes differ from each other, a shape or dtype is wrong, or there are no queries.
    """
    _check_tensors(a=a, b=b)
    for name, hits in (("a", a), ("b", b)):
        if hits.ndim != 1 or not hits.numel() or hits.dtype != torch.bool:
            raise InputError(f"expected {name} [n] of bools, not empty, got {_described(hits)}")
    if a.shape != b.shape:
        raise InputError(f"expected hits on the same queries, got {len(a)} and {len(b)}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = torch.tensor(float(only_a + only_b), dtype=torch.float64)
    i = torch.arange(min(only_a, only_b) + 1, dtype=torch.float64)
    # In logarithms, since 2^n overflows from n = 1024 on.
    log_binomial = torch.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    log_tail = log_binomial.logsumexp(dim=0) - n * math.log(2)
    return min(1.0, 2 * log_tail.exp().item())


def _share_within(ranks: Tensor, k: int) -> float:
    return (ranks <= k).to(torch.float64).mean().item()


def _check_tensors(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise InputError(f"expected {name} as a tensor, got {value!r:.80}; pass torch.as_tensor({name})")


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
