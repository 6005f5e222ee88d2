"""Shards that a server searches."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from finelip_fast._arguments import share, whole_number
from finelip_fast.distributed import Shards
from finelip_fast.distributed.shards import ShardItem
from finelip_fast.engines import Engine
from finelip_fast.errors import InputError, StoreError
from finelip_fast.explain import Explanation, explain
from finelip_fast.hits import hits_of
from finelip_fast.index import Field, Index, stored_index
from finelip_fast.index.fields import joined_fields
from finelip_fast.index.search import Mode
from finelip_fast.model import FineLIP
from finelip_fast.serve.collection import Added, Found, ListedItem, Upload, local_file

T = TypeVar("T")


class ShardCollection:
    """The items of shards, which can only be searched.

    All other information about items is read from the folders of the shards that are on this machine.

    Args:
        engine: Engine of the checkpoint that made the shards.
        shards: Shards, closed together with the collection; with ``partial="mark"``, a search is answered without missing
            shards.
        alpha: Weight of the global cosine for requests that name none; None: that of the shards.

    Raises:
        StoreError: The shards were made by another checkpoint.
        InputError: ``alpha`` outside [0, 1].
    """

    writable = False

    def __init__(self, engine: Engine, shards: Shards, alpha: float | None = None) -> None:
        if engine.fingerprint != shards.spec.checkpoint:
            raise StoreError(
                f"expected shards made by {engine.source or 'the bundled checkpoint'}, {engine.fingerprint[:12]}…, got shards "
                f"made by {shards.spec.checkpoint[:12]}…; open them with the checkpoint that made them"
            )
        self.engine, self._shards = engine, shards
        self.alpha = engine.config.choose_alpha(shards.spec.alpha if alpha is None else share("alpha", alpha))
        self._indexes: dict[str, Index] = {}
        self._opening, self._loading = threading.Lock(), threading.Lock()
        self._model: FineLIP | None = None

    def __len__(self) -> int:
        return len(self._shards)

    def version(self) -> int:
        return sum(self._of_readable(lambda index: index.version).values())

    def _local_indexes(self) -> dict[str, Index]:
        """Return the indexes of the shards whose folders are on this machine, by folder, in the order of the shards."""
        with self._opening:
            for folder in self._shards.folders:
                if folder not in self._indexes:
                    with suppress(StoreError):
                        self._indexes[folder] = stored_index(folder)
            return {folder: self._indexes[folder] for folder in self._shards.folders if folder in self._indexes}

    def _of_readable(self, function: Callable[[Index], T], folders: Sequence[str] | None = None) -> dict[str, T]:
        """Return what a function reads from each index, without those that are gone by now: their shards are missing, too.

        Args:
            function: Function of an index.
            folders: Folders of the indexes; None: all that are on this machine.
        """
        values: dict[str, T] = {}
        for folder, index in self._local_indexes().items():
            if folders is None or folder in folders:
                with suppress(StoreError):
                    values[folder] = function(index)
        return values

    def search(
        self,
        queries: Tensor,
        k: int,
        *,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> Found:
        alpha = self.alpha if alpha is None else self.engine.config.choose_alpha(share("alpha", alpha))
        result = self._shards.search(queries, whole_number("k", k), alpha=alpha, mode=mode, where=where)
        roots = self._of_readable(lambda index: index.root)

        def path(item: ShardItem) -> Path | None:
            return local_file(item.id, item.metadata, roots[item.shard]) if item.shard in roots else None

        hits = hits_of(
            result.items,
            result.scores,
            result.global_scores,
            result.fine_scores,
            mode=lambda item: result.modes[item.shard],
            path=path,
            shard=lambda item: item.shard,
        )
        return Found(hits, result.covered, result.missing)

    def embeddings_of(self, ids: Sequence[str], shard: str | None = None) -> dict[str, Tensor]:
        embeddings: dict[str, Tensor] = {}
        for index in self._required(self._folders(shard)).values():
            embeddings = {**index.embeddings_of(ids), **embeddings}
        return embeddings

    def _folders(self, shard: str | None) -> list[str]:
        """Return the folders of all shards, or that of the one that a request names."""
        return [folder for folder in self._shards.folders if shard in (None, folder)]

    def _required(self, folders: Sequence[str]) -> dict[str, Index]:
        """Return the indexes in folders.

        Raises:
            StoreError: A folder is not on this machine, or cannot be read.
        """
        indexes = self._local_indexes()
        for folder in folders:
            if folder not in indexes:
                raise StoreError(
                    f"the folder of the shard {folder} is not on this machine or cannot be read; shards elsewhere can "
                    "be searched only by text and by picture: for its items, run finelip serve --index there"
                )
        return {folder: indexes[folder] for folder in folders}

    def items(
        self, *, where: str | None = None, limit: int = 100, after: str | None = None
    ) -> tuple[list[ListedItem], str | None]:
        indexes = list(self._required(self._shards.folders).items())
        number, _, place = ("0:" if after is None else after).partition(":")
        if not re.fullmatch("[0-9]{1,6}", number) or int(number) >= len(indexes):
            raise InputError(
                f"expected after to be the cursor of a previous page, got {after!r:.80}; list from the beginning"
            )
        at, items, end = int(number), list[ListedItem](), place or None
        while True:
            folder, index = indexes[at]
            part, end = index.page(where=where, limit=limit - len(items), after=end)
            root = index.root
            paths = [local_file(item.id, item.metadata, root) for item in part]
            items += [ListedItem(item.id, item.metadata, path, folder) for item, path in zip(part, paths, strict=True)]
            at += end is None
            if at == len(indexes):
                return items, None
            if len(items) == limit:
                return items, f"{at}:{end or ''}"

    def fields(self) -> list[Field]:
        return joined_fields(list(self._of_readable(lambda index: index.fields()).values()))

    def picture(self, id: str, shard: str | None = None) -> Path | None:
        def path(index: Index) -> Path | None:
            item = index.get([id]).get(id)
            return None if item is None else local_file(item.id, item.metadata, index.root)

        paths = self._of_readable(path, self._folders(shard)).values()
        return next((path for path in paths if path is not None), None)

    def explain(self, image: bytes | Path, text: str) -> Explanation:
        with self._loading:
            if self._model is None:
                self._model = self.engine.load_model()
        return explain(self._model, image, text, alpha=self.alpha)

    def add(self, uploads: Sequence[Upload]) -> list[Added]:
        raise InputError(
            "shards can only be searched; add to the folder of a shard with finelip add, or serve it with --index and "
            "--writable"
        )

    def delete(self, ids: Sequence[str]) -> None:
        raise InputError(
            "shards can only be searched; delete from the folder of a shard with finelip remove, or serve it with --index and "
            "--writable"
        )

    def close(self) -> None:
        """Close the shards, and the indexes that were opened from their folders."""
        with self._opening:
            for index in self._indexes.values():
                index.close()
            self._indexes.clear()
        self._shards.close()
