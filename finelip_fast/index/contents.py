"""What an index holds, as its catalogue and its segments tell."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finelip_fast._arguments import strings, whole_number
from finelip_fast.errors import StoreError
from finelip_fast.index import remedies
from finelip_fast.index.catalogue import Item
from finelip_fast.index.fields import Field, fields_of
from finelip_fast.index.pages import Cursor
from finelip_fast.index.store import Store
from finelip_fast.index.view import View

_ROOT = "root"
_ITEMS_AT_ONCE = 8192
_MOST_SAMPLED = 20_000  # items whose fields are looked at


class Contents:
    """The items of a store, and what is known of them; :class:`finelip_fast.Index` says what each attribute is."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._fields: tuple[View, list[Field]] | None = None
        self.spec, self.source, self.device, self.folder = store.spec, store.source, store.device, store.folder

    def __repr__(self) -> str:
        where = "in memory" if self.folder is None else f"in {str(self.folder)!r}"
        try:
            held = f"{len(self)} items"
        except StoreError:
            held = "cannot be read" if self._store.is_open else "closed"
        return f"<{type(self).__name__} {where}: {held}, [{self.spec.tokens}, {self.spec.width}] {self.spec.dtype}>"

    @property
    def damaged(self) -> dict[str, str]:
        """Why segments cannot be read, by their names; empty without ``skip_damaged``."""
        return self._store.damaged

    @property
    def version(self) -> int:
        """Counts the changes up to what is searched."""
        return self._store.view().version

    def __len__(self) -> int:
        return len(self._store.view())

    @property
    def total(self) -> int:
        """Number of items, with those that ``skip_damaged`` leaves out."""
        return self._store.catalogue.count(self.version)

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str) and bool(self._store.catalogue.find([item]))

    def items(self, *, where: str | None = None) -> Iterator[Item]:
        """What the catalogue knows of each, in order of insertion; reads as it goes.

        Args:
            where: Filter on the metadata, see :mod:`finelip_fast.index.filters`; None: all items.

        Raises:
            InputError: A filter that cannot be read.
            StoreError: The catalogue is damaged, or another process has compacted the index meanwhile.
        """
        view, catalogue = self._store.view(), self._store.catalogue
        if where is None:
            for row in view.layout.segments:
                yield from catalogue.items(view.version, within=row)
            return
        positions = iter(catalogue.matching(where, view.version))
        while part := list(islice(positions, _ITEMS_AT_ONCE)):
            items = catalogue.at(part, view.version)
            if items is None:
                raise StoreError(f"the index at {self.folder} was compacted while it was read: read it again")
            yield from (items[position] for position in part)

    def page(
        self, *, where: str | None = None, limit: int = 100, after: str | None = None
    ) -> tuple[list[Item], str | None]:
        """A part of :meth:`items`, found without reading what lies before it.

        Pages follow the order of insertion: what is added or replaced between two of them comes at the end, and what is
        deleted is left out. After a compaction the listing goes on behind the item that was the last, if that is still there.

        Args:
            where: Filter on the metadata; None: all items.
            limit: Number of items of a page.
            after: What came with the page before; None: the first page.

        Returns:
            The items, and what to pass as ``after`` for the next page; None: this is the last.

        Raises:
            InputError: A filter that cannot be read, an ``after`` that no page gave, or one whose place was lost: the index
                was compacted, and the last item of that page is gone.
            StoreError: The index is closed, or cannot be read.
        """
        limit, cursor = whole_number("limit", limit, most=_ITEMS_AT_ONCE), None if after is None else Cursor.read(after)
        items, end = self._store.catalogue.page(where, limit, cursor, self._store.fixed)
        return items, None if end is None else str(end)

    def fields(self) -> list[Field]:
        """Fields of the metadata that filters can compare, with their values or ends, those of most items first.

        Of more than 20,000 items, that many are looked at, evenly spread: rare values and far ends may then be missing. What
        files say of themselves and nobody looks for, such as their hashes, is left out. The result is kept until the index
        changes.

        Raises:
            StoreError: The index is closed, or cannot be read.
        """
        while True:
            view = self._store.view()
            if self._fields is not None and self._fields[0] is view:
                return self._fields[1]
            numbers = (
                torch.linspace(0, len(view) - 1, min(len(view), _MOST_SAMPLED), dtype=torch.float64).round().long()
            )
            positions = view.positions(numbers if view.living is None else view.living[numbers]).tolist()
            fields = fields_of(self._metadata_at(positions, view.version))
            if self._store.catalogue.oldest <= view.version:  # not compacted meanwhile
                self._fields = view, fields
                return fields

    def _metadata_at(self, positions: Sequence[int], version: int) -> Iterator[dict[str, Any]]:
        """Metadata of the items at positions of a version, as long as that can be read."""
        for start in range(0, len(positions), _ITEMS_AT_ONCE):
            items = self._store.catalogue.at(positions[start : start + _ITEMS_AT_ONCE], version)
            if items is None:
                return
            yield from (item.metadata for item in items.values())

    @property
    def ids(self) -> list[str]:
        """Ids of all items, in order of insertion."""
        return [item.id for item in self.items()]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """Metadata of all items, in order of insertion."""
        return [item.metadata for item in self.items()]

    @property
    def embeddings(self) -> Tensor:
        """Embeddings ``[N, L, D]`` of all items, in order of insertion, copied into memory.

        They are float16, or float32 where the index keeps int8.
        """
        view = self._store.view()
        empty = torch.empty(0, self.spec.tokens, self.spec.width, dtype=torch.float16)
        pieces = [segment.embeddings(slice(None)) for segment in view.segments]
        rows = torch.cat(pieces or [empty])
        return (rows if view.living is None else rows[view.living]).to(self.device)

    def embeddings_of(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of those of the ids that are in the index, each float32 ``[L, D]`` of unit rows, to search with.

        Raises:
            InputError: An id that is no string.
            StoreError: An embedding is damaged, or the index is closed or cannot be read.
        """
        ids = strings("ids", ids)
        while True:
            view = self._store.view()
            items = self._store.catalogue.living(ids, view.version)
            if items is None:
                continue  # compacted meanwhile
            rows = view.rows_at(sorted(items))  # what is newer than the view is left out
            if not len(rows):
                return {}
            positions = view.positions(rows).tolist()
            try:
                view.refuse_shortened()
                view.refuse_damaged(items[position] for position in positions)
                embedded = view.read(rows).float()
            except FileNotFoundError as error:
                if self._store.view() is view:
                    raise self._missing(error) from None
                continue
            embedded = torch.nn.functional.normalize(embedded, dim=-1).to(self.device)
            return {items[position].id: row for position, row in zip(positions, embedded, strict=True)}

    def _missing(self, error: FileNotFoundError) -> StoreError:
        return StoreError(f"segment {error.filename} is missing: restore it, or {remedies.repair(self.folder)}")

    def present(self, ids: Sequence[str]) -> set[str]:
        """The given ids that are in the index.

        Raises:
            InputError: An id that is no string.
            StoreError: The index is closed, or cannot be read.
        """
        return set(self._store.catalogue.find(strings("ids", ids)))

    def get(self, ids: Sequence[str]) -> dict[str, Item]:
        """What the catalogue knows of the given ids that are in the index, by these.

        Raises:
            InputError: An id that is no string.
            StoreError: The index is closed, or cannot be read.
        """
        catalogue, ids = self._store.catalogue, strings("ids", ids)
        while True:
            positions = catalogue.find(ids)
            items = catalogue.at(positions.values(), catalogue.version)
            if items is not None and items.keys() >= set(positions.values()):
                return {item.id: item for item in items.values() if item.id in positions}

    @property
    def root(self) -> Path | None:
        """Folder that the ids of pictures are relative to; None: they are whatever they were added as.

        Setting it changes no id: it says where the pictures lie now.

        Raises:
            StoreError: The index is closed, or cannot be read; on setting, the disk refuses.
        """
        root = self._store.catalogue.note(_ROOT)
        if root is not None and not isinstance(root, str):
            raise StoreError(
                f"the root of the index at {self.folder} cannot be read, {root!r:.80}: set it with "
                f"{remedies.move_root(self.folder)}"
            )
        return None if root is None else Path(root)

    @root.setter
    def root(self, root: str | PathLike[str]) -> None:
        self._store.refuse_if_fixed()
        self._store.catalogue.keep(_ROOT, os.path.realpath(root))
