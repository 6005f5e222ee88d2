"""Recover items that only segments and their lists still hold, and replace a damaged catalogue.

A segment that nothing names belongs to a change that never finished, or to one whose record was lost with a damaged log. A
damaged catalogue is replaced by its copy from the last upkeep, and later segments are recovered. Items deleted since that
upkeep come back with them, because only the catalogue recorded the deletions.
"""

from __future__ import annotations

import os
from contextlib import suppress
from os import PathLike
from pathlib import Path

import torch

from finelip_fast._arguments import folder_path
from finelip_fast._files import sync_folder, write_whole
from finelip_fast.errors import FineLIPError, StoreError
from finelip_fast.index import upkeep
from finelip_fast.index.catalogue import Catalogue, SegmentRow, read_spec
from finelip_fast.index.lists import Listed, read_list
from finelip_fast.index.segments import joined, write_segment
from finelip_fast.index.spec import CATALOGUE, SEGMENTS
from finelip_fast.index.store import Store

_COPY, _DAMAGED = "catalogue.copy.sqlite", "catalogue.damaged.sqlite"


def lost(store: Store) -> dict[str, Listed]:
    """Complete segments that nothing names, with their lists, in the order in which they were added.

    Segments whose items are all in the index, with the same embeddings, are left out.
    """
    catalogue = store.catalogue
    result = {}
    for name in upkeep.unnamed(store):
        try:
            listed = read_list(store.segments_folder, name)
        except FineLIPError:  # from a writer that was killed before it was complete
            continue
        items = catalogue.at(catalogue.find(listed.ids).values(), catalogue.version) or {}
        known = {(item.id, item.crc) for item in items.values()}
        if not known.issuperset(zip(listed.ids, listed.crcs, strict=True)):
            result[name] = listed
    return dict(sorted(result.items(), key=lambda pair: pair[1].version))


def take_back(store: Store) -> list[str]:
    """Add the items of lost segments again in their original order, except those whose ids are in the index.

    Returns:
        The ids that were added.

    Raises:
        StoreError: Writing fails; what was added before stays.
    """
    store.refuse_if_fixed()
    added: list[str] = []
    for name, listed in lost(store).items():
        with store.catalogue.changing():
            if name in {row.name for row in store.catalogue.layout().segments}:  # its writer was only slow
                continue
            try:
                segment = store.open_segment(SegmentRow(name, 0, len(listed.ids)))
                damaged = set(segment.damaged(listed.crcs))
            except (StoreError, FileNotFoundError):
                continue
            known = store.catalogue.find(listed.ids)
            new = [at for at, item in enumerate(listed.ids) if item not in known and at not in damaged]
            ids, texts = [listed.ids[at] for at in new], [listed.texts[at] for at in new]
            if len(new) == len(listed.ids):
                store.catalogue.add(ids, name, listed.crcs, texts)
            elif new:
                segment_name, crcs = write_segment(store.segments_folder, joined([(segment, torch.tensor(new))]))
                store.catalogue.add(ids, segment_name, crcs, texts)
            if len(new) < len(listed.ids) and not damaged:
                upkeep.retire(store, [name])
        added += ids
    store.reload()
    return added


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
    :meth:`finelip_fast.index.Index.repair` afterwards.

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
    return damaged


def _any_list(folder: Path) -> Listed | None:
    for path in sorted(folder.glob("*.items")):
        with suppress(StoreError):
            return read_list(folder, path.name)
    return None
