"""The items of an index: ids, metadata and one matrix ``[L, D]`` each, in order of insertion; in memory or kept in a folder.

A folder holds ``catalogue.sqlite``, ``segments/`` with the embeddings, ``cache/`` with what can be made from them again, and
``incoming/`` with what workers have written and nobody has taken over yet. Several processes may have it open: each sees what
was acknowledged, and writers wait for each other.
"""

from __future__ import annotations

import json
import math
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from finelip_fast._arguments import find_device, folder_path, listed, matrices, one_of, share, strings, whole_number
from finelip_fast._files import plain_name, sync_folder
from finelip_fast._json import MAX_DEPTH
from finelip_fast.errors import FineLIPError, InputError, StoreError
from finelip_fast.index import remedies
from finelip_fast.index.arrays import UnavailableError
from finelip_fast.index.catalogue import Catalogue, Item, Layout, SegmentRow, read_spec
from finelip_fast.index.database import between_forks, survive_forks
from finelip_fast.index.lists import remove_segment
from finelip_fast.index.segments import DTYPES, Segment, encode, open_segment, write_segment
from finelip_fast.index.view import View

CATALOGUE, SEGMENTS, CACHE, INCOMING = "catalogue.sqlite", "segments", "cache", "incoming"
Existing = Literal["error", "skip", "replace"]

_LONGEST_ID, _LONGEST_METADATA = (1 << 16) - 1, 1 << 26  # bytes
_LARGEST = 1 << 1024  # an integer that no float can hold
_TOLERANCE = 0.05  # of a row's length: int8 rounds that far in few dimensions
_ROWS_AT_ONCE = 4096
_LARGEST_SIZE = 1 << 20  # of L and D


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
        if not isinstance(self.checkpoint, str):
            raise InputError(f"expected checkpoint as a fingerprint, got {self.checkpoint!r:.80}")
        for name in ("tokens", "width"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), most=_LARGEST_SIZE))
        object.__setattr__(self, "alpha", share("alpha", self.alpha))
        one_of("dtype", self.dtype, DTYPES)


class Written(NamedTuple):
    """A segment that a worker wrote: what :func:`finelip_fast.index.segments.write_segment` returned, and whose it is."""

    name: str
    ids: list[str]
    crcs: list[int]
    metadata: list[dict[str, Any]]


class Store:
    """Items, in memory or kept in a folder; :class:`finelip_fast.index.Index` also searches them.

    May be used from several threads.

    Attributes:
        folder, segments_folder, cache_folder: Where things are; None: in memory, or the folder cannot be written to.
        fixed: The version that was asked for; None: the newest.
        damaged: With ``skip_damaged``: why segments cannot be read, by their names.

    Args:
        spec: What the embeddings are.
        folder: Where to keep them; None: nowhere. Made if missing; opened if there.
        source: What the checkpoint was opened as, for messages and :func:`stored_source`.
        device: Where to search.
        version: Of a folder: how it was after so many changes; such an index takes no changes. None: always the newest.
        skip_damaged: Open what can be read.
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
        if verify and skip_damaged:
            raise InputError(
                "expected verify or skip_damaged, got both: a segment with a damaged row can be opened without verify"
            )
        if not isinstance(spec, IndexSpec) or not isinstance(source, str):
            raise InputError(f"expected an IndexSpec and source as str, got {spec!r:.80} and {source!r:.80}")
        self.spec, self.source, self.device = spec, source, find_device(device)
        self.damaged: dict[str, str] = {}
        self.fixed, self._skip_damaged, self._verify = version, skip_damaged, verify
        # Where it is, wherever this process goes.
        self.folder = None if folder is None else folder_path("folder", folder).absolute()
        self._new_locks()
        self._opened: dict[str, Segment] = {}
        if self.folder is None and version is not None:
            raise InputError(
                f"expected version only with a folder, got {version}: an index in memory keeps no versions"
            )
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
        self.lock = threading.RLock()  # of upkeep, which runs once at a time; who reads does not take it
        self.view_lock = threading.RLock()

    def before_fork(self) -> None:
        pass

    def after_fork(self) -> None:
        self._new_locks()
        torch.set_num_threads(1)  # the parent's threads are not here, and OpenMP would wait for them for ever

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is None:
            raise InputError(
                "expected an index with a folder to pickle, got one in memory, which is in this process alone"
            )
        options: dict[str, Any] = {"source": self.source, "device": str(self.device), "version": self.fixed}
        options |= {"skip_damaged": self._skip_damaged, "verify": self._verify}
        return _reopened, (type(self), self.spec, self.folder, options)

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
        with between_forks(), self.view_lock:
            newest = self.catalogue.version
            if newest != self._seen:
                self._view, self._seen = self.load(), newest
            return self._view

    def load(self) -> View:
        """The version as the catalogue has it now, inside a change as it will be."""
        while True:
            layout = self.catalogue.layout(self.fixed)
            try:
                return self._open(layout)
            except FileNotFoundError as error:
                if self.catalogue.layout(self.fixed) == layout:
                    raise StoreError(
                        f"segment {error.filename} is missing: restore it, or keep the rest with "
                        f"{remedies.repair(self.folder)}"
                    ) from None
                # It was compacted meanwhile.

    def _open(self, layout: Layout) -> View:
        with between_forks(), self.view_lock:
            if self.folder is not None:  # in memory there is nothing but what is opened
                names = {row.name for row in layout.segments}
                self._opened = {name: segment for name, segment in self._opened.items() if name in names}
            self.damaged = {}
            kept = []
            for row in layout.segments:
                try:
                    if row.name not in self._opened:
                        segment = self.open_segment(row)
                        if self._verify:
                            self._refuse_damaged(row, segment, layout.version)
                        self._opened[row.name] = segment
                    kept.append(row)
                except (StoreError, FileNotFoundError) as error:
                    if not self._skip_damaged or isinstance(error, UnavailableError):
                        raise
                    self.damaged[row.name] = str(error)
            segments = [self._opened[row.name] for row in kept]
            return View(layout._replace(segments=kept), segments, self.device, self.cache_folder)

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
            FileNotFoundError, StoreError: As :func:`finelip_fast.index.segments.open_segment`.
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
            embeddings: ``[n, L, D]``, unit rows.
            metadata: One dictionary of JSON values for each: its keys are text, it is nested at most 64 deep, and has at most
                64 MiB.
            existing: Of ids that are there, as it turns out when no one else can write: an ``"error"``, ``"skip"`` the new
                items, or ``"replace"`` the old ones, all in one change.

        Returns:
            The ids that were added.

        Raises:
            InputError: An id that is there already, embeddings of another shape or that are no unit rows, or metadata that
                JSON cannot hold.
            StoreError: The disk refuses, the folder was removed, or the index is closed; nothing was added.
        """
        one_of("existing", existing, get_args(Existing))
        ids, metadata = listed("ids", ids), listed("metadata", metadata)
        check_ids(ids)
        matrices("embeddings", embeddings, (len(ids), self.spec.tokens, self.spec.width))
        if len(metadata) != len(ids):
            raise InputError(f"expected metadata for {len(ids)} ids, got {len(metadata)}")
        check_embeddings(ids, embeddings)
        texts = [as_json(values, item) for item, values in zip(ids, metadata, strict=True)]
        self.refuse_if_fixed()
        if not ids:
            return []
        arrays = encode(embeddings, self.spec.dtype)
        with self._written() as names, self.catalogue.changing():
            there = self.catalogue.find(ids)
            if there and existing == "error":
                raise _there_already(there)
            if there and existing == "skip":
                new = [at for at, item in enumerate(ids) if item not in there]
                ids, texts = [ids[at] for at in new], [texts[at] for at in new]
                arrays = {name: values[new] for name, values in arrays.items()}
            elif there:
                self.catalogue.remove(there.values())
            if ids:
                name, crcs = self._write(arrays)
                names.append(name)
                self.catalogue.add(ids, name, crcs, texts)
        self.reload()
        return ids

    def upsert(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> None:
        """Append items in the place of those of the same ids, in one change; arguments and errors as :meth:`add`."""
        self.add(ids, embeddings, metadata, existing="replace")

    @property
    def incoming(self) -> Path:
        """A folder of the index for segments that workers write, to be taken over by :meth:`adopt`; made if missing.

        Raises:
            InputError: An index in memory.
            StoreError: It cannot be made.
        """
        if self.folder is None:
            raise InputError("expected an index with a folder for workers to write to, got one in memory")
        folder = self.folder / INCOMING
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
        self.refuse_if_fixed()
        incoming = self.incoming
        ids = [item for one in written for item in one.ids]
        check_ids(ids)
        texts = [[as_json(*pair) for pair in zip(one.metadata, one.ids, strict=True)] for one in written]
        shape = (self.spec.tokens, self.spec.width)
        with self._written() as names, self.catalogue.changing():
            self.check_ids(ids)
            for one, metadata in zip(written, texts, strict=True):
                try:
                    name = plain_name(one.name, incoming, error=StoreError)
                    opened = open_segment(incoming, name, rows=len(one.ids), shape=shape, dtype=self.spec.dtype)
                    check_embeddings(one.ids, opened.embeddings(slice(None)))
                    with suppress(FileExistsError):  # of a change that failed
                        os.link(incoming / one.name, self.segments_folder / one.name)  # not moved: this may fail too
                except OSError as error:
                    raise StoreError(f"cannot take over {incoming / one.name}: {error.strerror}") from None
                names.append(name)
                self.catalogue.add(one.ids, one.name, one.crcs, metadata)
            sync_folder(self.segments_folder)
        for one in written:
            (incoming / one.name).unlink(missing_ok=True)
        self.reload()

    @contextmanager
    def _written(self) -> Iterator[list[str]]:
        """Takes names of new segments, and removes their files where the change fails."""
        names: list[str] = []
        try:
            yield names
        except Exception:  # not of a signal, after which the change may be there
            with suppress(FineLIPError):
                for name in {*names} - {row.name for row in self.catalogue.layout().segments}:
                    self._opened.pop(name, None)
                    if self.folder is not None:
                        remove_segment(self.segments_folder, name)
            raise

    def _write(self, arrays: dict[str, Tensor]) -> tuple[str, Sequence[int | None]]:
        """A new segment, and its checksums."""
        if self.folder is not None:
            return write_segment(self.segments_folder, arrays)
        name = uuid.uuid4().hex
        self._opened[name] = Segment(name, arrays)
        return name, [None] * len(self._opened[name])

    def delete(self, ids: Sequence[str]) -> None:
        """Take items out; with a folder they are gone for every later opening when this returns.

        Raises:
            InputError: An id that is not there or no string, or no list; nothing was taken out.
            StoreError: The disk refuses, or the index is closed; nothing was taken out.
        """
        self.refuse_if_fixed()
        ids = strings("ids", ids)
        if not ids:
            return
        with self.catalogue.changing():
            there = self.catalogue.find(ids)
            absent = [item for item in ids if item not in there]
            if absent:
                raise InputError(
                    f"expected ids of the index, got {absent[0]!r:.80} and {len(absent) - 1} more that are not in it"
                )
            self.catalogue.remove(there.values())
        self.reload()

    def reload(self) -> None:
        """After an own change."""
        self.view()

    def refuse_if_fixed(self) -> None:
        """
        Raises:
            StoreError: The index is closed, or open at an older version.
        """
        if self.catalogue and self.fixed is not None:
            raise StoreError("the index is open at an older version: open its folder again to change it")

    def check_ids(self, ids: Sequence[str], *, replace: bool = False) -> None:
        """Refuse what cannot be added.

        Raises:
            InputError: An id that is no string, is given twice, or is there already and not to be replaced; names it.
        """
        check_ids(ids)
        there = {} if replace else self.catalogue.find(ids)
        if there:
            raise _there_already(there)

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
        if not (folder / SEGMENTS).is_dir():
            (folder / SEGMENTS).mkdir(parents=True, exist_ok=True)
            sync_folder(folder)
        orphaned = not (folder / CATALOGUE).exists() and any((folder / SEGMENTS).iterdir())
    except OSError as error:
        raise StoreError(f"cannot make the index folder {folder}: {error.strerror}") from None
    if orphaned:
        raise StoreError(
            f"{folder} has segments and no {CATALOGUE}, which says what is in them: restore it from a snapshot, or index "
            "the pictures again into another folder"
        )


def _reopened(kind: type[Store], spec: IndexSpec, folder: Path, options: dict[str, Any]) -> Store:
    """An index that was pickled, opened as it was."""
    return kind(spec, folder, **options)


def check_ids(ids: Sequence[str]) -> None:
    """
    Raises:
        InputError: An id that is no string, is too long, or comes twice; names it.
    """
    new: set[str] = set()
    for item in strings("ids", ids):
        if len(item) > _LONGEST_ID // 4 and len(item.encode("utf-8", "surrogatepass")) > _LONGEST_ID:
            raise InputError(
                f"expected ids of at most {_LONGEST_ID} bytes, got one of {len(item)} characters, {item!r:.40}…"
            )
        if item in new:
            raise InputError(f"expected ids that differ, got {item!r:.80} again; give each item once")
        new.add(item)


def _there_already(there: Iterable[str]) -> InputError:
    return InputError(
        f"expected ids that are new, got {next(iter(there))!r:.80} again; give other ids, or replace them"
    )


def check_embeddings(ids: Sequence[str], embeddings: Tensor) -> None:
    """
    Raises:
        InputError: A row that is not of length 1, as one with NaN is not; names the item.
    """
    if not embeddings.is_floating_point():
        raise InputError(f"expected embeddings of a floating dtype, got {embeddings.dtype}")
    for start in range(0, len(embeddings), _ROWS_AT_ONCE):
        lengths = torch.linalg.vector_norm(embeddings[start : start + _ROWS_AT_ONCE], dim=-1, dtype=torch.float32)
        wrong = ~((lengths - 1).abs() <= _TOLERANCE)  # also of NaN
        if wrong.any():
            at, row = wrong.nonzero()[0].tolist()
            raise InputError(
                f"expected embeddings of unit rows, got row {row} of item {ids[start + at]!r:.80} with a length of "
                f"{lengths[at, row]:.4g}; normalize it, and look for NaN where it was made"
            )


def as_json(metadata: Any, item: str | None = None) -> str:
    """
    Args:
        metadata: Of one item.
        item: Its id, for the message.

    Raises:
        InputError: Anything but a dictionary of JSON values; names the key.
    """
    whose = "" if item is None else f" of item {item!r:.80}"
    if not isinstance(metadata, dict):
        raise InputError(f"expected metadata as a dictionary of JSON values, got {metadata!r:.80}{whose}")
    if fault := _fault(metadata, "", MAX_DEPTH):
        raise InputError(f"expected metadata as a dictionary of JSON values, got {fault}{whose}")
    text = json.dumps(metadata)
    if len(text) > _LONGEST_METADATA:
        raise InputError(
            f"expected metadata of at most {_LONGEST_METADATA} bytes, got {len(text)}{whose}: keep it in a file"
        )
    return text


def _fault(value: Any, key: str, depth: int) -> str | None:
    """What JSON cannot hold, or not without becoming something else."""
    if value is None or isinstance(value, (bool, str)):  # also of half a surrogate pair, as paths that are no text have
        return None
    if isinstance(value, int):
        return None if abs(value) < _LARGEST else f"an integer beyond the largest float{key}"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"the number {value}, which is not finite,{key}"
    if not isinstance(value, (dict, list, tuple)):
        return f"{value!r:.80}{key}"
    if not depth:
        return f"nesting deeper than {MAX_DEPTH}"
    parts = value.items() if isinstance(value, dict) else ((str(at), part) for at, part in enumerate(value))
    for name, part in parts:
        if not isinstance(name, str):
            return f"the key {name!r:.80}, which is no str{key}"
        if fault := _fault(name, " as a key", depth - 1) or _fault(
            part, key or f" under the key {name!r:.80}", depth - 1
        ):
            return fault
    return None


# Without the checkpoint -------------------------------------------------------------------------------------------------


def stored_spec(folder: str | PathLike[str]) -> tuple[IndexSpec, str] | None:
    """What an index folder holds, and the checkpoint that it was written with; None where there is no index.

    Raises:
        StoreError: The folder's catalogue cannot be read, or says what no index can be.
    """
    stored = read_spec(Path(folder) / CATALOGUE)
    return None if stored is None else _checked_spec(stored, folder)


def _checked_spec(stored: dict[str, Any], folder: str | PathLike[str]) -> tuple[IndexSpec, str]:
    values = {field.name: stored[field.name] for field in fields(IndexSpec) if field.name in stored}
    sizes, alpha, source = (values.get("tokens"), values.get("width")), values.get("alpha", 0.8), stored.get("source")
    if not (
        isinstance(values.get("checkpoint"), str)
        and isinstance(source, str)
        and all(type(size) is int and 0 < size <= _LARGEST_SIZE for size in sizes)
        and type(alpha) in (int, float)
        and 0 <= alpha <= 1
        and values.get("dtype", DTYPES[0]) in DTYPES
    ):
        raise StoreError(
            f"{Path(folder) / CATALOGUE}: expected the spec of an index, got {values!r:.200} of {source!r:.80}: restore it "
            "from a snapshot"
        )
    return IndexSpec(**values), source


def stored_source(folder: str | PathLike[str]) -> str | None:
    """The checkpoint that an index folder was written with, as it was named then: empty for the bundled one, None where there
    is no index.

    Raises:
        StoreError: The folder's catalogue cannot be read.
    """
    stored = stored_spec(folder)
    return None if stored is None else stored[1]


def stored_dtype(folder: str | PathLike[str]) -> str | None:
    """How an index folder keeps its embeddings; None where there is no index, or it is of a time when all were float16.

    Raises:
        StoreError: The folder's catalogue cannot be read.
    """
    stored = read_spec(Path(folder) / CATALOGUE)
    return None if stored is None or "dtype" not in stored else _checked_spec(stored, folder)[0].dtype
