"""``Searcher``: search the items of a store, with the first stages and the tuning that are kept for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from finelip_fast._arguments import Embeddings, share, whole_number
from finelip_fast.errors import FineLIPError, InputError, StoreError
from finelip_fast.index import faiss, remedies
from finelip_fast.index.arrays import within_memory
from finelip_fast.index.catalogue import Item
from finelip_fast.index.checks import as_queries
from finelip_fast.index.forks import between_forks
from finelip_fast.index.search import (
    TWO_STAGES,
    CandidateSource,
    Mode,
    Tuning,
    best_rows,
    choose_mode,
    parts_of_scores,
    sampled_scores,
)
from finelip_fast.index.sketches import Sketches
from finelip_fast.index.standing import FEWEST, stands_out
from finelip_fast.index.store import Store
from finelip_fast.index.view import View
from finelip_fast.kernels.clim.sketch import BITS, check_bits
from finelip_fast.kernels.threads import side_by_side

_TUNING, _SKETCH = "tuning", "sketch"
# With so few queries, what is computed of their hits is too short to be shared among threads.
_FEW_QUERIES = 8
_FILTERS = 4  # filters whose rows are kept, 8 bytes each


@dataclass(frozen=True)
class SearchResults:
    """Results of a search with ``Q`` queries, best first.

    Attributes:
        scores, global_scores: float32 ``[Q, k]``.
        fine_scores: float32 ``[Q, k]``; None for a checkpoint without trained aggregators.
        numbers: int64 ``[Q, k]``, numbers of the hits among all items in order of insertion.
        items: Catalogue entries of the hits, ``Q`` lists of ``k``.
        mode: Mode that found them.
        stands_out: float32 ``[Q, k]``, how far each hit stands out, see :mod:`finelip_fast.index.standing`; NaN if all
            searched items score the same; None: fewer than 50 items, or a collection on object storage.
    """

    scores: Tensor
    global_scores: Tensor
    fine_scores: Tensor | None
    numbers: Tensor
    items: list[list[Item]]
    mode: Mode
    stands_out: Tensor | None = None


class Searcher:
    """Search the items of a store; :class:`finelip_fast.index.Index` describes the arguments and errors.

    Args:
        store: Store whose items are searched.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.spec, self.folder = store, store.spec, store.folder
        self._stage: tuple[tuple[View, object], CandidateSource | None] | None = None  # with what it was made from
        self._sketches = Sketches(store.cache_folder)

    def search(
        self,
        queries: Embeddings,
        k: int,
        *,
        alpha: float | None,
        mode: Mode,
        where: str | None,
        candidates: int | None,
    ) -> SearchResults:
        """Find the ``k`` best items for each query."""
        alpha = self.spec.alpha if alpha is None else alpha
        k, candidates = whole_number("k", k), None if candidates is None else whole_number("candidates", candidates)
        alpha = share("alpha", alpha)
        queries = as_queries(queries, self.spec.width)
        while True:
            view = self.store.view()
            try:
                with between_forks(), within_memory():
                    result = self._search(view, queries, k, alpha, mode, where, candidates)
            except FileNotFoundError as error:
                if self.store.view() is view:
                    raise self.store.missing(error) from None
                continue
            except OSError as error:  # from mapping and reading
                raise StoreError(
                    f"the search needs more memory or open files than this process may use ({error!s:.200}); raise the limit "
                    "(ulimit -n), or search fewer items at once"
                ) from None
            if result is not None:
                return result
            # Another process has compacted the index meanwhile.

    def _search(
        self, view: View, queries: Tensor, k: int, alpha: float, mode: Mode, where: str | None, candidates: int | None
    ) -> SearchResults | None:
        among = None
        if where is not None:
            among = self._rows_matching(view, where)
            if among is None:
                return None
        tuning = self.tuning
        count = len(view) if among is None else len(among)
        chosen = choose_mode(mode, view, tuning, k=k, alpha=alpha, items=count)
        if candidates is None and tuning is not None and tuning.mode == chosen and tuning.suits(len(view), k, alpha):
            candidates = tuning.candidates
        scores, rows = best_rows(
            view,
            queries,
            k,
            alpha=alpha,
            mode=chosen,
            candidates=candidates,
            among=among,
            source=self.first_stage(view, chosen, alpha),
        )
        rows = rows.cpu()
        positions = view.positions(rows)
        items = self.store.catalogue.at(positions.flatten().tolist(), view.version)
        if items is None:
            return None
        view.refuse_damaged(items.values())
        calls: list[Callable[[], Any]] = [partial(parts_of_scores, view, queries, rows, fine=not self.spec.is_global)]
        if count >= FEWEST and len(queries):
            calls.append(partial(sampled_scores, view, queries, alpha=alpha, among=among))
        are_short = view.device.type == "cpu" and len(queries) <= _FEW_QUERIES
        (global_scores, fine_scores), *sampled = (side_by_side if are_short else map)(_called, calls)
        try:
            hits = [[items[position] for position in row] for row in positions.tolist()]
        except KeyError as error:
            raise StoreError(
                f"the catalogue of the index at {self.folder} is damaged: it has no item at position {error}; "
                f"{remedies.restore(self.folder)}"
            ) from None
        scores = scores.cpu()
        standing = stands_out(scores, sampled[0].cpu(), count, alpha) if sampled else None
        return SearchResults(scores, global_scores, fine_scores, view.numbers(rows), hits, chosen, standing)

    def _rows_matching(self, view: View, where: str) -> Tensor | None:
        """Rows that a filter lets through, ascending; None: another process has compacted the index meanwhile.

        The last few results are kept with the view, because people look at the same part of an index many times.
        """
        rows = view.filtered.get(where) if isinstance(where, str) else None
        if rows is None:
            matching = self.store.catalogue.matching(where, view.version)
            if self.store.catalogue.oldest > view.version:
                return None
            rows = view.rows_at(matching)
            with self.store.view_lock:
                while len(view.filtered) >= _FILTERS:
                    view.filtered.pop(next(iter(view.filtered)))
                view.filtered[where] = rows
        return rows

    def first_stage(self, view: View, mode: Mode, alpha: float) -> CandidateSource | None:
        """The first stage of a two-stage search; None: all global embeddings, or an exact mode.

        For ``sketch``, it is built if missing. For ``two-stage``, it is what :meth:`build_candidates` built, if that fits the
        view.

        Raises:
            InputError: The embeddings are too wide for a sketch.
            StoreError: A segment cannot be read.
        """
        if mode == "sketch" and alpha != 1 and self.spec.tokens > 1 and len(view):
            return self._sketches.source(view, self.sketch_bits or BITS[0])
        if mode != "two-stage":
            return None
        with between_forks(), self.store.view_lock:
            current = view, faiss.state(self.store.cache_folder)
            if self._stage is None or self._stage[0] != current:
                self._stage = current, faiss.find(view, self.store.cache_folder)
            return self._stage[1]

    def build_candidates(self, *, lists: int | None, progress: bool) -> None:
        """Build the file of faiss for the first stage."""
        if self.store.cache_folder is None:
            got = "one in memory" if self.folder is None else "a read-only folder"
            raise InputError(f"expected an index in a writable folder, got {got}")
        self.store.refuse_if_fixed()  # its file would take the place of that of the newest version
        faiss.build(self.store.view(), self.store.cache_folder, lists=lists, progress=progress)

    def build_sketches(self, bits: int) -> int:
        """Build sketches of all items, and return their size in bytes."""
        check_bits(bits)
        if self.spec.tokens == 1:
            raise InputError(
                "expected an index of embeddings with tokens, got one with only global rows; search it with "
                "mode='exact', which needs no sketches"
            )
        self.store.refuse_if_fixed()
        self.store.catalogue.keep(_SKETCH, bits)
        return self.store.on_view(lambda view: self._sketches.source(view, bits).bytes if len(view) else 0)

    @property
    def sketch_bits(self) -> int | None:
        """Number of bits that :meth:`build_sketches` was given; None: it has not been called."""
        bits = self.store.catalogue.note(_SKETCH)
        if bits is not None and (type(bits) is not int or bits not in BITS):
            raise StoreError(
                f"the index at {self.folder} has invalid bits of sketches, {bits!r:.80}; run "
                f"{remedies.sketch(self.folder)} again"
            )
        return bits

    def sketch_changes(self) -> None:
        """Build sketches of new segments, if the index has any; the next search that needs them reports failures."""
        with suppress(FineLIPError, OSError):
            if self.folder is not None and self.sketch_bits is not None and len(self.store.view()):
                self._sketches.source(self.store.view(), self.sketch_bits)

    @property
    def tuning(self) -> Tuning | None:
        """Tuning stored with the index; None: there is none."""
        recorded = self.store.catalogue.note(_TUNING)
        try:
            return None if recorded is None else _tuning(**recorded)
        except (TypeError, ValueError, KeyError):
            raise StoreError(
                f"the index at {self.folder} has invalid tuned settings, {recorded!r:.80}; run "
                f"{remedies.tune(self.folder)} again, or discard them in Python: index.tuning = None"
            ) from None

    @tuning.setter
    def tuning(self, tuning: Tuning | None) -> None:
        if tuning is not None and not isinstance(tuning, Tuning):
            raise InputError(
                f"expected tuning as the result of finelip_fast.index.tune.tune, or None, got {tuning!r:.80}"
            )
        self.store.refuse_if_fixed()
        self.store.catalogue.keep(_TUNING, None if tuning is None else asdict(tuning))


def _called(function: Callable[[], Any]) -> Any:
    return function()


def _tuning(**recorded: Any) -> Tuning:
    """
    Raises:
        TypeError, ValueError, KeyError: The values are not of the types that a tuning has.
    """
    tuning = Tuning(**recorded)
    numbers = [
        tuning.agreement,
        tuning.target,
        tuning.alpha,
        *(tuning.seconds[mode] for mode in ("exact", tuning.mode)),
    ]
    if tuning.mode not in TWO_STAGES:
        raise ValueError
    if any(type(number) not in (int, float) for number in numbers):
        raise ValueError
    if any(type(count) is not int or count < 1 for count in (tuning.candidates, tuning.k, tuning.items)):
        raise ValueError
    return tuning
