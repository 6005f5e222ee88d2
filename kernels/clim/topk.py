"""Exact search for the best items of each query: a fast pass brackets every score, then float64 decides the few that matter.

Both searches work the same way. A pass over all items, chunk by chunk, computes each score to within a known error: float32
rounding for :func:`topk` (bfloat16 rounding on processors with such instructions), plus quantisation for
:func:`exact_topk_int8`. An item stays as long as the upper end of its bracket reaches the k-th best lower end. Items that stay
are scored again in float64, rounded once to float32, and sorted. If a coarse pass leaves too many items of a chunk, the chunk
goes through the float32 pass first.

The results therefore depend on neither chunks, device nor the precision of the pass: they are the float32 numbers nearest to
the exact scores, ties by lower index. Copies of an item tie, wherever they are, unless their score is within float64 rounding
(about ``1e-15``) of the midpoint between two float32 numbers. NaN comes last. An item whose bracket is not finite is always
scored again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast._arguments import whole_number
from finelip_fast.errors import InputError
from finelip_fast.kernels.clim.formula import LEAKY_SLOPE
from finelip_fast.kernels.clim.quantize import (
    QuantizedItems,
    cosine_rounding,
    error_bound,
    error_terms,
    quantize,
    rounding,
)
from finelip_fast.kernels.clim.rows import Pieces, chunks, is_gpu
from finelip_fast.kernels.precision import full_float32
from finelip_fast.kernels.threads import LEAST_SHARED_WORK, alone

# The first position of a chunk, scores [Q, n], and errors [Q, n] or [Q, 1].
Bracket = tuple[int, Tensor, Tensor]
# From the first position and the number of items: scores and errors again, in float32.
Finer = Callable[[int, int], tuple[Tensor, Tensor]]

# Largest norm of a row of norm 1 after rounding to bfloat16, with a margin.
_LONGEST = 1.01
# Share of a chunk that a coarse pass may leave: a pair takes about eight times as long in float64 as in a float32 pass.
_MOST_OPEN = 1 / 8
# Scores that are collected on a GPU before the best are selected: 128 MiB, plus a few matrices of the same size.
_GPU_SCORE_ELEMENTS = 1 << 25
# Elements that scoring again in float64 may hold: 16 MiB on a CPU, where more would not fit the cache; 512 MiB on a GPU, most
# of which would be idle with 49 pairs per launch.
_RESCORE_ELEMENTS, _GPU_RESCORE_ELEMENTS = 1 << 21, 1 << 26


class Score(Protocol):
    """An implementation of late interaction; the tensors are on the device of the queries."""

    def __call__(
        self,
        queries: Tensor,
        items: Tensor,
        *,
        alpha: float,
        query_scales: Tensor | None = None,
        item_scales: Tensor | None = None,
    ) -> Tensor: ...


def topk(
    queries: Tensor,
    items: Pieces,
    k: int,
    *,
    alpha: float,
    score: Score,
    among: Tensor | None = None,
    coarse: Score | None = None,
    product_error: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Find the ``k`` best items of each query by exact score.

    Args:
        queries: ``[Q, L_q, D]``.
        items: ``[N, L_i, D]``, rows of norm 1 or less, on the device of the queries, in host memory or mapped from a file
            (``numpy.memmap``, ``torch.from_file``). Host memory is copied to a GPU in chunks, each while the previous one is
            scored.
        k: Number of items, at least 1; all items if there are fewer.
        alpha: Weight of the global cosine.
        score: Function for scores ``[Q, n]`` to within float32 rounding; see :mod:`finelip_fast.kernels.clim.quantize`.
        among: Items to search, int64 ``[n]``, ascending; None means all.
        coarse: Faster scoring function for the first pass, or None.
        product_error: Additional error of its product of two rows, relative to their norms; the global cosine has none.

    Returns:
        ``(scores [Q, k], indices [Q, k])``, float32 and int64 on the device of the queries, best first.

    Raises:
        InputError: ``k`` below 1, an ``among`` not as described, or a best item with longer rows than the errors allow for.
    """
    items = items.only(among)
    norms = queries.float().norm(dim=2)
    largest = norms.amax(dim=1, keepdim=True) if queries.shape[1] else norms.new_zeros(len(queries), 1)
    rounding_errors = largest * _slack(queries, items, alpha)
    errors = rounding_errors + largest * product_error * 2 * abs(1 - alpha)

    def brackets() -> Iterator[Bracket]:
        for first, (scores,) in _passes(
            [items], queries, lambda chunk: [(coarse or score)(queries, chunk, alpha=alpha)]
        ):
            yield first, scores, errors

    def finer(first: int, count: int) -> tuple[Tensor, Tensor]:
        return _pass(queries, items, range(first, first + count), alpha, score), rounding_errors

    best, positions, _ = _search(queries, items, k, alpha, brackets(), finer if coarse else None)
    _check_norms(items, positions[:, :1].unique())
    return best, items.numbers(positions)


def _check_norms(items: Pieces, positions: Tensor) -> None:
    """Check the norms of the best items only: checking all items would cost as much as the search."""
    norms = items.take(positions).float().norm(dim=2)
    longest = norms[norms.isfinite()].amax().item() if norms.isfinite().any() else 0.0
    if longest > _LONGEST:
        raise InputError(
            f"expected items with rows of norm 1, got {longest:.3g}; normalise them (torch.nn.functional.normalize)"
        )


def exact_topk_int8(
    queries: Tensor,
    items: Pieces,
    quantized: QuantizedItems,
    k: int,
    *,
    alpha: float,
    score: Score,
    among: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the result of :func:`topk` with a pass over int8 and the few items that its error bound leaves.

    Args:
        queries, items, k, alpha, among: As for :func:`topk`; rows may have any norm. Only those few of the ``items`` are
            read, unless int8 leaves too many.
        quantized: Result of :func:`finelip_fast.kernels.clim.quantize.quantize_items`, on any device and in any pieces.
        score: Scoring function as for :func:`topk`, which also takes scales for int8.

    Returns:
        ``(scores [Q, k], indices [Q, k], rescored [Q])``; the last, int64, counts the items scored again in float64.

    Raises:
        InputError: ``k`` below 1, an ``among`` not as described, or quantized items of another number or shape.
    """
    fields = [Pieces(field) for field in quantized]
    _check_quantized(items, fields)
    items, fields = items.only(among), [field.only(among) for field in fields]
    width = queries.shape[2]
    values, scales = quantize(queries)
    terms = error_terms(queries, values, scales)

    def parts(item_values: Tensor, item_scales: Tensor, item_terms: Tensor, anchors: Tensor) -> list[Tensor]:
        cosines = score(queries[:, :1], anchors, alpha=1.0)
        fine = score(values, item_values, alpha=0.0, query_scales=scales, item_scales=item_scales)
        return [cosines, fine, item_terms.T.clone()]  # the chunk's memory is reused for the next

    def brackets() -> Iterator[Bracket]:
        for first, (cosines, fine, item_terms) in _passes(fields, queries, parts):
            item_terms = item_terms.T
            cosine_errors = cosine_rounding(terms, item_terms, width=width)
            fine_errors = error_bound(terms, item_terms, alpha=0.0)
            scores = alpha * cosines + (1 - alpha) * fine
            yield first, scores, abs(alpha) * cosine_errors + abs(1 - alpha) * fine_errors

    def finer(first: int, count: int) -> tuple[Tensor, Tensor]:
        norms = fields[2].read(first, first + count).to(queries.device)[:, 5]
        errors = _slack(queries, items, alpha) * torch.outer(terms[:, 5], norms)
        return _pass(queries, items, range(first, first + count), alpha, score), errors

    best, positions, rescored = _search(queries, items, k, alpha, brackets(), finer)
    return best, items.numbers(positions), rescored


def _check_quantized(items: Pieces, fields: list[Pieces]) -> None:
    n_items, tokens, width = items.shape
    expected = [[n_items, tokens, width], [n_items, tokens], [n_items, 6], [n_items, min(tokens, 1), width]]
    for requirement, field in zip(expected, fields, strict=True):
        if list(field.shape) != requirement:
            raise InputError(f"expected quantized items {requirement}, got {list(field.shape)}; quantize these items")
    values, *scales, anchors = [field.dtype for field in fields]
    if [values, *scales] != [torch.int8, torch.float32, torch.float32] or not anchors.is_floating_point:
        got = ", ".join(str(field.dtype) for field in fields)
        raise InputError(
            f"expected quantized items in int8, float32, float32 and floats, got {got}; quantize these items"
        )


def _slack(queries: Tensor, items: Pieces, alpha: float) -> float:
    """Largest error of a float32 score, relative to the largest norms of both sides."""
    _, query_tokens, width = queries.shape
    slack = rounding(width, query_tokens) + rounding(width, items.shape[1])
    return slack * (abs(alpha) + 2 * abs(1 - alpha))


def _passes(
    sources: list[Pieces], queries: Tensor, parts: Callable[..., list[Tensor]]
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield the results of ``parts`` for each chunk, ``[..., n]``, with the chunk's first position.

    If many items are chosen, all are scored and the others left out afterwards. On a GPU, results are joined, too. So there,
    neither the pieces nor the gaps between items determine how often the best are selected and the host waits for the GPU.
    """
    device = queries.device
    elements = _GPU_SCORE_ELEMENTS if is_gpu(device) else 0
    among = columns = None
    if sources[0].is_dense and all(source.device == device for source in sources):
        among, sources = sources[0].among, [source.everything for source in sources]
        columns = None if among is None else among.to(device)
    start, end, waiting = 0, 0, []
    for first, chunk in chunks(sources, len(queries), device):
        waiting.append(parts(*chunk))
        end = first + len(chunk[0])
        if end < sources[0].shape[0] and (end - start) * len(queries) < elements:
            continue
        joined = [torch.cat(matrices, dim=-1) for matrices in zip(*waiting, strict=True)]
        if among is None or columns is None:
            yield start, joined
        else:
            low, high = torch.searchsorted(among, torch.tensor([start, end])).tolist()
            if low < high:
                yield low, [matrix[..., columns[low:high] - start] for matrix in joined]
        start, waiting = end, []


def _pass(queries: Tensor, items: Pieces, within: range, alpha: float, score: Score) -> Tensor:
    """Scores of the items at these positions, ``[Q, n]``."""
    parts = chunks([items], len(queries), queries.device, within)
    return torch.cat([score(queries, chunk, alpha=alpha) for _, (chunk,) in parts], dim=1)


def _search(
    queries: Tensor, items: Pieces, k: int, alpha: float, brackets: Iterable[Bracket], finer: Finer | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, positions, and the number of pairs of each query that were scored again."""
    k = whole_number("k", k)
    k = min(k, items.shape[0])
    with torch.no_grad(), full_float32():
        query, item = _candidates(len(queries), k, brackets, finer, queries.device)

        def ranked() -> tuple[Tensor, Tensor, Tensor]:
            return _rank(query, item, _rescore(queries, items, query, item, alpha), len(queries), k)

        work = len(query) * queries.shape[1] * items.shape[1] * items.shape[2]
        return ranked() if is_gpu(queries.device) or work > LEAST_SHARED_WORK else alone(ranked)


def _candidates(
    n_queries: int, k: int, brackets: Iterable[Bracket], finer: Finer | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pairs (query, item) that may be among the ``k`` best: all that are, and few that are not."""
    lowest = torch.empty(n_queries, 0, device=device)  # the k best lower ends so far
    empty = torch.empty(0, dtype=torch.int64, device=device)
    open_pairs = [(empty, empty, torch.empty(0, device=device))]
    threshold = _threshold(lowest, k)
    for first, scores, errors in brackets:
        lower, upper = _ends(scores, errors)
        after = _best(lowest, lower, k)
        threshold = _threshold(after, k)
        is_open = upper >= threshold[:, None]
        if finer is not None and is_open.sum() > n_queries * (k + _MOST_OPEN * scores.shape[1]):
            lower, upper = _ends(*finer(first, scores.shape[1]))
            after = _best(lowest, lower, k)
            threshold = _threshold(after, k)
            is_open = upper >= threshold[:, None]
        lowest = after
        query, item = is_open.nonzero(as_tuple=True)
        open_pairs.append((query, item + first, upper[query, item]))
    query, item, upper = (torch.cat(parts) for parts in zip(*open_pairs, strict=True))
    still = upper >= threshold[query]  # the threshold has risen since
    return query[still], item[still]


def _ends(scores: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and upper ends of brackets, infinite where anything is not finite."""
    known = (scores - errors).isfinite()
    return (scores - errors).where(known, -torch.inf), (scores + errors).where(known, torch.inf)


def _best(lowest: Tensor, lower: Tensor, k: int) -> Tensor:
    all_ends = torch.cat([lowest, lower], dim=1)
    return all_ends.topk(min(k, all_ends.shape[1]), dim=1).values


def _threshold(lowest: Tensor, k: int) -> Tensor:
    """Upper end that an item must reach, ``[Q]``; any, as long as there are fewer than ``k`` items."""
    return lowest[:, -1] if 0 < k == lowest.shape[1] else lowest.new_full((len(lowest),), -torch.inf)


def _rescore(queries: Tensor, items: Pieces, query: Tensor, item: Tensor, alpha: float) -> Tensor:
    """The float32 nearest to the exact score of each pair, ``[P]``."""
    at_once = pairs_at_once(queries.shape[1:], items.shape[1:], queries.device)
    parts = [torch.empty(0, device=query.device)]
    for some_queries, some_items in zip(query.split(at_once), item.split(at_once), strict=True):
        cosine, fine = exact_parts(queries[some_queries], items.take(some_items).to(queries.device))
        parts.append((alpha * cosine + (1 - alpha) * fine).float())
    return torch.cat(parts)


def exact_parts(queries: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the two parts of the scores of pairs, global cosine and late interaction, in float64.

    Args:
        queries: ``[P, L_q, D]``.
        items: ``[P, L_i, D]``, at most :func:`pairs_at_once`.

    Returns:
        float64 ``[P]`` each; zeros without tokens.
    """
    if 0 in (queries.shape[1], items.shape[1]):
        nothing = torch.zeros(len(queries), dtype=torch.float64, device=queries.device)
        return nothing, nothing
    similarity = torch.bmm(queries.double(), items.double().transpose(1, 2))
    over_items = F.leaky_relu(similarity.amax(dim=2), LEAKY_SLOPE).mean(dim=1)
    over_queries = F.leaky_relu(similarity.amax(dim=1), LEAKY_SLOPE).mean(dim=1)
    return similarity[:, 0, 0], over_items + over_queries


def pairs_at_once(query: Sequence[int], item: Sequence[int], device: torch.device) -> int:
    """Number of pairs of the shapes ``(L_q, D)`` and ``(L_i, D)`` whose exact scores are computed at a time."""
    per_pair = (query[0] + item[0]) * item[1] + query[0] * item[0]
    return max(1, (_GPU_RESCORE_ELEMENTS if device.type == "cuda" else _RESCORE_ELEMENTS) // max(1, per_pair))


def _rank(query: Tensor, item: Tensor, scores: Tensor, n_queries: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` best of each query's candidates (there are at least ``k``), and the number of candidates."""
    # Stable sorts by the least important key first: index, score, query.
    order = item.argsort(stable=True)
    order = order[scores[order].nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)]
    order = order[query[order].argsort(stable=True)]
    counts = query.bincount(minlength=n_queries)
    best = order[(counts.cumsum(0) - counts)[:, None] + torch.arange(k, device=query.device)]
    return scores[best], item[best], counts
