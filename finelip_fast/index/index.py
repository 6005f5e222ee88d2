"""``Index``: store, search and maintain items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from finelip_fast._arguments import Embeddings
from finelip_fast.errors import StoreError
from finelip_fast.index import recovery, remedies, upkeep
from finelip_fast.index.contents import Contents
from finelip_fast.index.search import Mode, Tuning
from finelip_fast.index.searching import Searcher, SearchResults
from finelip_fast.index.spec import IndexSpec, stored_spec
from finelip_fast.index.store import Existing, Store, Written


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
        self._searcher = Searcher(store)

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
        self._searcher.sketch_changes()
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
        self._searcher.sketch_changes()

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
            StoreError: The index is closed, or the folder cannot be created.
        """
        return self._store.incoming

    def adopt(self, segments: Sequence[Written], *, existing: Literal["error", "replace"] = "error") -> None:
        """Append what workers wrote to :attr:`incoming`, all in one change; existing items are never duplicated.

        Args:
            segments: Segments, in the order that their items will have. Their files are removed from ``incoming``.
            existing: Treatment of ids that exist: an ``"error"``, or ``"replace"`` the item.

        Raises:
            InputError: An id exists already or occurs twice, JSON cannot hold the metadata, or a segment lacks checksums or
                metadata.
            StoreError: A segment is missing or is not what its worker says, or writing fails; nothing was added.
        """
        self._store.adopt(segments, existing=existing)
        self._searcher.sketch_changes()

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
            candidates: Number of candidates for two-stage search; None: as tuned for such searches, or else 16 for each of
                the ``k`` hits, at least 256.

        Raises:
            InputError: ``k`` or ``candidates`` is not a positive integer, ``alpha`` is not a number in [0, 1], the queries
                have another shape or are not unit rows of floating-point numbers, the mode is unknown, or the filter cannot be
                parsed.
            StoreError: The index is closed, cannot be read, or needs more memory or open files than this process may have.
        """
        return self._searcher.search(queries, k, alpha=alpha, mode=mode, where=where, candidates=candidates)

    def build_candidates(self, *, lists: int | None = None, progress: bool = True) -> None:
        """Speed up the first stage for many millions of items, with faiss; see :mod:`finelip_fast.index.faiss`.

        Raises:
            EngineError: faiss is not installed.
            InputError: The index is in memory, or has too few items.
            StoreError: The index is closed or open at an older version, cannot be read, or writing fails.
        """
        self._searcher.build_candidates(lists=lists, progress=progress)

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
        return self._searcher.build_sketches(bits)

    @property
    def sketch_bits(self) -> int | None:
        """Number of bits that :meth:`build_sketches` was given; None: it has not been called."""
        return self._searcher.sketch_bits

    @property
    def tuning(self) -> Tuning | None:
        """The result of :func:`finelip_fast.index.tune.tune`; None: it has not been run."""
        return self._searcher.tuning

    @tuning.setter
    def tuning(self, tuning: Tuning | None) -> None:
        self._searcher.tuning = tuning

    # Maintenance --------------------------------------------------------------------------------------------------------

    def speed_up(self, field: str) -> None:
        """Speed up filters that compare a metadata field.

        Raises:
            InputError: ``field`` is not the name of a field, see :mod:`finelip_fast.index.filters`, or 1000 are sped up.
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
        self._searcher.sketch_changes()
        return report

    def compact_recent(self) -> None:
        """Merge many small additions into one segment, in far less time than :meth:`maintain`; see
        :func:`finelip_fast.index.upkeep.compact_recent`.
        """
        upkeep.compact_recent(self._store)
        self._searcher.sketch_changes()

    def lost(self) -> dict[str, int]:
        """Number of lost items in each segment that nothing names, by segment name; :meth:`repair` recovers them."""
        return recovery.lost(self._store)

    def snapshot(self, folder: str | PathLike[str]) -> None:
        """Copy the index to another folder; see :func:`finelip_fast.index.upkeep.snapshot`."""
        upkeep.snapshot(self._store, folder)


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
