"""Contents of an index, read from its catalogue and its segments."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finelip_fast._arguments import folder_path, strings, whole_number
from finelip_fast.errors import StoreError
from finelip_fast.index import remedies
from finelip_fast.index.catalogue import Item
from finelip_fast.index.fields import Field, fields_of
from finelip_fast.index.pages import Cursor
from finelip_fast.index.store import Store
from finelip_fast.index.view import View

_ROOT = "root"
_ITEMS_AT_ONCE = 8192
_MOST_SAMPLED = 20_000  # items whose fields are examined


class Contents:
    """The items of a store, and all that is known of them; :class:`finelip_fast.Index` describes the attributes."""

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
        """Reasons why segments cannot be read, by segment name; empty without ``skip_damaged``.

        Raises:
            StoreError: The index is closed.
        """
        self._store.refuse_if_closed()
        return self._store.damaged

    @property
    def version(self) -> int:
        """Number of changes up to the version that is searched."""
        return self._store.view().version

    def __len__(self) -> int:
        return len(self._store.view())

    @property
    def total(self) -> int:
        """Number of items, including those that ``skip_damaged`` leaves out."""
        return self._store.catalogue.count(self.version)

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str) and bool(self._store.catalogue.find([item], self._store.fixed))

    def items(self, *, where: str | None = None) -> Iterator[Item]:
        """Yield the catalogue entry of each item, in order of insertion; entries are read as needed.

        Args:
            where: Filter on the metadata, see :mod:`finelip_fast.index.filters`; None: all items.

        Raises:
            InputError: The filter cannot be parsed.
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
                raise StoreError(f"the index at {self.folder} was compacted while it was read; read it again")
            yield from (items[position] for position in part)

    def page(
        self, *, where: str | None = None, limit: int = 100, after: str | None = None
    ) -> tuple[list[Item], str | None]:
        """A page of :meth:`items`, found without reading what precedes it.

        Pages follow the order of insertion: items added or replaced between two pages come at the end, and deleted items are
        left out. After a compaction, the listing continues after the last item of the previous page, if that still exists.

        Args:
            where: Filter on the metadata; None: all items.
            limit: Number of items per page.
            after: Cursor returned with the previous page; None: the first page.

        Returns:
            The items, and the value of ``after`` for the next page; None: this is the last page.

        Raises:
            InputError: The filter cannot be parsed, ``after`` is not from any page, or its place is lost: the index was
                compacted, and the last item of that page is gone.
            StoreError: The index is closed, or cannot be read.
        """
        limit, cursor = whole_number("limit", limit, most=_ITEMS_AT_ONCE), None if after is None else Cursor.read(after)
        items, end = self._store.catalogue.page(where, limit, cursor, self._store.fixed)
        return items, None if end is None else str(end)

    def fields(self) -> list[Field]:
        """Metadata fields that filters can compare, with their values or ranges, the most frequent first.

        Of more than 20,000 items, an evenly spread sample of that size is examined, which may miss rare values and extremes.
        File properties that nobody searches for, such as hashes, are left out. The result is cached until the index changes.

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
        """Yield the metadata of the items at positions of a version, as long as that version can be read."""
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

        They are float16, or float32 if the index stores int8.

        Raises:
            StoreError: The index is closed, or cannot be read.
        """
        view = self._store.view()
        view.refuse_shortened()
        empty = torch.empty(0, self.spec.tokens, self.spec.width, dtype=torch.float16)
        pieces = [segment.embeddings(slice(None)) for segment in view.segments]
        rows = torch.cat(pieces or [empty])
        return (rows if view.living is None else rows[view.living]).to(self.device)

    def embeddings_of(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of the given ids that are in the index, each float32 ``[L, D]`` with unit rows, to search with.

        Raises:
            InputError: An id is not a string.
            StoreError: An embedding is damaged, or the index is closed or cannot be read.
        """
        ids = strings("ids", ids)
        while True:
            view = self._store.view()
            items = self._store.catalogue.living(ids, view.version)
            if items is None:
                continue  # compacted meanwhile
            rows = view.rows_at(sorted(items))  # leaves out items that skip_damaged leaves out
            if not len(rows):
                return {}
            positions = view.positions(rows).tolist()
            try:
                view.refuse_shortened()
                view.refuse_damaged(items[position] for position in positions)
                embedded = view.read(rows).float()
            except FileNotFoundError as error:
                if self._store.view() is view:
                    raise self._store.missing(error) from None
                continue
            embedded = torch.nn.functional.normalize(embedded, dim=-1).to(self.device)
            return {items[position].id: row for position, row in zip(positions, embedded, strict=True)}

    def present(self, ids: Sequence[str]) -> set[str]:
        """The given ids that are in the index.

        Raises:
            InputError: An id is not a string.
            StoreError: The index is closed, or cannot be read.
        """
        return set(self._store.catalogue.find(strings("ids", ids), self._store.fixed))

    def get(self, ids: Sequence[str]) -> dict[str, Item]:
        """Catalogue entries of the given ids that are in the index, by id.

        Raises:
            InputError: An id is not a string.
            StoreError: The index is closed, or cannot be read.
        """
        ids = strings("ids", ids)
        while True:
            items = self._store.catalogue.living(ids, self.version)
            if items is not None:  # not compacted meanwhile
                return {item.id: item for item in items.values()}

    @property
    def root(self) -> Path | None:
        """Folder that the ids of pictures are relative to; None: ids are as they were added.

        Setting it changes no ids: it records where the pictures are now.

        Raises:
            InputError: When it is set: not a path.
            StoreError: The index is closed or cannot be read, or, when it is set, writing fails.
        """
        root = self._store.catalogue.note(_ROOT)
        if root is not None and not isinstance(root, str):
            raise StoreError(
                f"the index at {self.folder} has an invalid root, {root!r:.80}; set it with "
                f"{remedies.move_root(self.folder)}"
            )
        return None if root is None else Path(root)

    @root.setter
    def root(self, root: str | PathLike[str]) -> None:
        root = folder_path("root", root)
        self._store.refuse_if_fixed()
        self._store.catalogue.keep(_ROOT, os.path.realpath(root))
