"""Search a view: exactly, exactly by way of int8, or in two stages.

- ``exact``: every item is scored, token by token.
- ``exact-int8``: every item is scored in int8, whose error has a proven bound, and what that leaves undecided is scored again.
  The result is the same as with ``exact``, from half the bytes.
- ``two-stage``: the global embeddings select ``candidates`` items, which are then scored token by token.
  :func:`finelip_fast.index.tune.tune` measures what this loses.
- ``sketch``: two stages, of which the first compares all token rows in one or two bits per column, see
  :mod:`finelip_fast.index.sketches`. Where late interaction counts, it loses far less with the same number of candidates.
- ``auto``: the two-stage mode that was measured to lose little enough, otherwise the faster of the exact modes.

With ``alpha = 1`` only the global cosine counts: row 0 of each embedding is compared, in full precision in both exact modes,
and no other row is read.

The result does not depend on how items are distributed over segments.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from finelip_fast._arguments import one_of
from finelip_fast.index.standing import sampled_rows
from finelip_fast.index.view import View
from finelip_fast.kernels import clim_scores, clim_topk, clim_topk_int8, cosine_candidates, cpu, quantize
from finelip_fast.kernels.clim.rows import Pieces
from finelip_fast.kernels.clim.topk import exact_parts, pairs_at_once
from finelip_fast.kernels.threads import side_by_side

Mode = Literal["auto", "exact", "exact-int8", "two-stage", "sketch"]
TwoStages = Literal["two-stage", "sketch"]
TWO_STAGES: tuple[TwoStages, ...] = get_args(TwoStages)

# Number of candidates of an untuned two-stage search: the larger of a constant and a multiple of k.
_CANDIDATES, _CANDIDATES_PER_HIT = 256, 16


@dataclass(frozen=True)
class Tuning:
    """Measurements of two-stage search, see :func:`finelip_fast.index.tune.tune`.

    Attributes:
        candidates: Chosen number of candidates.
        agreement: Mean share of the exact ``k`` best that two-stage search finds.
        target: Requested agreement.
        k, alpha, items: Values used in the measurement.
        recall_change: Change in recall@1 from exact to two-stage search; None: the correct answers were not known.
        seconds: Median time of a query in each mode, on the machine of the measurement.
        mode: Chosen first stage.
    """

    candidates: int
    agreement: float
    target: float
    k: int
    alpha: float
    items: int
    recall_change: float | None
    seconds: dict[str, float]
    mode: TwoStages = "two-stage"

    def suits(self, items: int, k: int, alpha: float) -> bool:
        """Whether it was measured for such a search: the same alpha, no more hits, and less than twice the items."""
        return k <= self.k and alpha == self.alpha and items < 2 * self.items

    def holds(self, items: int, k: int, alpha: float) -> bool:
        """Whether such a search agrees with an exact one as much as requested."""
        return self.agreement >= self.target and self.suits(items, k, alpha)


class CandidateSource(Protocol):
    """The first stage of a search in two stages."""

    @abstractmethod
    def __call__(self, queries: Tensor, count: int, among: Tensor | None, *, alpha: float) -> Tensor:
        """Rows of the items that may be the best.

        Args:
            queries: ``[Q, L, D]``.
            count: Number of candidates for each query.
            among: Rows to choose from, ascending; None: all.
            alpha: Weight of the global cosine.

        Returns:
            int64 ``[Q, C]``, ``C`` at most ``count``; padded with -1.
        """


def choose_mode(mode: Mode, view: View, tuning: Tuning | None, *, k: int, alpha: float, items: int) -> Mode:
    """Choose the mode to run; ``items`` is the number of items to choose from.

    Raises:
        InputError: The mode is unknown.
    """
    one_of("mode", mode, get_args(Mode))
    if mode != "auto":
        return mode
    exact = exact_mode(view, alpha)
    if tuning is None or not tuning.holds(len(view), k, alpha) or items <= tuning.candidates:
        return exact
    return tuning.mode if tuning.seconds[tuning.mode] < tuning.seconds["exact"] * items / len(view) else exact


def exact_mode(view: View, alpha: float) -> Mode:
    """The faster of the exact modes.

    The global cosine alone does not use int8 copies. A CPU without instructions for int8 (VNNI) multiplies them as float32,
    and takes longer than with float16.
    """
    multiplies_int8 = view.device.type != "cpu" or cpu.has_int8() or view.tokens is None
    return "exact-int8" if alpha != 1 and multiplies_int8 and view.is_quantized else "exact"


def best_rows(
    view: View,
    queries: Tensor,
    k: int,
    *,
    alpha: float,
    mode: Mode,
    candidates: int | None = None,
    among: Tensor | None = None,
    source: CandidateSource | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the ``k`` best rows for each query.

    Args:
        view: View to search.
        queries: ``[Q, L, D]``.
        k: Number of rows; fewer are returned if there are fewer.
        alpha: Weight of the global cosine.
        mode: Any mode but ``auto``.
        candidates: Number of candidates for two-stage search; at least ``k``.
        among: Rows to search, ascending; None: all that are items.
        source: First stage of ``two-stage`` and ``sketch``; None: all global embeddings.

    Returns:
        ``(scores [Q, k], rows [Q, k])``, float32 and int64, best first, ties in order of row.

    Raises:
        StoreError: A segment cannot be read.
    """
    view.refuse_shortened()
    among = view.living if among is None else among
    count = view.rows if among is None else len(among)
    if not count or not len(queries):
        empty = torch.empty(len(queries), 0, device=view.device)
        return empty, empty.long()
    queries = queries.to(view.device, _dtype(view))
    if mode in TWO_STAGES:
        n_candidates = max(k, candidates or max(_CANDIDATES, _CANDIDATES_PER_HIT * k))
        if n_candidates < count:
            return _two_stages(view, queries, k, alpha, n_candidates, among, source)
        mode = "exact"  # with so few items, all are candidates
    if alpha == 1:
        return clim_topk(queries[:, :1], view.anchors, k, alpha=alpha, among=among)
    if mode == "exact-int8" or view.tokens is None:
        scores, rows, _ = clim_topk_int8(queries, view.tokens, view.quantized, k, alpha=alpha, among=among)
        return scores, rows
    return clim_topk(queries, view.tokens, k, alpha=alpha, among=among)


def _dtype(view: View) -> torch.dtype:
    """Dtype of both sides of a comparison: that of the items as they are read."""
    return view.segments[0].dtype


def _two_stages(
    view: View,
    queries: Tensor,
    k: int,
    alpha: float,
    count: int,
    among: Tensor | None,
    source: CandidateSource | None,
) -> tuple[Tensor, Tensor]:
    if source is None:
        values, scales = view.globals
        candidates = cosine_candidates(queries[:, 0].contiguous(), values, scales, count, among=among)
    else:
        candidates = source(queries, count, among, alpha=alpha)
    embeddings_of: Callable[[Tensor], Tensor] = view.read
    if alpha == 1:
        queries, embeddings_of = queries[:, :1], Pieces(view.anchors).take

    def second_stage(query_and_candidates: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, rows = query_and_candidates
        rows = rows[rows >= 0].sort().values
        scores, at = clim_topk(query[None], embeddings_of(rows).to(queries), k, alpha=alpha)
        return scores[0], rows.to(at.device)[at[0]]

    pairs = list(zip(queries, candidates, strict=True))
    pieces = side_by_side(second_stage, pairs) if view.device.type == "cpu" else list(map(second_stage, pairs))
    return torch.stack([scores for scores, _ in pieces]), torch.stack([rows for _, rows in pieces])


def sampled_scores(view: View, queries: Tensor, *, alpha: float, among: Tensor | None) -> Tensor:
    """Scores float32 ``[Q, n]`` of an evenly spread sample of the items; arguments as in :func:`best_rows`.

    A sample of all items uses int8 rows, since only the distribution of the scores matters.
    """
    queries = queries.to(view.device, _dtype(view))
    if alpha == 1:
        rows = sampled_rows(view.rows, view.living if among is None else among)
        return clim_scores(queries[:, :1], Pieces(view.anchors).take(rows).to(queries), alpha=alpha)
    if among is not None:
        return clim_scores(queries, view.read(sampled_rows(view.rows, among)).to(queries), alpha=alpha)
    (values, scales), (query_values, query_scales) = view.sample, quantize(queries)
    return clim_scores(query_values, values, alpha=alpha, query_scales=query_scales, item_scales=scales)


def parts_of_scores(view: View, queries: Tensor, rows: Tensor, *, fine: bool = True) -> tuple[Tensor, Tensor | None]:
    """Global cosines and, with ``fine``, late-interaction scores alone of found rows ``[Q, k]``, each float32 ``[Q, k]``."""
    parts = torch.empty(2, rows.numel())
    if rows.numel():
        queries = queries.to(view.device, _dtype(view))
        query = torch.arange(len(rows)).repeat_interleave(rows.shape[1]).to(view.device)
        at_once = pairs_at_once(queries.shape[1:], queries.shape[1:], view.device)
        for first in range(0, rows.numel(), at_once):
            pairs = slice(first, first + at_once)
            embeddings = view.read(rows.flatten()[pairs]).to(view.device)
            parts[:, pairs] = torch.stack(exact_parts(queries[query[pairs]], embeddings)).to(parts)
    cosines, interactions = parts.view(2, *rows.shape)
    return cosines, interactions if fine else None
