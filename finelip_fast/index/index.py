"""``Index``: items that are kept, searched and looked after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finelip_fast._arguments import share, whole_number
from finelip_fast.errors import FineLIPError, InputError, StoreError
from finelip_fast.index import faiss, recovery, remedies, upkeep
from finelip_fast.index.arrays import within_memory
from finelip_fast.index.catalogue import Item
from finelip_fast.index.contents import Contents
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
from finelip_fast.index.spec import IndexSpec, stored_spec
from finelip_fast.index.standing import FEWEST, stands_out
from finelip_fast.index.store import Existing, Store, Written
from finelip_fast.index.view import View
from finelip_fast.kernels.clim.sketch import BITS, check_bits

_TUNING, _SKETCH = "tuning", "sketch"


@dataclass(frozen=True)
class SearchResults:
    """What a search of ``Q`` queries found, best first.

    Attributes:
        scores, global_scores: float32 ``[Q, k]``.
        fine_scores: float32 ``[Q, k]``; None of a checkpoint without trained aggregators.
        numbers: int64 ``[Q, k]``, counting items in order of insertion.
        items: What the catalogue knows of them, ``Q`` lists of ``k``.
        mode: How they were found.
        stands_out: float32 ``[Q, k]``, how far each stands out, see :mod:`finelip_fast.index.standing`; NaN where the items
            searched all score the same; None: of fewer than 50, or of a collection on object storage.
    """

    scores: Tensor
    global_scores: Tensor
    fine_scores: Tensor | None
    numbers: Tensor
    items: list[list[Item]]
    mode: Mode
    stands_out: Tensor | None = None


class Index(Contents):
    """Items to search, in memory or kept in a folder.

    May be used from several threads; several processes may have a folder open. With a folder it can be pickled, as what it was
    opened with. ``with Index(...) as index`` closes it at the end.

    Attributes:
        spec: What all embeddings have in common.
        source: What the checkpoint was opened as.
        device: Device that searches.
        folder: Folder that keeps the items; None: they are in memory.

    Args:
        spec: What the embeddings have in common.
        folder: Folder that keeps the items, made if it is missing; None: they are kept in memory.
        source: What the checkpoint was opened as, for messages and :func:`finelip_fast.index.stored_source`.
        device: Device that searches.
        version: State of the folder after so many changes, which takes no more of them; None: always the newest.
        skip_damaged: Open what can be read, and leave out the rest.
        verify: Compare all embeddings of each segment with their checksums when it is first opened, by all cores. Without it,
            those that a search finds are compared, and no others.

    Raises:
        StoreError: A folder that holds another index, cannot be read or written, or misses a segment; a version that is not
            there.
    """

    def __init__(
        self,
        spec: IndexSpec,
        folder: str | PathLike[str] | None = None,
        *,
        source: str = "",
        device: torch.device | str = "cpu",
        version: int | None = None,
        skip_damaged: bool = False,
        verify: bool = False,
    ) -> None:
        store = Store(
            spec, folder, source=source, device=device, version=version, skip_damaged=skip_damaged, verify=verify
        )
        self._open(store)

    def _open(self, store: Store) -> None:
        super().__init__(store)
        self._stage: tuple[View, CandidateSource | None] | None = None
        self._sketches = Sketches(store.cache_folder)

    def __getstate__(self) -> Store:
        return self._store

    def __setstate__(self, store: Store) -> None:
        self._open(store)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder."""
        self._store.close()

    # Changing ----------------------------------------------------------------------------------------------------------

    def add(
        self,
        ids: Sequence[str],
        embeddings: Tensor,
        metadata: Sequence[dict[str, Any]],
        *,
        existing: Existing = "error",
    ) -> list[str]:
        """Append items; with a folder they are on disk when this returns.

        Args:
            ids: ``n`` ids, any text of at most 65,535 bytes in UTF-8: also an empty one, and one that is no UTF-8, as names of
                files may be.
            embeddings: ``[n, L, D]``, unit rows. Of a checkpoint without trained aggregators ``[n, 1, D]``, also where the
                index has more rows, which are then copies of that one.
            metadata: One dictionary of JSON values for each: its keys are text, it is nested at most 64 deep, and has at most
                64 MiB.
            existing: What an id that is there, once no one else can write, means: an ``"error"``, ``"skip"`` the new
                items, or ``"replace"`` the old ones, all in one change.

        Returns:
            The ids that were added.

        Raises:
            InputError: An id that is there already, embeddings of another shape or that are no unit rows, or metadata that
                JSON cannot hold.
            StoreError: The disk refuses, the folder was removed, or the index is closed; nothing was added.
        """
        added = self._store.add(ids, embeddings, metadata, existing=existing)
        upkeep.warn_of_many(self._store)
        self._sketch_changes()
        return added

    def upsert(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> None:
        """Append items in the place of those of the same ids, in one change; arguments and errors as :meth:`add`."""
        self.add(ids, embeddings, metadata, existing="replace")

    def relabel(self, ids: Sequence[str], new_ids: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        """Give items other ids and metadata, all in one change; their embeddings stay, to the bit.

        They come last in the order of insertion then.

        Args:
            ids: ``n`` ids of the index.
            new_ids: The id that each has then; it may be the same.
            metadata: The metadata that each has then, as :meth:`add` takes it.

        Raises:
            InputError: An id that is not there, a new one that is another item's or comes twice, or metadata that JSON cannot
                hold; nothing was changed.
            StoreError: An item is damaged, the disk refuses, or the index is closed; nothing was changed.
        """
        self._store.relabel(ids, new_ids, metadata)
        self._sketch_changes()

    def delete(self, ids: Sequence[str]) -> None:
        """Take items out; with a folder they are gone for every later opening when this returns.

        Raises:
            InputError: An id that is not there or no string, or no list; nothing was taken out.
            StoreError: The disk refuses, or the index is closed; nothing was taken out.
        """
        self._store.delete(ids)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """No other thread or process changes the index meanwhile, nor may what is done inside: to look, and to act on it.

        Raises:
            StoreError: Another process changes the index all the time, or it is closed.
        """
        with self._store.catalogue.undisturbed():
            yield

    @property
    def incoming(self) -> Path:
        """A folder of the index for segments that workers write, to be taken over by :meth:`adopt`; made if missing.

        Raises:
            InputError: An index in memory.
            StoreError: It cannot be made.
        """
        return self._store.incoming

    def adopt(self, segments: Sequence[Written], *, existing: Literal["error", "replace"] = "error") -> None:
        """Append what workers wrote into :attr:`incoming`, all of it in one change; what is there already is never doubled.

        Args:
            segments: Segments in the order that their items shall have. Their files leave ``incoming``.
            existing: What an id that is there already means: an ``"error"``, or ``"replace"`` the item.

        Raises:
            InputError: An id that is there already or comes twice, or metadata that JSON cannot hold.
            StoreError: A segment that is missing or not what its worker says, or the disk refuses; nothing was added.
        """
        self._store.adopt(segments, existing=existing)
        self._sketch_changes()

    # Searching ---------------------------------------------------------------------------------------------------------

    def search(
        self,
        queries: Tensor,
        k: int,
        *,
        alpha: float | None = None,
        mode: Mode = "auto",
        where: str | None = None,
        candidates: int | None = None,
    ) -> SearchResults:
        """The ``k`` best items of each query.

        Args:
            queries: Embeddings ``[Q, L_q, D]``, unit rows.
            k: How many; fewer come back when there are fewer.
            alpha: Weight of the global cosine; None: the spec's.
            mode: See :mod:`finelip_fast.index.search`.
            where: Only items whose metadata fit, see :mod:`finelip_fast.index.filters`.
            candidates: Number of candidates of a search in two stages; None: as it was tuned.

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
            view = self._store.view()
            try:
                with between_forks(), within_memory():
                    result = self._search(view, queries, k, alpha, mode, where, candidates)
            except FileNotFoundError as error:
                if self._store.view() is view:
                    raise self._missing(error) from None
                continue
            except OSError as error:  # of mapping and reading
                raise StoreError(
                    f"the search needs more than this process may have ({error!s:.200}): raise the limit (ulimit -n), or "
                    "search fewer items at once"
                ) from None
            if result is not None:
                return result
            # Another process has compacted the index meanwhile.

    def _search(
        self, view: View, queries: Tensor, k: int, alpha: float, mode: Mode, where: str | None, candidates: int | None
    ) -> SearchResults | None:
        among = None
        if where is not None:
            matching = self._store.catalogue.matching(where, view.version)
            if self._store.catalogue.oldest > view.version:
                return None
            among = view.rows_at(matching)
        tuning = self.tuning
        count = len(view) if among is None else len(among)
        chosen = choose_mode(mode, view, tuning, k=k, alpha=alpha, items=count)
        if candidates is None and tuning is not None and tuning.mode == chosen:
            candidates = tuning.candidates
        scores, rows = best_rows(
            view,
            queries,
            k,
            alpha=alpha,
            mode=chosen,
            candidates=candidates,
            among=among,
            source=self._first_stage(view, chosen, alpha),
        )
        rows = rows.cpu()
        positions = view.positions(rows)
        items = self._store.catalogue.at(positions.flatten().tolist(), view.version)
        if items is None:
            return None
        view.refuse_damaged(items.values())
        global_scores, fine_scores = parts_of_scores(view, queries, rows, fine=not self.spec.is_global)
        try:
            hits = [[items[position] for position in row] for row in positions.tolist()]
        except KeyError as error:
            raise StoreError(
                f"the catalogue of the index at {self.folder} is damaged: nothing is at position {error}; "
                f"{remedies.restore(self.folder)}"
            ) from None
        scores, standing = scores.cpu(), None
        if count >= FEWEST and len(queries):
            standing = stands_out(scores, sampled_scores(view, queries, alpha=alpha, among=among).cpu(), count)
        return SearchResults(scores, global_scores, fine_scores, view.numbers(rows), hits, chosen, standing)

    def _first_stage(self, view: View, mode: Mode, alpha: float) -> CandidateSource | None:
        """The first stage of two, as far as it is not all global embeddings: None then, and in the exact modes.

        Of ``sketch`` it is made where it is missing. Of ``two-stage`` it is what :meth:`build_candidates` made, if that suits
        the view.

        Raises:
            InputError: Embeddings too wide for a sketch.
            StoreError: A segment cannot be read.
        """
        if mode == "sketch" and alpha != 1 and self.spec.tokens > 1 and len(view):
            return self._sketches.source(view, self.sketch_bits or BITS[0])
        if mode != "two-stage":
            return None
        with between_forks(), self._store.view_lock:
            if self._stage is None or self._stage[0] is not view:
                self._stage = view, faiss.find(view, self._store.cache_folder)
            return self._stage[1]

    def build_candidates(self, *, lists: int | None = None, progress: bool = True) -> None:
        """Make the first stage of two fast for many millions of items, with faiss; see :mod:`finelip_fast.index.faiss`.

        Raises:
            EngineError: faiss is not installed.
            InputError: An index in memory, or too few items.
            StoreError: The index is closed, or the disk refuses.
        """
        if self._store.cache_folder is None:
            raise InputError("expected an index with a folder that can be written to")
        faiss.build(self._store.view(), self._store.cache_folder, lists=lists, progress=progress)
        self._stage = None

    def build_sketches(self, *, bits: int = 1) -> int:
        """Make sketches of all items, for searches with ``mode="sketch"``, and from now on of what is added.

        Without it the first such search makes them.

        Args:
            bits: 1 or 2 for each column of a row.

        Returns:
            How many bytes they are.

        Raises:
            InputError: Another number of bits, or embeddings that are global rows alone or too wide.
            StoreError: The index is closed or open at an older version, cannot be read, or the disk refuses.
        """
        check_bits(bits)
        if self.spec.tokens == 1:
            raise InputError(
                "expected an index of embeddings with tokens, got one of global rows alone, which mode='exact' "
                "compares as they are"
            )
        self._store.refuse_if_fixed()
        self._store.catalogue.keep(_SKETCH, bits)
        view = self._store.view()
        return self._sketches.source(view, bits).bytes if len(view) else 0

    @property
    def sketch_bits(self) -> int | None:
        """What :meth:`build_sketches` was told; None: it has not been called."""
        bits = self._store.catalogue.note(_SKETCH)
        if bits is not None and (type(bits) is not int or bits not in BITS):
            raise StoreError(
                f"what the index at {self.folder} notes of sketches cannot be read, {bits!r:.80}: run "
                f"{remedies.sketch(self.folder)} again"
            )
        return bits

    def _sketch_changes(self) -> None:
        """Make sketches of new segments, if they are wanted; what fails is told by the next search that needs them."""
        with suppress(FineLIPError, OSError):
            if self.folder is not None and self.sketch_bits is not None and len(self):
                self._sketches.source(self._store.view(), self.sketch_bits)

    @property
    def tuning(self) -> Tuning | None:
        """What :func:`finelip_fast.index.tune.tune` has found; None: it has not been run."""
        recorded = self._store.catalogue.note(_TUNING)
        try:
            return None if recorded is None else _tuning(**recorded)
        except (TypeError, ValueError, KeyError):
            raise StoreError(
                f"what was tuned of the index at {self.folder} cannot be read, {recorded!r:.80}: run "
                f"{remedies.tune(self.folder)} again, or in Python forget it: index.tuning = None"
            ) from None

    @tuning.setter
    def tuning(self, tuning: Tuning | None) -> None:
        self._store.refuse_if_fixed()
        self._store.catalogue.keep(_TUNING, None if tuning is None else asdict(tuning))

    # Looking after a folder ---------------------------------------------------------------------------------------------

    def speed_up(self, field: str) -> None:
        """Make filters fast that compare a field of the metadata.

        Raises:
            InputError: Not the name of a field, see :mod:`finelip_fast.index.filters`.
            StoreError: The index is closed, or the disk refuses.
        """
        self._store.catalogue.speed_up(field)

    def check(self) -> dict[str, str]:
        """What is wrong with each damaged item, by its id; see :func:`finelip_fast.index.upkeep.check`."""
        return upkeep.check(self._store)

    def repair(self) -> dict[str, str]:
        """Take out what is damaged, keep the rest, and take back what nothing names any more.

        See :func:`finelip_fast.index.upkeep.repair` and :func:`finelip_fast.index.recovery.take_back`.
        """
        removed = upkeep.repair(self._store)
        recovery.take_back(self._store)
        recovery.keep_copy(self._store)
        return removed

    def maintain(self) -> dict[str, int]:
        """Compact, remove files that nothing needs, and keep a copy of the catalogue; see
        :func:`finelip_fast.index.upkeep.maintain`.
        """
        report = upkeep.maintain(self._store)
        recovery.keep_copy(self._store)
        self._sketch_changes()
        return report

    def compact_recent(self) -> None:
        """Make one of many small additions, in far less time than :meth:`maintain`; see
        :func:`finelip_fast.index.upkeep.compact_recent`.
        """
        upkeep.compact_recent(self._store)
        self._sketch_changes()

    def lost(self) -> dict[str, int]:
        """How many items each segment has that nothing names, by its name; :meth:`repair` takes them back."""
        return {name: len(listed.ids) for name, listed in recovery.lost(self._store).items()}

    def snapshot(self, folder: str | PathLike[str]) -> None:
        """Copy a folder's index to another; see :func:`finelip_fast.index.upkeep.snapshot`."""
        upkeep.snapshot(self._store, folder)


def _tuning(**recorded: Any) -> Tuning:
    """
    Raises:
        TypeError, ValueError, KeyError: Not of the kinds that a tuning has.
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


def stored_index(folder: str | PathLike[str], **options: Any) -> Index:
    """The index in a folder, opened without its checkpoint: to look after it, or to search with embeddings.

    Args:
        folder: Folder of the index.
        options: Arguments of :class:`Index`.

    Raises:
        StoreError: There is none, or it cannot be read.
    """
    stored = stored_spec(folder)
    if stored is None:
        raise StoreError(f"there is no index at {folder}: {remedies.make(folder)}")
    spec, source = stored
    return Index(spec, folder, source=source, **options)
