"""Maintain an index folder: check, repair, compact and copy it.

Nothing that another process may still need is removed. A segment is removed once a change has replaced it, which the catalogue
notes in the same change; a temporary file once no one holds its lock; a worker's files once their job is over. No decision
depends on a clock. A segment that nothing names stays: it may be all that is left of changes whose record was damaged.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from finelip_fast._arguments import folder_path
from finelip_fast._files import write_error
from finelip_fast.errors import InputError, StoreError
from finelip_fast.index import remedies
from finelip_fast.index.arrays import (
    UnavailableError,
    files_in,
    opened,
    remove_abandoned,
    remove_unlocked,
    within_memory,
)
from finelip_fast.index.catalogue import SegmentRow
from finelip_fast.index.copies import cache_name, sketch_name
from finelip_fast.index.orphans import forget_replaced, replaced, retire, unnamed
from finelip_fast.index.segments import joined, write_segment
from finelip_fast.index.sketches import BASIS
from finelip_fast.index.spec import CACHE, CATALOGUE, INCOMING, SEGMENTS
from finelip_fast.index.store import Store
from finelip_fast.index.view import View

# Size that compaction merges small segments to, in bytes; a segment of at least half of it is left alone.
_FULL = 1 << 29
# Number of newest segments that are too many, and how many times as large as these the next may be to be merged with them.
_MANY, _GROWTH = 64, 2
_WARNED_OF = 1_000  # segments
_OUTDATED = ("globals.faiss", "globals.json")  # from when faiss kept its own files
# A job of workers holds the lock of ``NAME.lock`` in ``incoming``; the names of its files begin with ``NAME-``.
JOB = "job-"


class Damage(NamedTuple):
    """An item that is not what was written."""

    position: int
    id: str
    reason: str


def maintain(store: Store) -> dict[str, int]:
    """Compact a folder to few segments without gaps, and remove files that nothing needs.

    Older versions can no longer be opened afterwards. The order of items and the results of searches do not change.

    Returns:
        ``segments_before`` and ``segments_after``; ``unreferenced_segments``, which are not in the catalogue and stay (see
        :func:`repair`); and ``bytes_freed``.

    Raises:
        StoreError: The same cases as in :meth:`add`; or an item is damaged, which a new checksum would hide.
    """
    store.refuse_if_fixed()
    if store.folder is None:
        return dict.fromkeys(("segments_before", "segments_after", "unreferenced_segments", "bytes_freed"), 0)
    size = _size(store.folder)
    with store.lock, within_memory(), store.catalogue.changing():
        view = store.load()
        before = len(view.segments)
        rewritten = [view.layout.segments[at] for run in _runs(view) for at in run]
        lost = [row for row in store.catalogue.layout(view.version).segments if row.name in store.damaged]
        if damaged := _damaged(store, view.version, rewritten + lost):
            raise _refusal(store, damaged)
        after = _rewrite(store, view, _runs(view))
    store.reload()
    sweep(store)
    return {
        "segments_before": before,
        "segments_after": after,
        "unreferenced_segments": len(unnamed(store.catalogue)),
        "bytes_freed": size - _size(store.folder),
    }


def compact_recent(store: Store) -> None:
    """Merge the newest segments into one if there are many small ones; those before them stay, gaps included.

    This is for programs that keep adding a few items at a time: every segment takes memory, and adds to the time of each
    search and each change. A row is moved a few times at most. Older versions can no longer be opened afterwards. If an item
    is damaged, nothing is done, because a new checksum would hide it.

    Raises:
        StoreError: The same cases as in :meth:`add`.
    """
    store.refuse_if_fixed()
    if store.folder is None or len(_recent(store.view())) < _MANY:
        return
    with store.lock, within_memory(), store.catalogue.undisturbed():
        view = store.load()
        run = _recent(view)  # again, since others may have changed the index meanwhile
        rows = [view.layout.segments[at] for at in run]
        if len(run) < _MANY or store.damaged or _damaged(store, view.version, rows):
            return
        with store.catalogue.changing():
            _rewrite(store, view, [run], first=rows[0].first)
    store.reload()
    sweep(store)


def warn_of_many(store: Store) -> None:
    """Warn of many small segments, each time that ``_WARNED_OF`` more have been added."""
    view = store.view()
    count = len(view.segments)
    if store.folder is not None and count and count % _WARNED_OF == 0 and len(_recent(view)) >= _MANY:
        warnings.warn(
            f"{store.folder} has {count} segments, one per addition; each slows searches and changes. Add more items per "
            f"call, or merge segments with index.compact_recent() or {remedies.maintain(store.folder)}",
            stacklevel=3,  # the caller of Index.add
        )


def repair(store: Store) -> dict[str, str]:
    """Remove all items that are damaged or whose segments are gone, and keep the others; index the removed ones again.

    Older versions can no longer be opened afterwards.

    Returns:
        What was wrong with each removed item, by id.

    Raises:
        StoreError: Writing fails; nothing was removed.
    """
    store.refuse_if_fixed()
    with store.lock:
        if not check(store):
            return {}
        with within_memory(), store.catalogue.changing():
            view = store.load()
            # Again, since others may have changed the index meanwhile.
            damaged = _damaged(store, view.version, store.catalogue.layout(view.version).segments)
            store.catalogue.remove(damage.position for damage in damaged)
            view = store.load()
            _rewrite(store, view, _runs(view))
        store.reload()
        sweep(store)
    return {damage.id: damage.reason for damage in damaged}


def _rewrite(store: Store, view: View, runs: Sequence[list[int]], first: int = 0) -> int:
    """Within a change, merge each run into one segment, and return the number of segments that remain.

    From the position ``first`` on, no other segment may have gaps.
    """
    removed = [row for row in store.catalogue.layout().segments if row.name in store.damaged]
    store.catalogue.forget(first)
    for row in removed:
        store.catalogue.replace([row], None, [])
    count = len(view.segments)
    for run in runs:
        parts = [(view.segments[at], view.living_in(at)) for at in run]
        rows = [view.layout.segments[at] for at in run]
        if sum(len(living) for _, living in parts):
            name, crcs = write_segment(store.segments_folder, joined(parts))
            store.catalogue.replace(rows, name, crcs)
            count -= len(run) - 1
        else:
            store.catalogue.replace(rows, None, [])
            count -= len(run)
        removed += rows
    retire(store.catalogue, [row.name for row in removed])
    return count


def sweep(store: Store) -> None:
    """Remove files that nothing needs, see the module."""
    assert store.folder is not None
    cache, incoming = store.folder / CACHE, store.folder / INCOMING
    with store.catalogue.undisturbed():
        in_catalogue = store.catalogue.segment_names()
        obsolete = set(replaced(store.catalogue)) - in_catalogue
        stems = {name.partition(".")[0] for name in obsolete}
        for path in files_in(store.segments_folder):
            if path.name.partition(".")[0] in stems:
                _remove(path)
        if obsolete:
            forget_replaced(store.catalogue)
        named_copies = {BASIS} | {copies(name) for name in in_catalogue for copies in (cache_name, sketch_name)}
        for path in files_in(cache):
            if path.name not in named_copies and (path.suffix in (".safetensors", ".part") or path.name in _OUTDATED):
                _remove(path)
        for path in files_in(incoming):
            if path.name in in_catalogue:  # adopted by a process that was then killed
                _remove(path)
    for folder in (store.segments_folder, cache, incoming):
        remove_abandoned(folder)
    _remove_finished_jobs(incoming)


def _remove_finished_jobs(incoming: Path) -> None:
    """Remove the files of jobs whose processes are gone: their lock files, removed last, are unlocked or gone."""
    files = [path for path in files_in(incoming) if path.name.startswith(JOB)]
    for path in files:
        if path.suffix == ".lock":
            remove_unlocked(path, lambda job=path.stem: _remove_job(files, job))  # type: ignore[misc]
    for path in files:
        job = "-".join(path.name.split("-")[:2])
        if path.suffix != ".lock" and not (incoming / f"{job}.lock").exists():
            _remove(path)


def _remove_job(files: Iterable[Path], job: str) -> None:
    for path in files:
        if path.name.startswith(f"{job}-"):
            _remove(path)


def check(store: Store) -> dict[str, str]:
    """Read every item of a folder again and verify its checksum; cached copies of other embeddings are removed.

    Returns:
        What is wrong with each damaged item, by id; empty: everything is as it was written.

    Raises:
        StoreError: The index is closed, or its catalogue is damaged; or a segment cannot be read now, for lack of memory, open
            files or permission.
    """
    store.refuse_if_closed()
    if store.folder is None:
        return {}
    store.catalogue.refuse_damaged()
    sound: set[str] = set()
    while True:
        version = store.view().version
        try:
            with within_memory():
                segments = store.catalogue.layout(version).segments
                damaged = _damaged(store, version, [row for row in segments if row.name not in sound], sound)
            if store.catalogue.oldest <= version:
                return {damage.id: damage.reason for damage in damaged}
        except StoreError:
            if store.fixed is not None or store.catalogue.oldest <= version:
                raise
        # Another process has compacted the index meanwhile: what it wrote must still be read.


def _damaged(store: Store, version: int, segments: Iterable[SegmentRow], sound: set[str] | None = None) -> list[Damage]:
    """Damage to the items of some segments; names of undamaged segments are added to ``sound``."""
    damaged = []
    for row in segments:
        items = {item.position - row.first: item for item in store.catalogue.items(version, within=row)}
        try:
            segment = store.open_segment(row)  # again: an open mapping may be older than the damage
            wrong = segment.damaged([items[at].crc if at in items else None for at in range(row.rows)])
            reasons = {at: f"row {at} of segment {row.name} {reason}" for at, reason in wrong.items()}
            if store.cache_folder:
                with suppress(OSError):
                    segment.drop_foreign_copies(store.cache_folder)
        except UnavailableError:
            raise
        except (StoreError, FileNotFoundError) as error:
            reasons = dict.fromkeys(items, str(error))
        damaged += [Damage(items[at].position, items[at].id, why) for at, why in reasons.items() if at in items]
        if sound is not None and not reasons:
            sound.add(row.name)
    return damaged


def _refusal(store: Store, damaged: list[Damage]) -> StoreError:
    return StoreError(
        f"{len(damaged)} items are damaged, such as {damaged[0].id!r} (finelip index check lists all); remove them with "
        f"{remedies.repair(store.folder)}, or restore their files"
    )


def snapshot(store: Store, folder: str | PathLike[str]) -> None:
    """Copy a folder's index with all its versions, as it is on disk now; the copy can be moved to another machine.

    Args:
        folder: Target folder; new or empty.

    Raises:
        InputError: The index is in memory.
        StoreError: The target folder is not empty, an item is damaged, or writing fails.
    """
    if store.folder is None:
        raise InputError("expected an index with a folder to take a snapshot of, got one in memory")
    catalogue, target = store.catalogue, folder_path("folder", folder)

    def copy_segments() -> None:
        layout = catalogue.layout()
        if damaged := _damaged(store, layout.version, layout.segments):
            raise _refusal(store, damaged)
        in_catalogue = {row.name.partition(".")[0] for row in layout.segments}
        for path in files_in(store.segments_folder):
            if path.name.partition(".")[0] in in_catalogue:
                _copy(path, target / SEGMENTS / path.name)

    try:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise StoreError(f"expected a new or empty folder for a snapshot, got {target} with files in it")
        (target / SEGMENTS).mkdir()
        try:
            catalogue.copy(target / CATALOGUE, copy_segments)  # last: until then, the folder is not an index
        except BaseException:
            for path in [*files_in(target / SEGMENTS), target / CATALOGUE]:
                path.unlink(missing_ok=True)
            (target / SEGMENTS).rmdir()
            raise
    except OSError as error:
        raise StoreError(f"cannot write the snapshot {target}: {write_error(target, error)}") from None


def _copy(path: Path, target: Path) -> None:
    with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as source, target.open("xb") as file:
        shutil.copyfileobj(source, file, 1 << 24)
        file.flush()
        os.fsync(file.fileno())


def _runs(view: View) -> list[list[int]]:
    """Neighbouring segments that compaction merges: small ones, and any with gaps."""
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


def _recent(view: View) -> list[int]:
    """The newest segments, as long as each is at most twice as large as all newer ones together."""
    run: list[int] = []
    size = 0
    for at in reversed(range(len(view.segments))):
        segment = view.segments[at]
        bytes_ = len(segment) * segment.bytes_per_item
        if run and (bytes_ > _GROWTH * size or size + bytes_ > _FULL):
            break
        run.append(at)
        size += bytes_
    return run[::-1]


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot remove {path}: {error.strerror}") from None


def _size(folder: Path) -> int:
    size = 0
    for path in (path for name in (SEGMENTS, CACHE, INCOMING) for path in files_in(folder / name)):
        with suppress(FileNotFoundError):
            size += path.lstat().st_size
    return size
