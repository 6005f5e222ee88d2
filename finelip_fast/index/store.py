"""The items of an index, in memory or in a folder: id, metadata and one matrix ``[L, D]`` each, in order of insertion.

A folder holds ``catalogue.sqlite``, ``segments/`` with the embeddings, ``cache/`` with data that can be recomputed from them,
and ``incoming/`` with what workers have written and nobody has taken over yet. Several processes may have it open: each sees
what was acknowledged, and writers wait for each other.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from finelip_fast._arguments import (
    Embeddings,
    as_embeddings,
    find_device,
    folder_path,
    listed,
    matrices,
    one_of,
    strings,
    whole_number,
)
from finelip_fast._files import plain_name, sync_folder
from finelip_fast.errors import FineLIPError, InputError, StoreError
from finelip_fast.index import remedies
from finelip_fast.index.arrays import UnavailableError
from finelip_fast.index.catalogue import Catalogue, Layout, SegmentRow
from finelip_fast.index.checks import as_json, check_embeddings, check_ids, id_conflict, missing
from finelip_fast.index.database import closed
from finelip_fast.index.forks import between_forks, survive_forks
from finelip_fast.index.lists import remove_segment
from finelip_fast.index.orphans import note_deleted
from finelip_fast.index.segments import Segment, encode, open_segment, write_segment
from finelip_fast.index.spec import CACHE, CATALOGUE, INCOMING, SEGMENTS, IndexSpec
from finelip_fast.index.view import View

Existing = Literal["error", "skip", "replace"]
Result = TypeVar("Result")


class Written(NamedTuple):
    """A segment that a worker wrote: results of :func:`finelip_fast.index.segments.write_segment`, ids and metadata."""

    name: str
    ids: list[str]
    crcs: list[int]
    metadata: list[dict[str, Any]]


class Store:
    """Storage of the items of a :class:`finelip_fast.index.Index`: its versions, and the changes that lead to them.

    It may be used from several threads. Arguments and errors are those of the index.

    Attributes:
        folder, segments_folder, cache_folder: Folders of the index; None: in memory, or the folder cannot be written to.
        fixed: Requested version; None: the newest.
        damaged: Reasons why segments cannot be read, by segment name, with ``skip_damaged``.
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
        if verify and skip_damaged:
            raise InputError(
                "expected either verify or skip_damaged, got both; to open segments with damaged rows, omit verify"
            )
        if not isinstance(spec, IndexSpec) or not isinstance(source, str):
            raise InputError(f"expected an IndexSpec and source as str, got {spec!r:.80} and {source!r:.80}")
        self.spec, self.source, self.device = spec, source, find_device(device)
        self.damaged: dict[str, str] = {}
        self.fixed = None if version is None else whole_number("version", version, least=0)
        self._skip_damaged, self._verify = skip_damaged, verify
        # Absolute, so that it stays valid if this process changes its working directory.
        self.folder = None if folder is None else folder_path("folder", folder).absolute()
        self._new_locks()
        self._opened: dict[str, Segment] = {}
        if self.folder is None and version is not None:
            raise InputError(f"version={version!r:.80} needs a folder; an in-memory index keeps no versions")
        if self.folder is not None:
            _prepare_folder(self.folder)
        path, lists = (None, None) if self.folder is None else (self.folder / CATALOGUE, self.folder / SEGMENTS)
        self._catalogue: Catalogue | None = Catalogue(path, asdict(spec), source=source, lists=lists)
        self._seen = -1
        try:
            self.view()
        except BaseException:
            self.close()
            raise
        survive_forks(self)

    def _new_locks(self) -> None:
        self.lock = threading.RLock()  # for upkeep, which runs once at a time; readers do not take it
        self.view_lock = threading.RLock()

    def before_fork(self) -> None:
        pass

    def after_fork(self) -> None:
        self._new_locks()
        torch.set_num_threads(1)  # the parent's threads are missing here, and OpenMP would wait for them forever

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is None:
            raise InputError("an in-memory index cannot be pickled; create it with a folder")
        options: dict[str, Any] = {"source": self.source, "device": str(self.device), "version": self.fixed}
        options |= {"skip_damaged": self._skip_damaged, "verify": self._verify}
        return _reopened, (type(self), self.spec, self.folder, options)

    # Contents ----------------------------------------------------------------------------------------------------------

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue.

        Raises:
            StoreError: The index is closed.
        """
        if self._catalogue is None:
            raise closed(self.folder)
        return self._catalogue

    def view(self) -> View:
        """The newest version, or the requested one; changes by other processes are included.

        Raises:
            StoreError: The index is closed, a segment cannot be read, or the version no longer exists.
        """
        with between_forks(), self.view_lock:
            newest = self.catalogue.version
            if newest != self._seen:
                self._view, self._seen = self.load(), newest
            return self._view

    def load(self) -> View:
        """Load the version as the catalogue has it now or, within a change, as it will be."""
        while True:
            layout = self.catalogue.layout(self.fixed)
            try:
                return self._open(layout)
            except FileNotFoundError as error:
                if self.catalogue.layout(self.fixed) == layout:
                    raise self.missing(error) from None
                # It was compacted meanwhile.

    def on_view(self, work: Callable[[View], Result]) -> Result:
        """The result of ``work`` on the version that is searched; repeated if another process compacts the index meanwhile.

        Raises:
            StoreError: A segment is missing, or the same cases as in :meth:`view`.
        """
        while True:
            view = self.view()
            try:
                return work(view)
            except (FileNotFoundError, StoreError) as error:
                if self.catalogue.oldest <= view.version:
                    if isinstance(error, FileNotFoundError):
                        raise self.missing(error) from None
                    raise

    def missing(self, error: FileNotFoundError) -> StoreError:
        """The error that says that a segment is missing, for one that was raised where it was opened or read."""
        return StoreError(
            f"segment {error.filename} is missing; restore it, or keep the rest with {remedies.repair(self.folder)}"
        )

    def _open(self, layout: Layout) -> View:
        with between_forks(), self.view_lock:
            if self.folder is not None:  # in memory, opened segments are the only ones
                names = {row.name for row in layout.segments}
                self._opened = {name: segment for name, segment in self._opened.items() if name in names}
            self.damaged = {}
            opened = []
            for row in layout.segments:
                try:
                    if row.name not in self._opened:
                        segment = self.open_segment(row)
                        if self._verify:
                            self._refuse_damaged(row, segment, layout.version)
                        self._opened[row.name] = segment
                    opened.append(row)
                except (StoreError, FileNotFoundError) as error:
                    if not self._skip_damaged or isinstance(error, UnavailableError):
                        raise
                    self.damaged[row.name] = str(error)
            segments = [self._opened[row.name] for row in opened]
            return View(layout._replace(segments=opened), segments, self.device, self.cache_folder)

    def _refuse_damaged(self, row: SegmentRow, segment: Segment, version: int) -> None:
        items = {item.position - row.first: item for item in self.catalogue.items(version, within=row)}
        damaged = segment.damaged([items[at].crc if at in items else None for at in range(row.rows)])
        for at in sorted(damaged.keys() & items.keys()):
            raise StoreError(
                f"item {items[at].id!r} is damaged: row {at} of segment {row.name} {damaged[at]}; restore the file, or keep "
                f"the rest with {remedies.repair(self.folder)}"
            )

    def open_segment(self, row: SegmentRow) -> Segment:
        """
        Raises:
            FileNotFoundError, StoreError: The same cases as in :func:`finelip_fast.index.segments.open_segment`.
        """
        shape = (self.spec.tokens, self.spec.width)
        return open_segment(self.segments_folder, row.name, rows=row.rows, shape=shape, dtype=self.spec.dtype)

    @property
    def segments_folder(self) -> Path:
        assert self.folder is not None
        return self.folder / SEGMENTS

    @property
    def cache_folder(self) -> Path | None:
        return None if self.folder is None or self.catalogue.read_only else self.folder / CACHE

    # Changing ----------------------------------------------------------------------------------------------------------

    def add(
        self,
        ids: Sequence[str],
        embeddings: Embeddings,
        metadata: Sequence[dict[str, Any]],
        *,
        existing: Existing = "error",
    ) -> list[str]:
        """Append items, all in one change, and return the ids that were added."""
        one_of("existing", existing, get_args(Existing))
        ids = [str(item) for item in strings("ids", ids)]  # NumPy's strings are of another type
        metadata = listed("metadata", metadata)
        check_ids(ids)
        embeddings = self.spec.filled(as_embeddings("embeddings", embeddings))
        matrices("embeddings", embeddings, (len(ids), self.spec.tokens, self.spec.width))
        if len(metadata) != len(ids):
            raise InputError(f"expected metadata for {len(ids)} ids, got {len(metadata)}")
        check_embeddings(ids, embeddings)
        texts = [as_json(values, item) for item, values in zip(ids, metadata, strict=True)]
        self.refuse_if_fixed()
        if not ids:
            return []
        arrays = encode(embeddings, self.spec.dtype)
        with self._new_segments() as names, self.catalogue.undisturbed():
            present = self.catalogue.find(ids)
            if present and existing == "error":
                raise id_conflict(present)
            if present and existing == "skip":
                new = [at for at, item in enumerate(ids) if item not in present]
                if not new:  # a version like the one before it would cost every process its caches
                    return []
                ids, texts = [ids[at] for at in new], [texts[at] for at in new]
                arrays = {name: values[new] for name, values in arrays.items()}
                present = {}
            with self.catalogue.changing():
                self.catalogue.remove(present.values())
                name, crcs = self._write(arrays)
                names.append(name)
                self.catalogue.add(ids, name, crcs, texts)
        self.reload()
        return ids

    @property
    def incoming(self) -> Path:
        """Folder for what workers write; created if missing."""
        self.refuse_if_closed()
        if self.folder is None:
            raise InputError("expected an index with a folder for workers to write to, got one in memory")
        folder = self.folder / INCOMING
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {folder}: {error.strerror}") from None
        return folder

    def adopt(self, segments: Sequence[Written], *, existing: Existing = "error") -> None:
        """Append what workers wrote, all in one change."""
        one_of("existing", existing, ("error", "replace"))
        self.refuse_if_fixed()
        incoming = self.incoming
        ids = [item for segment in segments for item in segment.ids]
        check_ids(ids)
        for segment in segments:
            if not len(segment.ids) == len(segment.crcs) == len(segment.metadata):
                raise InputError(
                    f"expected checksums and metadata for {len(segment.ids)} ids of segment {segment.name!r:.80}, got "
                    f"{len(segment.crcs)} and {len(segment.metadata)}; pass the checksums that write_segment returned"
                )
        texts = [[as_json(*pair) for pair in zip(segment.metadata, segment.ids, strict=True)] for segment in segments]
        shape = (self.spec.tokens, self.spec.width)
        with self._new_segments() as names, self.catalogue.changing() if ids else nullcontext():
            present = self.catalogue.find(ids)
            if present and existing == "error":
                raise id_conflict(present)
            self.catalogue.remove(present.values())
            for segment, metadata in zip(segments, texts, strict=True):
                name = plain_name(segment.name, incoming, error=StoreError)
                if not segment.ids:  # a catalogue names no empty segment
                    continue
                try:
                    opened = open_segment(incoming, name, rows=len(segment.ids), shape=shape, dtype=self.spec.dtype)
                    check_embeddings(segment.ids, opened.embeddings(slice(None)))
                    # Linked, not moved, because this change may fail; one that failed may have left its link.
                    with suppress(FileExistsError):
                        os.link(incoming / segment.name, self.segments_folder / segment.name)
                except OSError as error:
                    raise StoreError(f"cannot take over {incoming / segment.name}: {error.strerror}") from None
                names.append(name)
                self.catalogue.add(segment.ids, segment.name, segment.crcs, metadata)
            sync_folder(self.segments_folder)
        for segment in segments:
            (incoming / segment.name).unlink(missing_ok=True)
        self.reload()

    @contextmanager
    def _new_segments(self) -> Iterator[list[str]]:
        """Collect names of new segments, and remove their files if the change fails."""
        names: list[str] = []
        try:
            yield names
        except Exception:  # not after a signal, when the change may have been made
            with suppress(FineLIPError):
                for name in {*names} - {row.name for row in self.catalogue.layout().segments}:
                    self._opened.pop(name, None)
                    if self.folder is not None:
                        remove_segment(self.segments_folder, name)
            raise

    def _write(self, arrays: dict[str, Tensor]) -> tuple[str, Sequence[int | None]]:
        """Write a new segment; return its name and its checksums."""
        if self.folder is not None:
            return write_segment(self.segments_folder, arrays)
        name = uuid.uuid4().hex
        self._opened[name] = Segment(name, arrays)
        return name, [None] * len(self._opened[name])

    def relabel(self, ids: Sequence[str], new_ids: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        """Give items new ids and metadata, all in one change; their embeddings stay identical to the bit."""
        ids, new_ids, metadata = strings("ids", ids), listed("new_ids", new_ids), listed("metadata", metadata)
        check_ids(ids)
        check_ids(new_ids)
        if not len(ids) == len(new_ids) == len(metadata):
            raise InputError(
                f"expected new ids and metadata for {len(ids)} ids, got {len(new_ids)} and {len(metadata)}"
            )
        texts = [as_json(values, item) for item, values in zip(new_ids, metadata, strict=True)]
        self.refuse_if_fixed()
        if not ids:
            return
        with self._new_segments() as names, self.catalogue.changing():
            positions = self._positions(ids)
            if occupied := self.catalogue.find(new_ids).keys() - set(ids):
                raise id_conflict(occupied, "pass other new_ids")
            view = self.load()
            view.refuse_shortened()
            items = self.catalogue.at(positions, view.version) or {}
            view.refuse_damaged(items.values())  # a new checksum would hide the damage
            self.catalogue.remove(positions)
            note_deleted(self.catalogue, ids)
            name, crcs = self._write(view.arrays_at(positions))
            names.append(name)
            self.catalogue.add(new_ids, name, crcs, texts)
        self.reload()

    def delete(self, ids: Sequence[str]) -> None:
        """Remove items."""
        self.refuse_if_fixed()
        ids = strings("ids", ids)
        if not ids:
            return
        with self.catalogue.changing():
            self.catalogue.remove(self._positions(ids))
            note_deleted(self.catalogue, ids)
        self.reload()

    def _positions(self, ids: Sequence[str]) -> list[int]:
        """Within a change, the positions of items.

        Raises:
            InputError: An id does not exist.
        """
        present = self.catalogue.find(ids)
        absent = [item for item in ids if item not in present]
        if absent:
            raise missing(absent)
        return [present[item] for item in ids]

    def reload(self) -> None:
        """Take up a change made by this object."""
        self.view()

    def refuse_if_fixed(self) -> None:
        """
        Raises:
            StoreError: The index is closed, or open at an older version.
        """
        if self.catalogue and self.fixed is not None:
            raise StoreError(
                f"the index is open at version {self.fixed}, read-only; open it without version to change it"
            )

    def refuse_if_closed(self) -> None:
        """
        Raises:
            StoreError: The index is closed.
        """
        if self._catalogue is None:
            raise closed(self.folder)

    @property
    def is_open(self) -> bool:
        return self._catalogue is not None

    def close(self) -> None:
        if self._catalogue is not None:
            self._catalogue.close()
            self._catalogue = None


def _prepare_folder(folder: Path) -> None:
    try:
        if not (folder / SEGMENTS).is_dir():
            (folder / SEGMENTS).mkdir(parents=True, exist_ok=True)
            sync_folder(folder)
        orphaned = not (folder / CATALOGUE).exists() and any((folder / SEGMENTS).iterdir())
    except OSError as error:
        raise StoreError(f"cannot make the index folder {folder}: {error.strerror}") from None
    if orphaned:
        raise StoreError(
            f"{folder} has segments but no {CATALOGUE}, which lists what they contain; restore it from a snapshot, or index "
            "the pictures again into another folder"
        )


def _reopened(kind: type[Store], spec: IndexSpec, folder: Path, options: dict[str, Any]) -> Store:
    """Open a pickled index as it was opened before."""
    return kind(spec, folder, **options)
