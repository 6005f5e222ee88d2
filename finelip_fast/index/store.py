"""An index: ids, metadata and one float16 matrix ``[L, D]`` an item, in order of insertion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finelip_fast._errors import InputError, StoreError
from finelip_fast.index.catalogue import Catalogue, read_spec
from finelip_fast.index.segments import checksums, read_segment, write_segment
from finelip_fast.kernels import clim_topk

_CATALOGUE, _SEGMENTS = "catalogue.sqlite", "segments"


@dataclass(frozen=True)
class IndexSpec:
    """What every embedding of an index has in common.

    Attributes:
        checkpoint: Fingerprint of the checkpoint that made the embeddings.
        tokens: ``L``.
        width: ``D``.
    """

    checkpoint: str
    tokens: int
    width: int


class Index:
    """Items to search, in memory or kept in a folder.

    Args:
        spec: What the embeddings are.
        folder: Where to keep them; None: nowhere. Made if missing; opened if there.
        source: What the checkpoint was opened as, for messages and :func:`stored_source`.
        device: Where the embeddings are searched.
        version: Of a folder: how it was after so many changes; such an index takes no changes. None: as it is now.

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
    ) -> None:
        self.spec, self.source, self.device = spec, source, torch.device(device)
        self.ids: list[str] = []
        self.metadata: list[dict[str, Any]] = []
        self._known: set[str] = set()
        self._blocks: list[Tensor] = []
        self._catalogue: Catalogue | None = None
        self._closed = False
        self._version, self._past = 0, version is not None
        if folder is not None:
            self._open(Path(folder), version)
        elif version is not None:
            raise InputError(
                f"expected version only with a folder, got {version}: an index in memory keeps no versions"
            )

    def _open(self, folder: Path, version: int | None) -> None:
        self._segments = folder / _SEGMENTS
        try:
            self._segments.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make the index folder {folder}: {error.strerror}") from None
        self._catalogue = Catalogue(folder / _CATALOGUE, asdict(self.spec), source=self.source)
        oldest, newest = self._catalogue.oldest, self._catalogue.version
        if version is not None and not oldest <= version <= newest:
            raise StoreError(f"expected a version of {folder} from {oldest} to {newest}, got {version}")
        try:
            self._load(newest if version is None else version)
        except StoreError:
            if self._catalogue.version == newest:
                raise
            self._load(self._catalogue.version)  # it was compacted meanwhile: the old segments are gone

    def _load(self, version: int) -> None:
        """Read the items of a version."""
        assert self._catalogue is not None
        self.ids, self.metadata, self._known, self._blocks = [], [], set(), []
        for segment, group in groupby(self._catalogue.items(version), key=lambda item: item.segment):
            items = list(group)
            rows = [item.row for item in items]
            block = read_segment(self._segments, segment, rows=max(rows) + 1, shape=(self.spec.tokens, self.spec.width))
            self._append([item.id for item in items], block[rows], [item.metadata for item in items])
        self._version = version

    @property
    def version(self) -> int:
        """Counts the changes of the folder up to this index; 0 in memory."""
        return self._version

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, item: object) -> bool:
        return item in self._known

    def add(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> None:
        """Append items; with a folder they are on disk when this returns.

        Args:
            ids: ``n`` new ids.
            embeddings: ``[n, L, D]``, unit rows; kept as float16.
            metadata: One dictionary of JSON values for each.

        Raises:
            InputError: An id that is there already, embeddings of another shape, or metadata that JSON cannot hold.
            StoreError: The disk refuses, or the index is closed; nothing was added.
        """
        self.check_ids(ids)
        self._change([], ids, embeddings, metadata)

    def upsert(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> None:
        """Append items in the place of those of the same ids, in one change; arguments and errors as :meth:`add`."""
        self.check_ids([item for item in ids if item not in self._known])
        if len(set(ids)) < len(ids):
            raise InputError("expected ids that differ, got one twice; give each item once")
        self._change([item for item in ids if item in self._known], ids, embeddings, metadata)

    def delete(self, ids: Sequence[str]) -> None:
        """Take items out; with a folder they are gone for every later opening when this returns.

        Raises:
            InputError: An id that is not there; nothing was taken out.
            StoreError: The disk refuses, or the index is closed; nothing was taken out.
        """
        absent = [item for item in ids if item not in self._known]
        if absent:
            raise InputError(
                f"expected ids of the index, got {absent[0]!r} and {len(absent) - 1} more that are not in it"
            )
        empty = torch.empty(0, self.spec.tokens, self.spec.width)
        self._change(list(dict.fromkeys(ids)), [], empty, [])

    def _change(
        self, gone: Sequence[str], ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]
    ) -> None:
        shape = (len(ids), self.spec.tokens, self.spec.width)
        if embeddings.shape != shape or len(metadata) != len(ids):
            raise InputError(f"expected embeddings {list(shape)} with as many metadata, got {list(embeddings.shape)}")
        metadata = [_plain(item) for item in metadata]
        self._refuse_if_fixed()
        if not ids and not gone:
            return
        if self._catalogue is not None:
            with self._catalogue.changing(self._version):
                self._catalogue.remove(gone)
                if ids:
                    segment, crcs = write_segment(self._segments, embeddings)
                    self._catalogue.add(ids, segment, crcs, metadata)
            self._version += 1
        self._drop(set(gone))
        if ids:
            self._append(ids, embeddings, metadata)

    def maintain(self) -> dict[str, int]:
        """Put a folder in order: one segment of what is there, and no file that nothing needs.

        Older versions can no longer be opened afterwards. Indexes that are open go on searching what they have read.

        Returns:
            ``segments`` before, ``strays`` (files of changes that never ended), and ``bytes`` that became free.

        Raises:
            StoreError: As :meth:`add`; or an item is damaged, which a new checksum would hide.
        """
        self._refuse_if_fixed()
        if damaged := self.check():
            raise StoreError(
                f"{len(damaged)} items are damaged, {next(iter(damaged))!r} among them (finelip index check names all): "
                "delete them or restore their files, then put the folder in order"
            )
        if self._catalogue is None:
            return {"segments": 0, "strays": 0, "bytes": 0}
        with self._catalogue.changing(self._version):
            before = self._catalogue.segments()
            strays = [path for path in self._segments.iterdir() if path.name not in before]
            size = _size(self._segments.iterdir())
            for path in strays:  # no one is writing: who does holds the catalogue
                path.unlink()
            kept = ""
            if len(self):
                kept, crcs = write_segment(self._segments, self.embeddings)
                self._catalogue.compact(kept, crcs)
            else:
                self._catalogue.compact("", [])
        self._version += 1
        for name in before:
            (self._segments / name).unlink(missing_ok=True)
        return {
            "segments": len(before),
            "strays": len(strays),
            "bytes": size - _size(self._segments.iterdir()),
        }

    def snapshot(self, folder: str | PathLike[str]) -> None:
        """Copy a folder's index, all its versions, as it is on the disk now; it can be taken to another machine.

        Args:
            folder: Where to; new or empty.

        Raises:
            InputError: An index in memory.
            StoreError: A folder that is not empty, or the disk refuses.
        """
        if self._catalogue is None:
            raise InputError("expected an index with a folder to take a snapshot of, got one in memory")
        catalogue, target = self._catalogue, Path(folder)

        def copy_segments() -> None:
            for name in catalogue.segments():
                shutil.copyfile(self._segments / name, target / _SEGMENTS / name)

        try:
            target.mkdir(parents=True, exist_ok=True)
            if any(target.iterdir()):
                raise StoreError(f"expected a new or empty folder for a snapshot, got {target} with files in it")
            (target / _SEGMENTS).mkdir()
            catalogue.copy(target / _CATALOGUE, copy_segments)  # last: before, the folder is no index
        except OSError as error:
            raise StoreError(f"cannot write the snapshot {target}: {error.strerror}") from None

    def check(self) -> dict[str, str]:
        """Read every item of a folder again and compare it with its checksum.

        Returns:
            What is wrong with each damaged item, by its id; empty: all is as it was written.
        """
        if self._catalogue is None:
            return {}
        return _damaged(self._catalogue, self._segments, self.spec, self._version)

    def _refuse_if_fixed(self) -> None:
        if self._closed:
            raise StoreError("the index is closed: open its folder again to change it")
        if self._past:
            raise StoreError("the index is open at an older version: open its folder again to change it")

    def check_ids(self, ids: Sequence[str]) -> None:
        """Refuse what cannot be added.

        Raises:
            InputError: An id that is no string, is there already, or is given twice; names it.
        """
        new: set[str] = set()
        for item in ids:
            if not isinstance(item, str):
                raise InputError(f"expected ids as str, got {item!r}; convert it first")
            if item in self._known or item in new:
                raise InputError(f"expected ids that are new and differ, got {item!r} again; give other ids")
            new.add(item)

    def _append(self, ids: Sequence[str], embeddings: Tensor, metadata: Sequence[dict[str, Any]]) -> None:
        self.ids.extend(ids)
        self._known.update(ids)
        self.metadata.extend(metadata)
        self._blocks.append(embeddings.to(self.device, torch.float16))

    def _drop(self, gone: set[str]) -> None:
        if not gone:
            return
        keep = [at for at, item in enumerate(self.ids) if item not in gone]
        embeddings = self.embeddings[keep]
        self.ids, self.metadata = [self.ids[at] for at in keep], [self.metadata[at] for at in keep]
        self._known -= gone
        self._blocks = [embeddings]

    @property
    def embeddings(self) -> Tensor:
        """All items, float16 ``[N, L, D]`` on the index's device."""
        if len(self._blocks) != 1:
            empty = torch.empty(0, self.spec.tokens, self.spec.width, dtype=torch.float16, device=self.device)
            self._blocks = [torch.cat([empty, *self._blocks])]
        return self._blocks[0]

    def search(self, queries: Tensor, k: int, *, alpha: float) -> tuple[Tensor, Tensor]:
        """Scores and positions of the ``k`` best items, ``[Q, min(k, N)]``; see :func:`finelip_fast.kernels.clim_topk`."""
        return clim_topk(queries.to(self.device, torch.float16), self.embeddings, k, alpha=alpha)

    def close(self) -> None:
        """Release the folder; the items stay searchable in memory."""
        if self._catalogue is not None:
            self._catalogue.close()
            self._catalogue, self._closed = None, True


def _plain(metadata: Any) -> dict[str, Any]:
    """A copy of its own, as it will be read back from the disk."""
    try:
        if isinstance(metadata, dict):
            return json.loads(json.dumps(metadata))
    except (TypeError, ValueError):
        pass
    raise InputError(f"expected metadata as a dictionary of JSON values, got {metadata!r}")


def _damaged(catalogue: Catalogue, segments: Path, spec: IndexSpec, version: int) -> dict[str, str]:
    damaged: dict[str, str] = {}
    for segment, group in groupby(catalogue.items(version), key=lambda item: item.segment):
        items = list(group)
        rows = [item.row for item in items]
        try:
            block = read_segment(segments, segment, rows=max(rows) + 1, shape=(spec.tokens, spec.width))
        except StoreError as error:
            damaged |= {item.id: str(error) for item in items}
            continue
        for item, crc in zip(items, checksums(block[rows]), strict=True):
            if item.crc not in (None, crc):
                damaged[item.id] = f"row {item.row} of segment {segment} is not what was written"
    return damaged


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def stored_source(folder: str | PathLike[str]) -> str | None:
    """The checkpoint that an index folder was written with, as it was named then: empty for the bundled one, None where there
    is no index.

    Raises:
        StoreError: The folder's catalogue cannot be read.
    """
    spec = read_spec(Path(folder) / _CATALOGUE)
    return None if spec is None else str(spec["source"])


def stored_index(folder: str | PathLike[str]) -> Index:
    """The index in a folder, opened without its checkpoint: to look after it, not to search.

    Raises:
        StoreError: There is none, or it cannot be read.
    """
    spec, source = _stored_spec(folder)
    return Index(spec, folder, source=source)


def check_folder(folder: str | PathLike[str]) -> tuple[int, dict[str, str]]:
    """Read every item of an index folder and compare it with its checksum, also where some cannot be read.

    Returns:
        How many items there are, and what is wrong with each damaged one, by its id.

    Raises:
        StoreError: There is no index, or its catalogue cannot be read.
    """
    spec, source = _stored_spec(folder)
    with closing(Catalogue(Path(folder) / _CATALOGUE, asdict(spec), source=source)) as catalogue:
        count = sum(1 for _ in catalogue.items())
        return count, _damaged(catalogue, Path(folder) / _SEGMENTS, spec, catalogue.version)


def _stored_spec(folder: str | PathLike[str]) -> tuple[IndexSpec, str]:
    stored = read_spec(Path(folder) / _CATALOGUE)
    if stored is None:
        raise StoreError(f"there is no index at {folder}: make one with finelip index FOLDER --index {folder}")
    return IndexSpec(**{one.name: stored[one.name] for one in fields(IndexSpec)}), stored["source"]
