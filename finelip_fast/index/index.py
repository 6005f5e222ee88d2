"""``Index``: store, search and maintain items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finelip_fast._arguments import Embeddings, share, whole_number
from finelip_fast.errors import FineLIPError, InputError, StoreError
from finelip_fast.index import faiss, recovery, remedies, upkeep
from finelip_fast.index.arrays import within_memory
from finelip_fast.index.catalogue import Item
from finelip_fast.index.checks import as_queries
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


class Index(Contents):
    """Items to search, in memory or stored in a folder.

    An index may be used from several threads, and several processes may have its folder open. With a folder it can be pickled:
    unpickling opens the same folder again. ``with Index(...) as index`` closes it at the end.

    Attributes:
        spec: Properties that all embeddings have in common.
        source: Name or path that the checkpoint was opened with.
        device: Device that searches.
        folder: Folder that stores the items; None: they are in memory.

    Args:
        spec: Properties that all embeddings have in common.
        folder: Folder that stores the items, created if missing; None: they stay in memory.
        source: Name or path that the checkpoint was opened with, for messages and
            :func:`finelip_fast.index.stored_source`.
        device: Device that searches.
        version: Version of the folder to open read-only: its state after that many changes; None: always the newest.
        skip_damaged: Whether to open what can be read and leave out the rest.
        verify: Whether to compare all embeddings of each segment with their checksums when it is first opened, on all cores;
            otherwise only those that a search finds are compared.

    Raises:
        StoreError: The folder holds another index, cannot be read or written, or lacks a segment; or the version does not
            exist.
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
        self._store.refuse_if_closed()
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
        embeddings: Embeddings,
        metadata: Sequence[dict[str, Any]],
        *,
        existing: Existing = "error",
    ) -> list[str]:
        """Append items; with a folder, they are on disk when this returns.

        Args:
            ids: ``n`` ids: any text of at most 65,535 bytes in UTF-8, including empty text and text that is not UTF-8, as file
                names may be.
            embeddings: ``[n, L, D]``, unit rows, a dense tensor or an array. For a checkpoint without trained aggregators
                ``[n, 1, D]``, even if the index has more rows, which are then copies of that one.
            metadata: One dictionary of JSON values per item, with text keys, nested at most 64 levels deep, and of at most
                64 MiB.
            existing: Treatment of ids that exist, checked while no one else can write: an ``"error"``, ``"skip"`` the new
                items, or ``"replace"`` the old ones, all in one change.

        Returns:
            The ids that were added.

        Raises:
            InputError: An id exists already, the embeddings have another shape or are not unit rows of floating-point numbers,
                or JSON cannot hold the metadata.
            StoreError: Writing fails, the folder was removed, or the index is closed; nothing was added.
        """
        added = self._store.add(ids, embeddings, metadata, existing=existing)
        upkeep.warn_of_many(self._store)
        self._sketch_changes()
        return added

    def upsert(self, ids: Sequence[str], embeddings: Embeddings, metadata: Sequence[dict[str, Any]]) -> None:
        """Append items, replacing those with the same ids, in one change; arguments and errors as in :meth:`add`."""
        self.add(ids, embeddings, metadata, existing="replace")

    def relabel(self, ids: Sequence[str], new_ids: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        """Give items new ids and metadata, all in one change; their embeddings stay identical to the bit.

        Afterwards they come last in the order of insertion.

        Args:
            ids: ``n`` ids of the index.
            new_ids: New id of each item; it may be the same.
            metadata: New metadata of each item, as for :meth:`add`.

        Raises:
            InputError: An id does not exist, a new one belongs to another item or occurs twice, or JSON cannot hold the
                metadata; nothing was changed.
            StoreError: An item is damaged, writing fails, or the index is closed; nothing was changed.
        """
        self._store.relabel(ids, new_ids, metadata)
        self._sketch_changes()

    def delete(self, ids: Sequence[str]) -> None:
        """Remove items; with a folder, the removal is on disk when this returns.

        Raises:
            InputError: An id does not exist or is not a string, or ``ids`` is not a list; nothing was removed.
            StoreError: Writing fails, or the index is closed; nothing was removed.
        """
        self._store.delete(ids)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Hold off changes by other threads and processes, for a block that acts on what it reads but changes nothing itself.

        Raises:
            StoreError: Another process keeps changing the index, or it is closed.
        """
        with self._store.catalogue.undisturbed():
            yield

    @property
    def incoming(self) -> Path:
        """Folder of the index for segments that workers write and :meth:`adopt` takes over; created if missing.

        Raises:
            InputError: The index is in memory.
            StoreError: The folder cannot be created.
        """
        return self._store.incoming

    def adopt(self, segments: Sequence[Written], *, existing: Literal["error", "replace"] = "error") -> None:
        """Append what workers wrote to :attr:`incoming`, all in one change; existing items are never duplicated.

        Args:
            segments: Segments, in the order that their items will have. Their files are removed from ``incoming``.
            existing: Treatment of ids that exist: an ``"error"``, or ``"replace"`` the item.

        Raises:
            InputError: An id exists already or occurs twice, or JSON cannot hold the metadata.
            StoreError: A segment is missing or is not what its worker says, or writing fails; nothing was added.
        """
        self._store.adopt(segments, existing=existing)
        self._sketch_changes()

    # Searching ---------------------------------------------------------------------------------------------------------

    def search(
        self,
        queries: Embeddings,
        k: int,
        *,
        alpha: float | None = None,
        mode: Mode = "auto",
        where: str | None = None,
        candidates: int | None = None,
    ) -> SearchResults:
        """Find the ``k`` best items for each query.

        Args:
            queries: Embeddings ``[Q, L_q, D]``, unit rows, at least one a query; a dense tensor or an array.
            k: Number of items; fewer are returned if there are fewer.
            alpha: Weight of the global cosine; None: the spec's.
            mode: Search mode, see :mod:`finelip_fast.index.search`.
            where: Filter on the metadata, see :mod:`finelip_fast.index.filters`; None: all items.
            candidates: Number of candidates for two-stage search; None: as tuned.

        Raises:
            InputError: ``k`` or ``candidates`` is not a positive integer, ``alpha`` is not a number in [0, 1], the queries
                have another shape or are not unit rows of floating-point numbers, the mode is unknown, or the filter cannot be
                parsed.
            StoreError: The index is closed, cannot be read, or needs more memory or open files than this process may have.
        """
        alpha = self.spec.alpha if alpha is None else alpha
        k, candidates = whole_number("k", k), None if candidates is None else whole_number("candidates", candidates)
        alpha = share("alpha", alpha)
        queries = as_queries(queries, self.spec.width)
        while True:
            view = self._store.view()
            try:
                with between_forks(), within_memory():
                    result = self._search(view, queries, k, alpha, mode, where, candidates)
            except FileNotFoundError as error:
                if self._store.view() is view:
                    raise self._missing(error) from None
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
                f"the catalogue of the index at {self.folder} is damaged: it has no item at position {error}; "
                f"{remedies.restore(self.folder)}"
            ) from None
        scores, standing = scores.cpu(), None
        if count >= FEWEST and len(queries):
            standing = stands_out(scores, sampled_scores(view, queries, alpha=alpha, among=among).cpu(), count, alpha)
        return SearchResults(scores, global_scores, fine_scores, view.numbers(rows), hits, chosen, standing)

    def _first_stage(self, view: View, mode: Mode, alpha: float) -> CandidateSource | None:
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
        with between_forks(), self._store.view_lock:
            if self._stage is None or self._stage[0] is not view:
                self._stage = view, faiss.find(view, self._store.cache_folder)
            return self._stage[1]

    def build_candidates(self, *, lists: int | None = None, progress: bool = True) -> None:
        """Speed up the first stage for many millions of items, with faiss; see :mod:`finelip_fast.index.faiss`.

        Raises:
            EngineError: faiss is not installed.
            InputError: The index is in memory, or has too few items.
            StoreError: The index is closed, or writing fails.
        """
        if self._store.cache_folder is None:
            got = "one in memory" if self.folder is None else "a read-only folder"
            raise InputError(f"expected an index in a writable folder, got {got}")
        faiss.build(self._store.view(), self._store.cache_folder, lists=lists, progress=progress)
        self._stage = None

    def build_sketches(self, *, bits: int = 1) -> int:
        """Build sketches of all items, for searches with ``mode="sketch"``, and from now on of added items.

        Otherwise the first such search builds them.

        Args:
            bits: Bits per column of a row, 1 or 2.

        Returns:
            Size of the sketches in bytes.

        Raises:
            InputError: The number of bits is invalid, or the embeddings are global rows alone or too wide.
            StoreError: The index is closed or open at an older version, cannot be read, or writing fails.
        """
        check_bits(bits)
        if self.spec.tokens == 1:
            raise InputError(
                "expected an index of embeddings with tokens, got one with only global rows; search it with "
                "mode='exact', which needs no sketches"
            )
        self._store.refuse_if_fixed()
        self._store.catalogue.keep(_SKETCH, bits)
        view = self._store.view()
        return self._sketches.source(view, bits).bytes if len(view) else 0

    @property
    def sketch_bits(self) -> int | None:
        """Number of bits that :meth:`build_sketches` was given; None: it has not been called."""
        bits = self._store.catalogue.note(_SKETCH)
        if bits is not None and (type(bits) is not int or bits not in BITS):
            raise StoreError(
                f"the index at {self.folder} has invalid bits of sketches, {bits!r:.80}; run "
                f"{remedies.sketch(self.folder)} again"
            )
        return bits

    def _sketch_changes(self) -> None:
        """Build sketches of new segments, if the index has any; the next search that needs them reports failures."""
        with suppress(FineLIPError, OSError):
            if self.folder is not None and self.sketch_bits is not None and len(self):
                self._sketches.source(self._store.view(), self.sketch_bits)

    @property
    def tuning(self) -> Tuning | None:
        """The result of :func:`finelip_fast.index.tune.tune`; None: it has not been run."""
        recorded = self._store.catalogue.note(_TUNING)
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
        self._store.refuse_if_fixed()
        self._store.catalogue.keep(_TUNING, None if tuning is None else asdict(tuning))

    # Maintenance --------------------------------------------------------------------------------------------------------

    def speed_up(self, field: str) -> None:
        """Speed up filters that compare a metadata field.

        Raises:
            InputError: ``field`` is not the name of a field, see :mod:`finelip_fast.index.filters`.
            StoreError: The index is closed, or writing fails.
        """
        self._store.catalogue.speed_up(field)

    def check(self) -> dict[str, str]:
        """Find damaged items: what is wrong with each, by id; see :func:`finelip_fast.index.upkeep.check`."""
        return upkeep.check(self._store)

    def repair(self) -> dict[str, str]:
        """Remove what is damaged, keep the rest, and recover what nothing names any more.

        See :func:`finelip_fast.index.upkeep.repair` and :func:`finelip_fast.index.recovery.take_back`.
        """
        removed = upkeep.repair(self._store)
        recovery.take_back(self._store)
        recovery.keep_copy(self._store)
        return removed

    def maintain(self) -> dict[str, int]:
        """Compact, remove files that nothing needs, and store a copy of the catalogue; see
        :func:`finelip_fast.index.upkeep.maintain`.
        """
        report = upkeep.maintain(self._store)
        recovery.keep_copy(self._store)
        self._sketch_changes()
        return report

    def compact_recent(self) -> None:
        """Merge many small additions into one segment, in far less time than :meth:`maintain`; see
        :func:`finelip_fast.index.upkeep.compact_recent`.
        """
        upkeep.compact_recent(self._store)
        self._sketch_changes()

    def lost(self) -> dict[str, int]:
        """Number of items in each segment that nothing names, by segment name; :meth:`repair` recovers them."""
        return {name: len(listed.ids) for name, listed in recovery.lost(self._store).items()}

    def snapshot(self, folder: str | PathLike[str]) -> None:
        """Copy the index to another folder; see :func:`finelip_fast.index.upkeep.snapshot`."""
        upkeep.snapshot(self._store, folder)


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


def stored_index(folder: str | PathLike[str], **options: Any) -> Index:
    """Open the index in a folder without its checkpoint, to maintain it or to search with embeddings.

    Args:
        folder: Folder of the index.
        options: Arguments of :class:`Index`.

    Raises:
        InputError: ``folder`` is not a path, or an option is not what :class:`Index` takes.
        StoreError: There is no index, or it cannot be read.
    """
    stored = stored_spec(folder)
    if stored is None:
        raise StoreError(f"there is no index at {folder}: {remedies.make(folder)}")
    spec, source = stored
    return Index(spec, folder, source=source, **options)
