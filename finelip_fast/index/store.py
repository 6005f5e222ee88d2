"""An index: items with ids and metadata, one matrix ``[L, D]`` each, in order of insertion; in memory or kept in a folder.

A folder holds ``catalogue.sqlite``, ``segments/`` with the embeddings, and ``cache/`` with what can be made from them again.
Several processes may have it open: a search sees every change that was acknowledged before it began, and writers wait for each
other.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finelip_fast._errors import InputError, StoreError
from finelip_fast.index import faiss
from finelip_fast.index.catalogue import Catalogue, Item, Layout, SegmentRow, read_spec
from finelip_fast.index.search import CandidateSource, Mode, Tuning, best_rows, choose_mode, parts_of_scores
from finelip_fast.index.segments import DTYPES, Segment, encode, joined, open_segment, sync_folder, write_segment
from finelip_fast.index.view import View

_CATALOGUE, _SEGMENTS, _CACHE, _INCOMING = "catalogue.sqlite", "segments", "cache", "incoming"
_TUNING = "tuning"
# What workers have left in ``incoming`` for so many seconds, no one is going to adopt.
_ABANDONED = 7 * 86400
# What compaction makes of small segments, in bytes; one of at least half of it is left alone.
_FULL = 1 << 29


@dataclass(frozen=True)
class IndexSpec:
    """What every embedding of an index has in common.

    Attributes:
        checkpoint: Fingerprint of the checkpoint that made the embeddings.
        tokens: ``L``.
        width: ``D``.
        alpha: Weight of the global cosine that the checkpoint was trained for.
        dtype: How embeddings are kept: ``"float16"``, or ``"int8"`` with a scale a row, half the size.
    """

    checkpoint: str
    tokens: int
    width: int
    alpha: float = 0.8
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"expected a dtype of {' or '.join(DTYPES)}, got {self.dtype!r}")


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


class Written(NamedTuple):
    """A segment that a worker wrote: what :func:`finelip_fast.index.segments.write_segment` returned, and whose it is."""

    name: str
    ids: list[str]
    crcs: list[int]
    metadata: list[dict[str, Any]]


class Index:
    """Items to search, in memory or kept in a folder.

    May be used from several threads.

    Args:
        spec: What the embeddings are.
        folder: Where to keep them; None: nowhere. Made if missing; opened if there.
        source: What the checkpoint was opened as, for messages and :func:`stored_source`.
        device: Where to search.
        version: Of a folder: how it was after so many changes; such an index takes no changes. None: always the newest.
        skip_damaged: Open what can be read; ``damaged`` names the segments that cannot.

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
    ) -> None:
        self.spec, self.source, self.device = spec, source, torch.device(device)
        self.damaged: dict[str, str] = {}
        self._fixed, self._skip_damaged = version, skip_damaged
        self._folder = None if folder is None else Path(folder)
        self._lock = threading.RLock()
        self._opened: dict[str, Segment] = {}
        self._source: tuple[View, CandidateSource | None] | None = None
        if self._folder is None and version is not None:
            raise InputError(
                f"expected version only with a folder, got {version}: an index in memory keeps no versions"
            )
        if self._folder is not None:
            _prepare_folder(self._folder)
        path = None if self._folder is None else self._folder / _CATALOGUE
        self._catalogue: Catalogue | None = Catalogue(path, asdict(spec), source=source)
        self._seen = self._catalogue.changes_of_others
        self._view = self._load()

    # What is there -----------------------------------------------------------------------------------------------------

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue.

        Raises:
            StoreError: The index is closed.
        """
        if self._catalogue is None:
            raise StoreError("the index is closed: open its folder again")
        return self._catalogue

    def view(self) -> View:
        """The newest version, or that which was asked for; what other processes have changed is taken up.

        Raises:
            StoreError: The index is closed; or a segment cannot be read, or that version is no more.
        """
        with self._lock:
            seen = self.catalogue.changes_of_others
            if seen != self._seen:
                self._view, self._seen = self._load(), seen
            return self._view

    def _load(self) -> View:
        while True:
            layout = self.catalogue.layout(self._fixed)
            try:
                return self._open(layout)
            except FileNotFoundError as error:
                if self.catalogue.layout(self._fixed) == layout:
                    raise StoreError(
                        f"segment {error.filename} is missing: restore it, or keep the rest with finelip index repair"
                    ) from None
                # It was compacted meanwhile.

    def _open(self, layout: Layout) -> View:
        names = {one.name for one in layout.segments}
        self._opened = {name: one for name, one in self._opened.items() if name in names}
        self.damaged = {}
        kept = []
        for row in layout.segments:
            try:
                if row.name not in self._opened:
                    self._opened[row.name] = self._open_segment(row)
                kept.append(row)
            except (StoreError, FileNotFoundError) as error:
                if not self._skip_damaged:
                    raise
                self.damaged[row.name] = str(error)
        segments = [self._opened[row.name] for row in kept]
        return View(layout._replace(segments=kept), segments, self.device, self._cache)

    def _open_segment(self, row: SegmentRow) -> Segment:
        shape = (self.spec.tokens, self.spec.width)
        return open_segment(self._segments, row.name, rows=row.rows, shape=shape, dtype=self.spec.dtype)

    @property
    def _segments(self) -> Path:
        assert self._folder is not None
        return self._folder / _SEGMENTS

    @property
    def _cache(self) -> Path | None:
        return None if self._folder is None or self.catalogue.read_only else self._folder / _CACHE

    @property
    def version(self) -> int:
        """Counts the changes up to what is searched."""
        return self.view().version

    def __len__(self) -> int:
        return len(self.view())

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str) and bool(self.catalogue.find([item]))

    def items(self) -> Iterator[Item]:
        """What the catalogue knows of each, in order of insertion; reads as it goes."""
        view = self.view()
        for row in view.layout.segments:
            yield from self.catalogue.items(view.version, within=row)

    @property
    def ids(self) -> list[str]:
        """Of all items, in order of insertion."""
        return [item.id for item in self.items()]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """Of all items, in order of insertion."""
        return [item.metadata for item in self.items()]

    @property
    def embeddings(self) -> Tensor:
        """Of all items, in order of insertion, copied into memory: float16 (kept in int8: float32) ``[N, L, D]``."""
        view = self.view()
        empty = torch.empty(0, self.spec.tokens, self.spec.width, dtype=torch.float16)
        pieces = [segment.embeddings(slice(None)) for segment in view.segments]
        rows = torch.cat(pieces or [empty])
        return (rows if view.living is None else rows[view.living]).to(self.device)

    # Changing ----------------------------------------------------------------------------------------------------------

    def add(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> None:
        """Append items; with a folder they are on disk when this returns.

        Args:
            ids: ``n`` new ids.
            embeddings: ``[n, L, D]``, unit rows.
            metadata: One dictionary of JSON values for each.

        Raises:
            InputError: An id that is there already, embeddings of another shape, or metadata that JSON cannot hold.
            StoreError: The disk refuses, or the index is closed; nothing was added.
        """
        self._put(ids, embeddings, metadata, replace=False)

    def upsert(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> None:
        """Append items in the place of those of the same ids, in one change; arguments and errors as :meth:`add`."""
        self._put(ids, embeddings, metadata, replace=True)

    def _put(
        self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]], *, replace: bool
    ) -> None:
        _check_ids(ids)
        shape = (len(ids), self.spec.tokens, self.spec.width)
        if embeddings.shape != shape or len(metadata) != len(ids):
            raise InputError(f"expected embeddings {list(shape)} with as many metadata, got {list(embeddings.shape)}")
        texts = [_as_json(one) for one in metadata]
        self._refuse_if_fixed()
        if not ids:
            return
        arrays = encode(embeddings, self.spec.dtype)
        with self.catalogue.changing():
            there = self.catalogue.find(ids)
            if there and not replace:
                raise InputError(
                    f"expected ids that are new, got {next(iter(there))!r} again; give other ids, or replace them"
                )
            self.catalogue.remove(there.values())
            name, crcs = self._write(arrays)
            self.catalogue.add(ids, name, crcs, texts)
        self._reload()

    @property
    def incoming(self) -> Path:
        """A folder of the index for segments that workers write, to be taken over by :meth:`adopt`; made if missing.

        Raises:
            InputError: An index in memory.
            StoreError: It cannot be made.
        """
        if self._folder is None:
            raise InputError("expected an index with a folder for workers to write to, got one in memory")
        folder = self._folder / _INCOMING
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {folder}: {error.strerror}") from None
        return folder

    def adopt(self, written: Sequence[Written]) -> None:
        """Append what workers wrote into :attr:`incoming`, all of it in one change; what is there already is never doubled.

        Args:
            written: Segments in the order that their items shall have. Their files leave ``incoming``.

        Raises:
            InputError: An id that is there already or comes twice, or metadata that JSON cannot hold.
            StoreError: A segment that is missing or not what its worker says, or the disk refuses; nothing was added.
        """
        self._refuse_if_fixed()
        incoming = self.incoming
        ids = [item for one in written for item in one.ids]
        _check_ids(ids)
        texts = [[_as_json(meta) for meta in one.metadata] for one in written]
        shape = (self.spec.tokens, self.spec.width)
        with self.catalogue.changing():
            self.check_ids(ids)
            for one, metadata in zip(written, texts, strict=True):
                try:
                    open_segment(incoming, one.name, rows=len(one.ids), shape=shape, dtype=self.spec.dtype)
                    with suppress(FileExistsError):  # of a change that failed
                        os.link(incoming / one.name, self._segments / one.name)  # not moved: this may fail too
                except OSError as error:
                    raise StoreError(f"cannot take over {incoming / one.name}: {error.strerror}") from None
                self.catalogue.add(one.ids, one.name, one.crcs, metadata)
            sync_folder(self._segments)
        for one in written:
            (incoming / one.name).unlink(missing_ok=True)
        self._reload()

    def _write(self, arrays: dict[str, Tensor]) -> tuple[str, Sequence[int | None]]:
        """A new segment, and its checksums."""
        if self._folder is not None:
            return write_segment(self._segments, arrays)
        name = uuid.uuid4().hex
        self._opened[name] = Segment(name, arrays)
        return name, [None] * len(self._opened[name])

    def delete(self, ids: Sequence[str]) -> None:
        """Take items out; with a folder they are gone for every later opening when this returns.

        Raises:
            InputError: An id that is not there; nothing was taken out.
            StoreError: The disk refuses, or the index is closed; nothing was taken out.
        """
        self._refuse_if_fixed()
        if not ids:
            return
        with self.catalogue.changing():
            there = self.catalogue.find(ids)
            absent = [item for item in ids if item not in there]
            if absent:
                raise InputError(
                    f"expected ids of the index, got {absent[0]!r} and {len(absent) - 1} more that are not in it"
                )
            self.catalogue.remove(there.values())
        self._reload()

    def _reload(self) -> None:
        with self._lock:
            self._view = self._load()

    def _refuse_if_fixed(self) -> None:
        if self.catalogue and self._fixed is not None:
            raise StoreError("the index is open at an older version: open its folder again to change it")

    def check_ids(self, ids: Sequence[str], *, replace: bool = False) -> None:
        """Refuse what cannot be added.

        Raises:
            InputError: An id that is no string, is given twice, or is there already and not to be replaced; names it.
        """
        _check_ids(ids)
        there = {} if replace else self.catalogue.find(ids)
        if there:
            raise InputError(
                f"expected ids that are new, got {next(iter(there))!r} again; give other ids, or replace them"
            )

    # Looking after a folder ---------------------------------------------------------------------------------------------

    def maintain(self) -> dict[str, int]:
        """Put a folder in order: few segments without gaps, and no file that nothing needs.

        Older versions can no longer be opened afterwards. The order of items and the results of searches stay.

        Returns:
            ``segments`` before and ``after``, ``strays`` (files of changes that never ended), and ``bytes`` that became free.

        Raises:
            StoreError: As :meth:`add`; or an item is damaged, which a new checksum would hide.
        """
        self._refuse_if_fixed()
        if self._folder is None:
            return {"segments": 0, "after": 0, "strays": 0, "bytes": 0}
        size = _size(self._folder)
        with self._lock, self.catalogue.changing():
            view = self._load()
            before = [row.name for row in view.layout.segments]
            strays = _remove(self._segments, keep={*before, *self.damaged})  # no one is writing: who does is in here
            if damaged := self._damaged(view, chain(*_runs(view))) | self._lost(view):
                raise StoreError(
                    f"{len(damaged)} items are damaged, {next(iter(damaged))!r} among them (finelip index check "
                    "names all): take them out with finelip index repair, or restore their files"
                )
            after = self._rewrite(view)
            strays += _remove_abandoned(self._folder / _INCOMING)
        self._reload()
        self._sweep()
        return {"segments": len(before), "after": after, "strays": strays, "bytes": size - _size(self._folder)}

    def repair(self) -> dict[str, str]:
        """Take out all items that are damaged or whose segments are gone, and keep the others; index them again then.

        Older versions can no longer be opened afterwards.

        Returns:
            What was wrong with each, by its id.

        Raises:
            StoreError: The disk refuses; nothing was taken out.
        """
        self._refuse_if_fixed()
        with self._lock:
            damaged = self.check()
            if not damaged:
                return {}
            with self.catalogue.changing():
                self.catalogue.remove(self.catalogue.find(damaged).values())
                self._rewrite(self._load())
            self._reload()
            self._sweep()
        return damaged

    def _rewrite(self, view: View) -> int:
        """Inside a change: compact what gains by it; how many segments there are then."""
        lost = [row for row in self.catalogue.layout().segments if row.name in self.damaged]
        self.catalogue.forget()
        for row in lost:
            self.catalogue.replace([row], None, [])
        count = len(view.segments)
        for run in _runs(view):
            parts = [(view.segments[at], view.living_in(at)) for at in run]
            rows = [view.layout.segments[at] for at in run]
            if sum(len(living) for _, living in parts):
                name, crcs = write_segment(self._segments, joined(parts))
                self.catalogue.replace(rows, name, crcs)
                count -= len(run) - 1
            else:
                self.catalogue.replace(rows, None, [])
                count -= len(run)
        return count

    def _sweep(self) -> None:
        """Remove the files that the newest version does not need, after a change has made it so."""
        assert self._folder is not None
        with self.catalogue.undisturbed():
            names = {row.name for row in self.catalogue.layout().segments}
            _remove(self._segments, keep=names)
            _remove(self._folder / _CACHE, keep={*(Path(name).stem for name in names), Path(faiss.FILE).stem})

    def check(self) -> dict[str, str]:
        """Read every item of a folder again and compare it with its checksum.

        Returns:
            What is wrong with each damaged item, by its id; empty: all is as it was written.
        """
        if self._folder is None:
            return {}
        view = self.view()
        return self._damaged(view, range(len(view.segments))) | self._lost(view)

    def _lost(self, view: View) -> dict[str, str]:
        """The items of segments that could not be opened."""
        rows = [row for row in self.catalogue.layout(view.version).segments if row.name in self.damaged]
        return {
            item.id: self.damaged[row.name] for row in rows for item in self.catalogue.items(view.version, within=row)
        }

    def _damaged(self, view: View, segments: Iterable[int]) -> dict[str, str]:
        damaged: dict[str, str] = {}
        for at in segments:
            row = view.layout.segments[at]
            items = {item.position - row.first: item for item in self.catalogue.items(view.version, within=row)}
            try:
                segment = self._open_segment(row)  # anew: what was mapped may be older than the damage
                wrong = segment.damaged([items[n].crc if n in items else None for n in range(row.rows)])
                reason = "row {} of segment {} is not what was written"
            except (StoreError, FileNotFoundError) as error:
                wrong, reason = list(items), str(error).replace("{", "{{").replace("}", "}}")
            damaged |= {items[one].id: reason.format(one, row.name) for one in wrong if one in items}
        return damaged

    def snapshot(self, folder: str | PathLike[str]) -> None:
        """Copy a folder's index, all its versions, as it is on the disk now; it can be taken to another machine.

        Args:
            folder: Where to; new or empty.

        Raises:
            InputError: An index in memory.
            StoreError: A folder that is not empty, or the disk refuses.
        """
        if self._folder is None:
            raise InputError("expected an index with a folder to take a snapshot of, got one in memory")
        catalogue, target = self.catalogue, Path(folder)

        def copy_segments() -> None:
            for row in catalogue.layout().segments:
                shutil.copyfile(self._segments / row.name, target / _SEGMENTS / row.name)
                with (target / _SEGMENTS / row.name).open("rb") as file:
                    os.fsync(file.fileno())

        try:
            target.mkdir(parents=True, exist_ok=True)
            if any(target.iterdir()):
                raise StoreError(f"expected a new or empty folder for a snapshot, got {target} with files in it")
            (target / _SEGMENTS).mkdir()
            catalogue.copy(target / _CATALOGUE, copy_segments)  # last: before, the folder is no index
        except OSError as error:
            raise StoreError(f"cannot write the snapshot {target}: {error.strerror}") from None

    # Searching ----------------------------------------------------------------------------------------------------------

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
        global_scores, fine_scores = parts_of_scores(view, queries, rows)
        found = [[items[position] for position in own] for own in positions.tolist()]
        return Found(scores.cpu(), global_scores, fine_scores, view.numbers(rows), found, chosen)

    def source_for(self, view: View) -> CandidateSource | None:
        """The first stage of two where :meth:`build_candidates` made one that suits the view; None: all global embeddings."""
        with self._lock:
            if self._source is None or self._source[0] is not view:
                self._source = view, faiss.find(view, self._cache)
            return self._source[1]

    def build_candidates(self, *, lists: int | None = None, progress: bool = True) -> None:
        """Make the first stage of two fast for many millions of items, with faiss; see :mod:`finelip_fast.index.faiss`.

        Raises:
            EngineError: faiss is not installed.
            InputError: An index in memory, or too few items.
            StoreError: The index is closed, or the disk refuses.
        """
        if self._cache is None:
            raise InputError("expected an index with a folder that can be written to")
        faiss.build(self.view(), self._cache, lists=lists, progress=progress)
        self._source = None

    @property
    def tuning(self) -> Tuning | None:
        """What :func:`finelip_fast.index.tune.tune` has found; None: it has not been run."""
        kept = self.catalogue.note(_TUNING)
        return None if kept is None else Tuning(**kept)

    @tuning.setter
    def tuning(self, tuning: Tuning | None) -> None:
        self._refuse_if_fixed()
        self.catalogue.keep(_TUNING, None if tuning is None else asdict(tuning))

    def speed_up(self, field: str) -> None:
        """Make filters fast that compare a field of the metadata.

        Raises:
            InputError: Not the name of a field, see :mod:`finelip_fast.index.filters`.
            StoreError: The index is closed, or the disk refuses.
        """
        self.catalogue.speed_up(field)

    def close(self) -> None:
        """Release the folder."""
        if self._catalogue is not None:
            self._catalogue.close()
            self._catalogue = None


def _prepare_folder(folder: Path) -> None:
    try:
        (folder / _SEGMENTS).mkdir(parents=True, exist_ok=True)
        orphaned = not (folder / _CATALOGUE).exists() and any((folder / _SEGMENTS).iterdir())
    except OSError as error:
        raise StoreError(f"cannot make the index folder {folder}: {error.strerror}") from None
    if orphaned:
        raise StoreError(
            f"{folder} has segments and no {_CATALOGUE}, which says what is in them: restore it from a snapshot, or index "
            "the pictures again into another folder"
        )


def _runs(view: View) -> list[list[int]]:
    """Neighbouring segments that compaction makes one of: small ones, and any with gaps."""
    runs: list[list[int]] = []
    run: list[int] = []
    size = 0
    for at, segment in enumerate(view.segments):
        count = len(view.living_in(at))
        bytes_ = count * segment.bytes_per_item
        if view.is_complete(at) and bytes_ >= _FULL / 2:
            runs.append(run)
            run, size = [], 0
            continue
        if run and size + bytes_ > _FULL:
            runs.append(run)
            run, size = [], 0
        run.append(at)
        size += bytes_
    runs.append(run)
    return [run for run in runs if len(run) > 1 or (run and not view.is_complete(run[0]))]


def _check_ids(ids: Sequence[str]) -> None:
    new: set[str] = set()
    for item in ids:
        if not isinstance(item, str):
            raise InputError(f"expected ids as str, got {item!r}; convert it first")
        if item in new:
            raise InputError(f"expected ids that differ, got {item!r} again; give each item once")
        new.add(item)


def _as_json(metadata: Any) -> str:
    try:
        if isinstance(metadata, dict):
            return json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError):
        pass
    raise InputError(f"expected metadata as a dictionary of JSON values, got {metadata!r}")


def _remove(folder: Path, *, keep: set[str]) -> int:
    """Remove the files of a folder that have other names, with ending or without; how many there were."""
    others = (
        [path for path in folder.iterdir() if not {path.name, path.name.split(".")[0]} & keep]
        if folder.exists()
        else []
    )
    for path in others:
        path.unlink(missing_ok=True)
    return len(others)


def _remove_abandoned(folder: Path) -> int:
    old = [path for path in folder.glob("*") if path.stat().st_mtime < time.time() - _ABANDONED]
    for path in old:
        path.unlink(missing_ok=True)
    return len(old)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.parent.name in (_SEGMENTS, _CACHE, _INCOMING))


# Without the checkpoint -------------------------------------------------------------------------------------------------


def stored_source(folder: str | PathLike[str]) -> str | None:
    """The checkpoint that an index folder was written with, as it was named then: empty for the bundled one, None where there
    is no index.

    Raises:
        StoreError: The folder's catalogue cannot be read.
    """
    spec = read_spec(Path(folder) / _CATALOGUE)
    return None if spec is None else str(spec["source"])


def stored_dtype(folder: str | PathLike[str]) -> str | None:
    """How an index folder keeps its embeddings; None where there is no index, or it is of a time when all were float16.

    Raises:
        StoreError: The folder's catalogue cannot be read.
    """
    spec = read_spec(Path(folder) / _CATALOGUE)
    return None if spec is None else spec.get("dtype")


def stored_index(folder: str | PathLike[str], **options: Any) -> Index:
    """The index in a folder, opened without its checkpoint: to look after it, or to search with embeddings.

    Args:
        folder: Of the index.
        options: As for :class:`Index`.

    Raises:
        StoreError: There is none, or it cannot be read.
    """
    stored = read_spec(Path(folder) / _CATALOGUE)
    if stored is None:
        raise StoreError(f"there is no index at {folder}: make one with finelip index FOLDER --index {folder}")
    spec = IndexSpec(**{one.name: stored[one.name] for one in fields(IndexSpec) if one.name in stored})
    return Index(spec, folder, source=stored["source"], **options)
