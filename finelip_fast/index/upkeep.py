"""Looking after an index folder: checking, repairing, compacting, copying."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from itertools import chain
from os import PathLike
from pathlib import Path

from finelip_fast._errors import InputError, StoreError
from finelip_fast.index import faiss
from finelip_fast.index.segments import joined, write_segment
from finelip_fast.index.store import CACHE, CATALOGUE, INCOMING, SEGMENTS, Store
from finelip_fast.index.view import View

# What workers have left in ``incoming`` for so many seconds, no one is going to adopt.
_ABANDONED = 7 * 86400
# What compaction makes of small segments, in bytes; one of at least half of it is left alone.
_FULL = 1 << 29


def maintain(store: Store) -> dict[str, int]:
    """Put a folder in order: few segments without gaps, and no file that nothing needs.

    Older versions can no longer be opened afterwards. The order of items and the results of searches stay.

    Returns:
        ``segments`` before and ``after``, ``strays`` (files of changes that never ended), and ``bytes`` that became free.

    Raises:
        StoreError: As :meth:`add`; or an item is damaged, which a new checksum would hide.
    """
    store.refuse_if_fixed()
    if store.folder is None:
        return {"segments": 0, "after": 0, "strays": 0, "bytes": 0}
    size = _size(store.folder)
    with store.lock, store.catalogue.changing():
        view = store.load()
        before = [row.name for row in view.layout.segments]
        strays = _remove(
            store.segments_folder, keep={*before, *store.damaged}
        )  # no one is writing: who does is in here
        if damaged := _damaged(store, view, chain(*_runs(view))) | _lost(store, view):
            raise StoreError(
                f"{len(damaged)} items are damaged, {next(iter(damaged))!r} among them (finelip index check "
                "names all): take them out with finelip index repair, or restore their files"
            )
        after = _rewrite(store, view)
        strays += _remove_abandoned(store.folder / INCOMING)
    store.reload()
    _sweep(store)
    return {"segments": len(before), "after": after, "strays": strays, "bytes": size - _size(store.folder)}


def repair(store: Store) -> dict[str, str]:
    """Take out all items that are damaged or whose segments are gone, and keep the others; index them again then.

    Older versions can no longer be opened afterwards.

    Returns:
        What was wrong with each, by its id.

    Raises:
        StoreError: The disk refuses; nothing was taken out.
    """
    store.refuse_if_fixed()
    with store.lock:
        damaged = check(store)
        if not damaged:
            return {}
        with store.catalogue.changing():
            store.catalogue.remove(store.catalogue.find(damaged).values())
            _rewrite(store, store.load())
        store.reload()
        _sweep(store)
    return damaged


def _rewrite(store: Store, view: View) -> int:
    """Inside a change: compact what gains by it; how many segments there are then."""
    lost = [row for row in store.catalogue.layout().segments if row.name in store.damaged]
    store.catalogue.forget()
    for row in lost:
        store.catalogue.replace([row], None, [])
    count = len(view.segments)
    for run in _runs(view):
        parts = [(view.segments[at], view.living_in(at)) for at in run]
        rows = [view.layout.segments[at] for at in run]
        if sum(len(living) for _, living in parts):
            name, crcs = write_segment(store.segments_folder, joined(parts))
            store.catalogue.replace(rows, name, crcs)
            count -= len(run) - 1
        else:
            store.catalogue.replace(rows, None, [])
            count -= len(run)
    return count


def _sweep(store: Store) -> None:
    """Remove the files that the newest version does not need, after a change has made it so."""
    assert store.folder is not None
    with store.catalogue.undisturbed():
        names = {row.name for row in store.catalogue.layout().segments}
        _remove(store.segments_folder, keep=names)
        _remove(store.folder / CACHE, keep={*(Path(name).stem for name in names), Path(faiss.FILE).stem})


def check(store: Store) -> dict[str, str]:
    """Read every item of a folder again and compare it with its checksum.

    Returns:
        What is wrong with each damaged item, by its id; empty: all is as it was written.
    """
    if store.folder is None:
        return {}
    view = store.view()
    return _damaged(store, view, range(len(view.segments))) | _lost(store, view)


def _lost(store: Store, view: View) -> dict[str, str]:
    """The items of segments that could not be opened."""
    rows = [row for row in store.catalogue.layout(view.version).segments if row.name in store.damaged]
    return {
        item.id: store.damaged[row.name] for row in rows for item in store.catalogue.items(view.version, within=row)
    }


def _damaged(store: Store, view: View, segments: Iterable[int]) -> dict[str, str]:
    damaged: dict[str, str] = {}
    for at in segments:
        row = view.layout.segments[at]
        items = {item.position - row.first: item for item in store.catalogue.items(view.version, within=row)}
        try:
            segment = store.open_segment(row)  # anew: what was mapped may be older than the damage
            wrong = segment.damaged([items[n].crc if n in items else None for n in range(row.rows)])
            reason = "row {} of segment {} is not what was written"
        except (StoreError, FileNotFoundError) as error:
            wrong, reason = list(items), str(error).replace("{", "{{").replace("}", "}}")
        damaged |= {items[one].id: reason.format(one, row.name) for one in wrong if one in items}
    return damaged


def snapshot(store: Store, folder: str | PathLike[str]) -> None:
    """Copy a folder's index, all its versions, as it is on the disk now; it can be taken to another machine.

    Args:
        folder: Where to; new or empty.

    Raises:
        InputError: An index in memory.
        StoreError: A folder that is not empty, or the disk refuses.
    """
    if store.folder is None:
        raise InputError("expected an index with a folder to take a snapshot of, got one in memory")
    catalogue, target = store.catalogue, Path(folder)

    def copy_segments() -> None:
        for row in catalogue.layout().segments:
            shutil.copyfile(store.segments_folder / row.name, target / SEGMENTS / row.name)
            with (target / SEGMENTS / row.name).open("rb") as file:
                os.fsync(file.fileno())

    try:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise StoreError(f"expected a new or empty folder for a snapshot, got {target} with files in it")
        (target / SEGMENTS).mkdir()
        catalogue.copy(target / CATALOGUE, copy_segments)  # last: before, the folder is no index
    except OSError as error:
        raise StoreError(f"cannot write the snapshot {target}: {error.strerror}") from None


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
    return sum(path.stat().st_size for path in folder.rglob("*") if path.parent.name in (SEGMENTS, CACHE, INCOMING))
