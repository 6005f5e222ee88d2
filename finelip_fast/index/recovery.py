"""Recover items that only segments and their lists still hold, and replace a damaged catalogue.

A segment that nothing names belongs to a change that never finished, or to one whose record was lost with a damaged log. A
damaged catalogue is replaced by its copy from the last upkeep, and later segments are recovered. Items deleted since that
upkeep come back with them, because only the catalogue recorded the deletions.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from os import PathLike
from pathlib import Path

import torch

from finelip_fast._arguments import folder_path
from finelip_fast._files import sync_folder, write_whole
from finelip_fast.errors import StoreError
from finelip_fast.index import remedies, upkeep
from finelip_fast.index.catalogue import Catalogue, SegmentRow, read_spec
from finelip_fast.index.lists import Listed, read_list
from finelip_fast.index.orphans import deleted, retire, unnamed_lists
from finelip_fast.index.segments import Segment, joined, write_segment
from finelip_fast.index.spec import CATALOGUE, SEGMENTS
from finelip_fast.index.store import Store

_COPY, _DAMAGED = "catalogue.copy.sqlite", "catalogue.damaged.sqlite"


def lost(store: Store) -> dict[str, int]:
    """Number of lost items in each segment that nothing names, in the order in which the segments were added.

    Items that are in the index with the same embedding, or that were deleted since, are not lost.
    """
    catalogue = store.catalogue
    counts = {}
    for name, listed in unnamed_lists(catalogue).items():
        items = catalogue.at(catalogue.find(listed.ids).values(), catalogue.version) or {}
        known, dropped = {(item.id, item.crc) for item in items.values()}, deleted(catalogue).get(name, ())
        rows = enumerate(zip(listed.ids, listed.crcs, strict=True))
        if count := sum(item not in known and row not in dropped for row, item in rows):
            counts[name] = count
    return counts


def take_back(store: Store) -> list[str]:
    """Add the items of lost segments again in their original order, except those whose ids are in the index or were deleted.

    Segments of which nothing is needed any more are removed.

    Returns:
        The ids that were added.

    Raises:
        StoreError: Writing fails; what was added before stays.
    """
    store.refuse_if_fixed()
    catalogue = store.catalogue
    added: list[str] = []
    lists = unnamed_lists(catalogue)
    for name, listed in lists.items():
        with catalogue.undisturbed():
            if name in catalogue.segment_names():  # its writer was only slow
                continue
            known, dropped = catalogue.find(listed.ids), deleted(catalogue).get(name, ())
            absent = [row for row, item in enumerate(listed.ids) if item not in known and row not in dropped]
            new: list[int] = []
            if absent:
                try:
                    segment = store.open_segment(SegmentRow(name, 0, len(listed.ids)))
                    damaged = segment.damaged(listed.crcs)
                except (StoreError, FileNotFoundError):
                    continue
                if new := [row for row in absent if row not in damaged]:
                    added += _add_again(store, segment, listed, new)
            if new == absent and len(new) < len(listed.ids):
                retire(catalogue, [name])
    store.reload()
    if lists:
        upkeep.sweep(store)
    return added


def _add_again(store: Store, segment: Segment, listed: Listed, rows: list[int]) -> list[str]:
    """Add items of a segment that nothing names, and return their ids; if these are all of its items, it is used as it is."""
    ids, texts = [listed.ids[row] for row in rows], [listed.texts[row] for row in rows]
    with store.catalogue.changing():
        if len(rows) == len(listed.ids):
            store.catalogue.add(ids, segment.name, listed.crcs, texts)
        else:
            name, crcs = write_segment(store.segments_folder, joined([(segment, torch.tensor(rows))]))
            store.catalogue.add(ids, name, crcs, texts)
    return ids


def keep_copy(store: Store) -> None:
    """Store a copy of the catalogue beside it, for :func:`restore`.

    Raises:
        WriteError: Writing fails.
    """
    if store.folder is not None:
        write_whole(store.folder / _COPY, store.catalogue.copy)


def restore(folder: str | PathLike[str]) -> Path:
    """Replace an index's catalogue with its copy from the last upkeep, or else with an empty catalogue of the same spec.

    No process may have the index open. To recover what the new catalogue lacks, run
    :meth:`finelip_fast.index.Index.repair` afterwards. Without a copy, a warning says what cannot be recovered.

    Returns:
        Path to which the previous catalogue was moved.

    Raises:
        InputError: ``folder`` is not a path.
        StoreError: There is no index, or neither a copy nor a list that holds its spec.
        WriteError: Writing fails.
    """
    folder = folder_path("folder", folder)
    path, copy, damaged = folder / CATALOGUE, folder / _COPY, folder / _DAMAGED
    if not (path.exists() or copy.exists() or (folder / SEGMENTS).exists()):
        raise StoreError(f"there is no index at {folder}: check the path")
    listed = None
    if copy.exists():
        read_spec(copy)  # raises if it is damaged
    elif (listed := _any_list(folder / SEGMENTS)) is None:
        raise StoreError(f"found neither {copy} nor a list of a segment in {folder / SEGMENTS}; restore a snapshot")
    for ending in ("", "-wal", "-shm", "-journal"):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{ending}", f"{damaged}{ending}")
    if listed is None:
        write_whole(path, lambda target: target.write_bytes(copy.read_bytes()))
    else:
        spec = {key: value for key, value in listed.spec.items() if key not in ("source", "version")}
        Catalogue(path, spec, source=str(listed.spec.get("source"))).close()
    sync_folder(folder)
    if listed is not None:
        warnings.warn(
            f"{folder} has no copy of its catalogue, which maintenance makes: items can be recovered, but the root of their "
            f"pictures, tuned settings, sketches and sped-up fields are lost; set the root with {remedies.move_root(folder)}",
            stacklevel=2,
        )
    return damaged


def _any_list(folder: Path) -> Listed | None:
    for path in sorted(folder.glob("*.items")):
        with suppress(StoreError):
            return read_list(folder, path.name)
    return None
