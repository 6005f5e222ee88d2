"""``Index``: items that are kept, searched and looked after."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from finelip_fast._errors import InputError, StoreError
from finelip_fast.index import faiss, upkeep
from finelip_fast.index.catalogue import Item, read_spec
from finelip_fast.index.search import CandidateSource, Mode, Tuning, best_rows, choose_mode, parts_of_scores
from finelip_fast.index.store import CATALOGUE, IndexSpec, Store
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
            InputError: ``k < 1``, no such mode, or a filter that cannot be read.
            StoreError: The index is closed, or cannot be read.
        """
        alpha = self.spec.alpha if alpha is None else alpha
        while True:
            view = self.view()
            try:
                found = self._search(view, queries, k, alpha, mode, where, candidates)
            except FileNotFoundError as error:
                if self.view() is view:
                    raise StoreError(
                        f"segment {error.filename} is missing: restore it, or finelip index repair"
                    ) from None
                continue
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
        found = [[items[position] for position in own] for own in positions.tolist()]
        return Found(scores.cpu(), global_scores, fine_scores, view.numbers(rows), found, chosen)

    def source_for(self, view: View) -> CandidateSource | None:
        """The first stage of two where :meth:`build_candidates` made one that suits the view; None: all global embeddings."""
        with self.lock:
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
        return None if kept is None else Tuning(**kept)

    @tuning.setter
    def tuning(self, tuning: Tuning | None) -> None:
        self.refuse_if_fixed()
        self.catalogue.keep(_TUNING, None if tuning is None else asdict(tuning))

    # Looking after a folder ---------------------------------------------------------------------------------------------

    def check(self) -> dict[str, str]:
        """What is wrong with each damaged item, by its id; see :func:`finelip_fast.index.upkeep.check`."""
        return upkeep.check(self)

    def repair(self) -> dict[str, str]:
        """Take out what is damaged, and keep the rest; see :func:`finelip_fast.index.upkeep.repair`."""
        return upkeep.repair(self)

    def maintain(self) -> dict[str, int]:
        """Compact, and remove files that nothing needs; see :func:`finelip_fast.index.upkeep.maintain`."""
        return upkeep.maintain(self)

    def snapshot(self, folder: str | PathLike[str]) -> None:
        """Copy a folder's index to another; see :func:`finelip_fast.index.upkeep.snapshot`."""
        upkeep.snapshot(self, folder)


def stored_index(folder: str | PathLike[str], **options: Any) -> Index:
    """The index in a folder, opened without its checkpoint: to look after it, or to search with embeddings.

    Args:
        folder: Of the index.
        options: As for :class:`Index`.

    Raises:
        StoreError: There is none, or it cannot be read.
    """
    stored = read_spec(Path(folder) / CATALOGUE)
    if stored is None:
        raise StoreError(f"there is no index at {folder}: make one with finelip index FOLDER --index {folder}")
    spec = IndexSpec(**{one.name: stored[one.name] for one in fields(IndexSpec) if one.name in stored})
    return Index(spec, folder, source=stored["source"], **options)
