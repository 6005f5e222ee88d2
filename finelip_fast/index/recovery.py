"""Taking back what only segments and their lists tell, and making a damaged catalogue anew.

A segment that nothing names is of a change that never ended, or of one whose record was lost with a damaged log. A catalogue
that is damaged is replaced by its copy of the last upkeep, and later segments are taken back. What was deleted since that
upkeep comes back with them: that it was deleted stood in the catalogue alone.
"""

from __future__ import annotations

import os
from contextlib import suppress
from os import PathLike
from pathlib import Path

import torch

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
    """Whole segments that nothing names, with what they hold, in the order in which they came.

    Those whose items are all there, with the same embeddings, are left out.
    """
    catalogue = store.catalogue
    result = {}
    for name in upkeep.unnamed(store):
        try:
            listed = read_list(store.segments_folder, name)
        except FineLIPError:  # of a writer that was killed before it was whole
            continue
        items = catalogue.at(catalogue.find(listed.ids).values(), catalogue.version) or {}
        known = {(item.id, item.crc) for item in items.values()}
        if not known.issuperset(zip(listed.ids, listed.crcs, strict=True)):
            result[name] = listed
    return dict(sorted(result.items(), key=lambda pair: pair[1].version))


def take_back(store: Store) -> list[str]:
    """Add the items of lost segments again, in the order in which they came; those whose ids are there stay as they are.

    Returns:
        The ids that were added.

    Raises:
        StoreError: The disk refuses; what was added before stays.
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
    """Keep a copy of the catalogue beside it, for :func:`restore`.

    Raises:
        WriteError: The disk refuses.
    """
    if store.folder is not None:
        write_whole(store.folder / _COPY, store.catalogue.copy)


def restore(folder: str | PathLike[str]) -> Path:
    """Put the copy of the last upkeep in the place of an index's catalogue; without one, an empty catalogue of the same spec.

    What is not in it is then to be taken back, by :meth:`finelip_fast.index.Index.repair`. No process may have the index open.

    Returns:
        Where the catalogue that was there lies now.

    Raises:
        StoreError: There is neither a copy nor a list that tells what the index is.
        WriteError: The disk refuses.
    """
    folder = Path(folder)
    path, copy, damaged = folder / CATALOGUE, folder / _COPY, folder / _DAMAGED
    listed = None
    if copy.exists():
        read_spec(copy)  # raises what is wrong with it
    elif (listed := _any_list(folder / SEGMENTS)) is None:
        raise StoreError(f"there is neither {copy} nor a list of a segment in {folder / SEGMENTS}: restore a snapshot")
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
