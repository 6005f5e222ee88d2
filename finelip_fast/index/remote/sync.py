"""Sync a store on object storage and index folders: :func:`push` and :func:`pull` transfer only what differs.

They take about 1 GiB of memory, however large the collection is.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from os import PathLike
from typing import Any

from finelip_fast._arguments import whole_number
from finelip_fast.errors import InputError, StoreError
from finelip_fast.index import remedies
from finelip_fast.index.arrays import checksums
from finelip_fast.index.catalogue import Item
from finelip_fast.index.index import Index
from finelip_fast.index.reader import spec_differences
from finelip_fast.index.remote.lance import LanceStore
from finelip_fast.index.remote.rows import Keys, refuse_damaged

_COPY = "copy"  # key of the note in the catalogue of a folder that pull fills
# State of an item of one side compared with the other side.
_ABSENT, _SAME, _OTHER = 0, 1, 2


def push(index: Index, store: LanceStore, *, remove: bool = True, progress: bool = False) -> dict[str, int]:
    """Make a store equal to an index: add what it lacks, replace what differs, and remove what the index lacks.

    Items differ by their checksums, of embedding or metadata. Every change has up to 256 MiB of embeddings or 8,192 items; an
    interrupted push continues when it is run again. What others write to the store meanwhile is not seen.

    Args:
        index: Index in memory or in a folder, in float16.
        store: Store with the same spec.
        remove: Whether to remove what the index lacks; False: it stays, so that several folders can be pushed to one store.
        progress: Whether to show a progress bar.

    Returns:
        Number of items ``added``, ``replaced``, ``removed`` and ``unchanged``, and the resulting ``version`` of the store.

    Raises:
        InputError: The index has another spec or is open at an older version, or UTF-8 cannot hold an id. Or, with ``remove``,
            the index is a part of a store or was not pulled to the end, and the push would remove all that it lacks.
        StoreError: The store cannot be read or written, an item of the index is damaged, or another process compacts the
            index.
    """
    from tqdm import tqdm

    _check_pushed(index, store, remove)
    counts: dict[str, int] = dict.fromkeys(("added", "replaced", "removed", "unchanged"), 0)
    local, limit = _Local(index, store), store.rows_of_a_change
    absent: list[str] = []
    for keys in store.keys(store.dataset()):
        states = local.compare(keys)
        counts["unchanged"] += states.count(_SAME)
        absent += [item for item, state in zip(keys.ids, states, strict=True) if state == _ABSENT and remove]
        if len(absent) >= limit:
            store.remove(absent)
            counts["removed"] += len(absent)
            absent.clear()
    store.remove(absent)
    counts["removed"] += len(absent)
    with tqdm(total=len(local.view), unit="item", disable=not progress, mininterval=0.5) as bar:
        # Kept apart, since only added items keep their order.
        waiting: dict[int, list[Item]] = {_ABSENT: [], _OTHER: []}
        for item in local.items():
            bar.update()
            state = local.states[item.position]
            if state == _SAME:
                continue
            waiting[state].append(item)
            if len(waiting[state]) == limit:
                counts["added" if state == _ABSENT else "replaced"] += limit
                local.send(waiting[state], store.add if state == _ABSENT else store.upsert)
                waiting[state].clear()
        for state, items in waiting.items():
            counts["added" if state == _ABSENT else "replaced"] += len(items)
            local.send(items, store.add if state == _ABSENT else store.upsert)
    return counts | {"version": store.version}


def pull(
    store: LanceStore, folder: str | PathLike[str], *, part: tuple[int, int] = (0, 1), progress: bool = False
) -> dict[str, int]:
    """Make an index folder equal to one version of a store; everything else in the folder is removed.

    Items differ by their checksums, of embedding or metadata; only what differs is transferred, in changes of up to 256 MiB of
    embeddings or 8,192 items. New items come after the existing ones, in the order of the store. An interrupted pull continues
    when it is run again. Searches of the folder meanwhile see some of the changes.

    Args:
        store: Store to pull, at its newest version or the one that it is open at.
        folder: Folder of the index; created if missing, otherwise one that was pulled.
        part: Part ``(i, n)`` of the items, whose ids have ``crc32(id in UTF-8) % n == i``, so that each of ``n`` machines
            holds a shard.
        progress: Whether to show a progress bar.

    Returns:
        Number of items ``added``, ``replaced``, ``removed`` and ``unchanged``, and the ``version`` of the store.

    Raises:
        InputError: The part is invalid.
        StoreError: The folder holds another index or one that was not pulled, either side cannot be read or written, or
            another process changes the folder meanwhile. Or rows of the store are damaged: the message names them. They are
            left out, and the folder keeps what it had of them; everything else was done.
    """
    from tqdm import tqdm

    number, parts = _checked_part(part)
    counts: dict[str, int] = dict.fromkeys(("added", "replaced", "removed", "unchanged"), 0)
    dataset, first = store.dataset(), 0
    version = int(dataset.version)
    missing: dict[str, tuple[int, int]] = {}  # number in the store, and state
    damaged: list[str] = []
    limit = store.rows_of_a_change
    with closing(Index(store.spec, folder, source=store.source)) as index:
        note = {"store": store.uri, "part": [number, parts]}
        _mark_copy(index, folder, {**note, "version": None})
        local = _Local(index, store)
        with tqdm(total=len(store), unit="item", disable=not progress, mininterval=0.5) as bar:
            for keys in store.keys(dataset):
                in_part = [at for at, item in enumerate(keys.ids) if zlib.crc32(item.encode()) % parts == number]
                states = local.compare(keys.only(in_part))
                for at, state in zip(in_part, states, strict=True):
                    counts["unchanged"] += state == _SAME
                    if keys.ids[at] in missing:
                        raise _twice(keys.ids[at], store.uri)
                    if state != _SAME:
                        missing[keys.ids[at]] = first + at, state
                    if len(missing) == limit:
                        damaged += _transfer(store, dataset, index, missing, counts)
                first += len(keys.ids)
                bar.update(len(keys.ids))
            damaged += _transfer(store, dataset, index, missing, counts)
        absent = [item.id for item in local.items() if local.states[item.position] == _ABSENT]
        index.delete(absent)
        counts["removed"] = len(absent)
        if not damaged:
            index._store.catalogue.keep(_COPY, {**note, "version": version})
    refuse_damaged(damaged, store.uri)
    return counts | {"version": version}


def _checked_part(part: Any) -> tuple[int, int]:
    try:
        number, parts = (whole_number("a number of the part", value, least=0) for value in part)
        if number < parts:
            return number, parts
    except (TypeError, ValueError):
        pass
    raise InputError(f"expected a part (i, n) of integers with 0 <= i < n, got {part!r:.80}")


def _transfer(
    store: LanceStore, dataset: Any, index: Index, missing: dict[str, tuple[int, int]], counts: dict[str, int]
) -> list[str]:
    """Write missing rows to an index and clear ``missing``; return the ids of damaged rows."""
    if not missing:
        return []
    batch = store.take(dataset, [number for number, _ in missing.values()])
    damaged = store.damaged(batch)
    wrong = set(damaged)
    sound = [at for at, item in enumerate(batch.ids) if item not in wrong]
    ids = [batch.ids[at] for at in sound]
    tokens = batch.tokens[sound] if wrong else batch.tokens
    metadata = batch.metadata(store.uri, sound)
    try:
        index.upsert(ids, tokens, metadata)
    except InputError as error:
        raise StoreError(f"an item of the store at {store.uri} cannot be kept in a folder: {error}") from None
    replaced = sum(missing[item][1] == _OTHER for item in ids)
    counts["replaced"] += replaced
    counts["added"] += len(ids) - replaced
    missing.clear()
    return damaged


class _Local:
    """An index to compare with a store.

    Attributes:
        states: States of the items that the index had at first, by position; one byte each, the only data that grows with
            the collection.
    """

    def __init__(self, index: Index, store: LanceStore) -> None:
        self.index, self.view, self._store = index, index._store.view(), store
        self.states = bytearray(max((row.first + row.rows for row in self.view.layout.segments), default=0))

    def compare(self, keys: Keys) -> list[int]:
        """Compare rows of the store with the index; record and return the state of each.

        Raises:
            StoreError: Another process has changed the index, or an id occurs twice.
        """
        positions = self.index._store.catalogue.find(keys.ids)
        items = self.index._store.catalogue.at(positions.values(), self.view.version)
        if items is None:
            raise StoreError("another process is compacting the index; try again")
        local_keys = self._keys_of(items.values())
        states = []
        for item, *right in zip(*keys, strict=True):
            position = positions.get(item)
            if position is None:
                states.append(_ABSENT)
                continue
            if position >= len(self.states) or self.states[position] != _ABSENT:
                raise _twice(item, self._store.uri)
            self.states[position] = _SAME if local_keys[position] == tuple(right) else _OTHER
            states.append(self.states[position])
        return states

    def _keys_of(self, items: Iterable[Item]) -> dict[int, tuple[int, int]]:
        """Checksums of embedding and metadata, by position; computed if an index in memory or an old one stores none."""
        items = list(items)
        crcs = {item.position: item.crc for item in items}
        missing = sorted(position for position, crc in crcs.items() if crc is None)
        if missing:
            rows = self.view.read(self.view.rows_at(missing))
            crcs |= dict(zip(missing, checksums({"tokens": rows}), strict=True))
        keys = {}
        for item in items:
            crc = crcs[item.position] or 0
            keys[item.position] = crc, self._store.checksum(item.id, crc, json.dumps(item.metadata))
        return keys

    def items(self) -> Iterator[Item]:
        """Yield the items that the index had at first, in order."""
        for row in self.view.layout.segments:
            yield from self.index._store.catalogue.items(self.view.version, within=row)

    def send(self, items: Sequence[Item], put: Callable[..., None]) -> None:
        """Add or upsert items, after verifying their checksums.

        Raises:
            StoreError: An item is damaged.
        """
        try:
            tokens = self.view.read(self.view.rows_at([item.position for item in items])).cpu()
        except FileNotFoundError:
            raise StoreError("another process is compacting the index; try again") from None
        crcs = checksums({"tokens": tokens})
        damaged = [item.id for item, crc in zip(items, crcs, strict=True) if item.crc not in (None, crc)]
        if damaged:
            raise StoreError(
                f"{len(damaged)} items of the index are damaged, such as {damaged[0]!r}, and were not pushed; remove "
                f"them with {remedies.repair(self.index.folder)}, or restore their files"
            )
        if items:
            put([item.id for item in items], tokens, [item.metadata for item in items])


def _check_pushed(index: Index, store: LanceStore, remove: bool) -> None:
    if spec_differences(asdict(store.spec), asdict(index.spec)):
        raise InputError(f"expected an index of the store's {store.spec}, got {index.spec}")
    if index._store.fixed is not None:
        raise InputError(
            "expected the newest version of an index to push, got an older one; open its folder without version"
        )
    copy = index._store.catalogue.note(_COPY)
    if not copy or not remove:
        return
    try:
        (number, parts), version, store_of_copy = copy["part"], copy["version"], copy["store"]
        is_part = parts > 1
    except (TypeError, ValueError, LookupError):
        raise StoreError(
            f"the catalogue of {index.folder} has an invalid record of the last pull, {copy!r:.80}; pull again"
        ) from None
    if is_part or version is None:
        content = f"part {number} of {parts}" if is_part else "what an interrupted pull left"
        raise InputError(
            f"expected a complete index to push, got {content} of {store_of_copy}; everything else would be deleted from "
            f"{store.uri}: pull all of it, or keep what the index lacks with remove=False (--keep)"
        )


def _mark_copy(index: Index, folder: str | PathLike[str], note: dict[str, Any]) -> None:
    """Note that a folder is a copy; refuse one whose items may exist nowhere else."""
    if index._store.catalogue.note(_COPY) is None and len(index):
        raise StoreError(
            f"expected a new folder or one that was pulled, got {os.fspath(folder)} with {len(index)} items that a pull would "
            "replace; push them first, and pull into another folder"
        )
    index._store.catalogue.keep(_COPY, note)


def _twice(item: str, uri: str) -> StoreError:
    return StoreError(
        f"{item!r} is in the store at {uri} twice, or another process is changing the index; try again, and if the error "
        "persists, delete it with LanceStore.delete and push it again"
    )
