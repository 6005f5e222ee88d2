"""Measure what two-stage search loses on an index; the chosen settings are stored with the index."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast._arguments import Embeddings, listed, one_of, share, strings, whole_number
from finelip_fast.errors import InputError
from finelip_fast.index.checks import as_queries, missing
from finelip_fast.index.index import Index
from finelip_fast.index.search import TWO_STAGES, Tuning, TwoStages, best_rows, exact_mode
from finelip_fast.index.searching import Searcher
from finelip_fast.index.view import View

CANDIDATES = (50, 100, 200, 400, 800, 1600, 3200, 6400)

# Number of queries that are timed; more would not change the median.
_TIMED = 15


class Trial(NamedTuple):
    """A first stage that was tried; agreement and change in recall@1 (None: no answers) are as in :class:`Tuning`."""

    mode: TwoStages
    candidates: int
    agreement: float
    recall_change: float | None
    milliseconds: float  # median per query


def sample_queries(index: Index, count: int = 200, *, seed: int = 0) -> Tensor:
    """Embeddings of randomly chosen items of the index, for tuning when no real queries are available.

    These are pictures that search for pictures. They rank differently from texts, so real queries are better.

    Raises:
        InputError: The index is empty, ``count`` is not a positive integer, or ``seed`` is not one of at most 63 bits.
    """
    count, seed = whole_number("count", count), whole_number("seed", seed, least=0, most=(1 << 63) - 1)

    def sample(view: View) -> Tensor:
        if not len(view):
            raise InputError("expected an index with items to tune, got an empty one; add items first")
        numbers = torch.randperm(len(view), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        return view.read(numbers if view.living is None else view.living[numbers])

    return index._searcher.store.on_view(sample)


def tune(
    index: Index,
    queries: Embeddings,
    *,
    answers: Sequence[str] | None = None,
    agreement: float = 0.99,
    k: int = 10,
    alpha: float | None = None,
    candidates: Sequence[int] = CANDIDATES,
    modes: Sequence[TwoStages] | None = None,
    progress: bool = True,
) -> tuple[Tuning, list[Trial]]:
    """Choose the first stage and the number of candidates for two-stage search, and store the choice with the index.

    Args:
        index: Index to search.
        queries: Embeddings ``[Q, L, D]`` like those of real queries, unit rows; a tensor or an array.
        answers: Id of the correct item for each query, to measure the change in recall@1; None: not known.
        agreement: Target for the mean share of the exact ``k`` best that are found. Each mode uses the smallest number of
            candidates that reaches it, or the largest tried. The fastest mode that reaches it is chosen, or else the one with
            the highest agreement.
        k: Number of hits to compare.
        alpha: Weight of the global cosine; None: the index's.
        candidates: Numbers of candidates to try, at least ``k`` and below the number of items; others are left out.
        modes: First stages to try; None: ``two-stage``, and ``sketch`` if the index has sketches
            (:meth:`finelip_fast.index.Index.build_sketches`).
        progress: Whether to show a progress bar.

    Returns:
        The choice, and all trials.

    Raises:
        InputError: There are no queries, or not unit rows ``[Q, L, D]``; the answers differ from them in number or are not in
            the index; ``k`` or a number of candidates is not a positive integer, ``agreement`` or ``alpha`` is not in [0, 1],
            or a mode is unknown; or the index is too small to choose from.
        StoreError: The choice cannot be stored.
    """
    queries = as_queries(queries, index.spec.width)
    answers = None if answers is None else strings("answers", answers)
    agreement, k = share("agreement", agreement), whole_number("k", k)
    alpha = share("alpha", index.spec.alpha if alpha is None else alpha)
    numbers = {whole_number("candidates", number) for number in listed("candidates", candidates)}
    if modes is None:
        modes = TWO_STAGES if index.sketch_bits is not None else TWO_STAGES[:1]
    modes = listed("modes", modes)
    if not modes:
        raise InputError("expected modes with a first stage to try, got an empty list; leave modes out to try all")
    for mode in modes:
        one_of("mode", mode, TWO_STAGES)
    if not len(queries) or (answers is not None and len(answers) != len(queries)):
        raise InputError(
            f"expected queries, with an answer for each or for none, got {len(queries)} queries and "
            f"{len(answers or ())} answers"
        )
    store = index._searcher.store
    store.refuse_if_fixed()  # now, since the choice is stored only at the end
    measure = partial(
        _measure,
        index._searcher,
        queries=queries,
        answers=answers,
        agreement=agreement,
        k=k,
        alpha=alpha,
        candidates=sorted(numbers),
        modes=modes,
        progress=progress,
    )
    tuning, trials = store.on_view(measure)
    index.tuning = tuning
    return tuning, trials


def _measure(
    searcher: Searcher,
    view: View,
    *,
    queries: Tensor,
    answers: Sequence[str] | None,
    agreement: float,
    k: int,
    alpha: float,
    candidates: Sequence[int],
    modes: Sequence[TwoStages],
    progress: bool,
) -> tuple[Tuning, list[Trial]]:
    """The choice for one version of an index, and all trials; arguments and errors are those of :func:`tune`."""
    tried = [number for number in candidates if k <= number < len(view)]
    if not tried:
        raise InputError(
            f"expected more items than candidates to choose from, got {len(view)}; search an index this small exactly"
        )
    right = None if answers is None else _rows_of(searcher, view, answers)
    exact = partial(best_rows, view, k=k, alpha=alpha, mode=exact_mode(view, alpha))
    with tqdm(total=len(queries) * (1 + len(modes) * len(tried)), unit="query", disable=not progress) as bar:
        best = _search(exact, queries, bar)
        seconds = {"exact": _seconds(exact, queries)}
        trials: list[Trial] = []
        for mode, number in product(modes, tried):
            if any(trial.mode == mode and trial.agreement >= agreement for trial in trials):
                continue  # more candidates would only take longer
            source = searcher.first_stage(view, mode, alpha)
            two_stages = partial(best_rows, view, k=k, alpha=alpha, mode=mode, candidates=number, source=source)
            rows = _search(two_stages, queries, bar)
            change = None if right is None else _recall(rows, right) - _recall(best, right)
            time_of_one = _seconds(two_stages, queries)
            trials.append(Trial(mode, number, _agreement(rows, best), change, 1e3 * time_of_one))
    sufficient = [trial for trial in trials if trial.agreement >= agreement]
    chosen = (
        min(sufficient, key=lambda trial: trial.milliseconds)
        if sufficient
        else max(trials, key=lambda trial: trial.agreement)
    )
    tuning = Tuning(
        candidates=chosen.candidates,
        agreement=chosen.agreement,
        target=agreement,
        k=k,
        alpha=alpha,
        items=len(view),
        recall_change=chosen.recall_change,
        seconds=seconds | {chosen.mode: chosen.milliseconds / 1e3},
        mode=chosen.mode,
    )
    return tuning, trials


def _rows_of(searcher: Searcher, view: View, ids: Sequence[str]) -> Tensor:
    positions = searcher.store.catalogue.find(ids, view.version)
    absent = [item for item in ids if item not in positions]
    if absent:
        raise missing(absent)
    return torch.cat([view.rows_at([positions[item]]) for item in ids])


def _search(search: Callable[[Tensor], tuple[Tensor, Tensor]], queries: Tensor, bar: tqdm[Any]) -> Tensor:
    rows = []
    for block in queries.split(16):
        rows.append(search(block)[1].cpu())
        bar.update(len(block))
    return torch.cat(rows)


def _seconds(search: Callable[[Tensor], tuple[Tensor, Tensor]], queries: Tensor) -> float:
    times = []
    for query in queries[:_TIMED].split(1):
        start = time.perf_counter()
        search(query)[1].cpu()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _agreement(numbers: Tensor, best: Tensor) -> float:
    shared = (numbers[:, :, None] == best[:, None, :]).any(dim=1).float().mean(dim=1)
    return shared.mean().item()


def _recall(numbers: Tensor, right: Tensor) -> float:
    return (numbers[:, 0] == right).float().mean().item()
