"""``Index``: items that are kept, searched and looked after."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from torch import Tensor

from finelip_fast._arguments import share, whole_number
from finelip_fast.errors import InputError, StoreError
from finelip_fast.index import faiss, recovery, remedies, upkeep
from finelip_fast.index.arrays import within_memory
from finelip_fast.index.catalogue import Item
from finelip_fast.index.database import between_forks
from finelip_fast.index.search import CandidateSource, Mode, Tuning, best_rows, choose_mode, parts_of_scores
from finelip_fast.index.store import Store, stored_spec
from finelip_fast.index.view import View

_TUNING = "tuning"


@dataclass(frozen=True)
class Found:
    """What a search of ``Q`` queries found, best first.

    Attributes:
        scores, global_scores, fine_scores: float32 ``[Q, k]``.
        numbers: int64 ``[Q, k]``, counting items in order of insertion.
        items: What the catalogue knows of them, ``Q`` lists of ``k``.
        mode: How they were found.
    """

    scores: Tensor
    global_scores: Tensor
    fine_scores: Tensor
    numbers: Tensor
    items: list[list[Item]]
    mode: Mode


class Index(Store):
    """Items to search, in memory or kept in a folder; arguments as :class:`finelip_fast.index.store.Store`."""

    _source: tuple[View, CandidateSource | None] | None = None

    def search(
        self,
        queries: Tensor,
        k: int,
        *,
        alpha: float | None = None,
        mode: str = "auto",
        where: str | None = None,
        candidates: int | None = None,
    ) -> Found:
        """The ``k`` best items of each query.

        Args:
            queries: Embeddings ``[Q, L_q, D]``, unit rows.
            k: How many; fewer come back when there are fewer.
            alpha: Weight of the global cosine; None: the spec's.
            mode: See :mod:`finelip_fast.index.search`.
            where: Only items whose metadata fit, see :mod:`finelip_fast.index.filters`.
            candidates: Of a search in two stages; None: as it was tuned.

        Raises:
            InputError: ``k`` or ``candidates`` that are no integers from 1 on, ``alpha`` that is no number in [0, 1], queries
                of another shape or that are not finite, no such mode, or a filter that cannot be read.
            StoreError: The index is closed, cannot be read, or needs more memory or open files than this process may have.
        """
        alpha = self.spec.alpha if alpha is None else alpha
        k, candidates = whole_number("k", k), None if candidates is None else whole_number("candidates", candidates)
        alpha = share("alpha", alpha)
        if not isinstance(queries, Tensor) or queries.ndim != 3 or queries.shape[2] != self.spec.width:
            got = list(queries.shape) if isinstance(queries, Tensor) else type(queries).__name__
            raise InputError(f"expected queries [Q, L, {self.spec.width}], got {got}")
        if not queries.isfinite().all():
            raise InputError("expected queries of finite numbers, got NaN or infinity: look where they were made")
        while True:
            view = self.view()
            try:
                with between_forks(), within_memory():
                    found = self._search(view, queries, k, alpha, mode, where, candidates)
            except FileNotFoundError as error:
                if self.view() is view:
                    raise StoreError(
                        f"segment {error.filename} is missing: restore it, or {remedies.repair(self.folder)}"
                    ) from None
                continue
            except OSError as error:  # of mapping and reading
                raise StoreError(
                    f"the search needs more than this process may have ({error!s:.200}): raise the limit (ulimit -n), or "
                    "search fewer items at once"
                ) from None
            if found is not None:
                return found
            # Another process has compacted the index meanwhile.

    def _search(
        self, view: View, queries: Tensor, k: int, alpha: float, mode: str, where: str | None, candidates: int | None
    ) -> Found | None:
        among = None
        if where is not None:
            matching = self.catalogue.matching(where, view.version)
            if self.catalogue.oldest > view.version:
                return None
            among = view.rows_at(matching)
        tuning = self.tuning
        count = len(view) if among is None else len(among)
        chosen = choose_mode(mode, view, tuning, k=k, alpha=alpha, items=count)
        if candidates is None and tuning is not None:
            candidates = tuning.candidates
        scores, rows = best_rows(
            view, queries, k, alpha=alpha, mode=chosen, candidates=candidates, among=among, source=self.source_for(view)
        )
        rows = rows.cpu()
        positions = view.positions(rows)
        items = self.catalogue.at(positions.flatten().tolist(), view.version)
        if items is None:
            return None
        view.refuse_damaged(items.values())
        global_scores, fine_scores = parts_of_scores(view, queries, rows)
        try:
            found = [[items[position] for position in row] for row in positions.tolist()]
        except KeyError as error:
            raise StoreError(
                f"the catalogue of the index at {self.folder} is damaged: nothing is at position {error}; "
                f"{remedies.restore(self.folder)}"
            ) from None
        return Found(scores.cpu(), global_scores, fine_scores, view.numbers(rows), found, chosen)

    def source_for(self, view: View) -> CandidateSource | None:
        """The first stage of two where :meth:`build_candidates` made one that suits the view; None: all global embeddings."""
        with between_forks(), self.view_lock:
            if self._source is None or self._source[0] is not view:
                self._source = view, faiss.find(view, self.cache_folder)
            return self._source[1]

    def build_candidates(self, *, lists: int | None = None, progress: bool = True) -> None:
        """Make the first stage of two fast for many millions of items, with faiss; see :mod:`finelip_fast.index.faiss`.

        Raises:
            EngineError: faiss is not installed.
            InputError: An index in memory, or too few items.
            StoreError: The index is closed, or the disk refuses.
        """
        if self.cache_folder is None:
            raise InputError("expected an index with a folder that can be written to")
        faiss.build(self.view(), self.cache_folder, lists=lists, progress=progress)
        self._source = None

    @property
    def tuning(self) -> Tuning | None:
        """What :func:`finelip_fast.index.tune.tune` has found; None: it has not been run."""
        kept = self.catalogue.note(_TUNING)
        try:
            return None if kept is None else _tuning(**kept)
        except (TypeError, ValueError, KeyError):
            raise StoreError(
                f"what was tuned of the index at {self.folder} cannot be read, {kept!r:.80}: run finelip index tune again"
            ) from None

    @tuning.setter
    def tuning(self, tuning: Tuning | None) -> None:
        self.refuse_if_fixed()
        self.catalogue.keep(_TUNING, None if tuning is None else asdict(tuning))

    # Looking after a folder ---------------------------------------------------------------------------------------------

    def check(self) -> dict[str, str]:
        """What is wrong with each damaged item, by its id; see :func:`finelip_fast.index.upkeep.check`."""
        return upkeep.check(self)

    def repair(self) -> dict[str, str]:
        """Take out what is damaged, keep the rest, and take back what nothing names any more.

        See :func:`finelip_fast.index.upkeep.repair` and :func:`finelip_fast.index.recovery.take_back`.
        """
        removed = upkeep.repair(self)
        recovery.take_back(self)
        recovery.keep_copy(self)
        return removed

    def maintain(self) -> dict[str, int]:
        """Compact, remove files that nothing needs, and keep a copy of the catalogue; see
        :func:`finelip_fast.index.upkeep.maintain`.
        """
        report = upkeep.maintain(self)
        recovery.keep_copy(self)
        return report

    def lost(self) -> dict[str, int]:
        """How many items each segment has that nothing names, by its name; :meth:`repair` takes them back."""
        return {name: len(listed.ids) for name, listed in recovery.lost(self).items()}

    def snapshot(self, folder: str | PathLike[str]) -> None:
        """Copy a folder's index to another; see :func:`finelip_fast.index.upkeep.snapshot`."""
        upkeep.snapshot(self, folder)


def _tuning(**kept: Any) -> Tuning:
    """
    Raises:
        TypeError, ValueError, KeyError: Not of the kinds that a tuning has.
    """
    tuning = Tuning(**kept)
    numbers = [
        tuning.agreement,
        tuning.target,
        tuning.alpha,
        *(tuning.seconds[mode] for mode in ("exact", "two-stage")),
    ]
    if any(type(number) not in (int, float) for number in numbers):
        raise ValueError
    if any(type(count) is not int or count < 1 for count in (tuning.candidates, tuning.k, tuning.items)):
        raise ValueError
    return tuning


def stored_index(folder: str | PathLike[str], **options: Any) -> Index:
    """The index in a folder, opened without its checkpoint: to look after it, or to search with embeddings.

    Args:
        folder: Of the index.
        options: As for :class:`Index`.

    Raises:
        StoreError: There is none, or it cannot be read.
    """
    stored = stored_spec(folder)
    if stored is None:
        raise StoreError(f"there is no index at {folder}: make one with finelip index FOLDER --index {folder}")
    spec, source = stored
    return Index(spec, folder, source=source, **options)
