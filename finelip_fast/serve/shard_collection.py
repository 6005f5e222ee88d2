"""Shards that a server searches."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from finelip_fast._arguments import share, whole_number
from finelip_fast.distributed import Shards
from finelip_fast.distributed.shards import ShardItem
from finelip_fast.engines import Engine
from finelip_fast.errors import InputError, StoreError
from finelip_fast.explain import Explanation, explain
from finelip_fast.hits import Hit, Hits
from finelip_fast.index import Field, Index, stored_index
from finelip_fast.index.catalogue import Item
from finelip_fast.index.fields import joined_fields
from finelip_fast.index.search import Mode
from finelip_fast.model import FineLIP
from finelip_fast.serve.collection import Added, Found, Upload, local_file, with_path


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
        return sum(index.version for index in self._local_indexes().values())

    def _local_indexes(self) -> dict[str, Index]:
        """Return the indexes of the shards whose folders are on this machine, by folder, in the order of the shards."""
        with self._opening:
            for folder in self._shards.folders:
                if folder not in self._indexes:
                    with suppress(StoreError):
                        self._indexes[folder] = stored_index(folder)
            return {folder: self._indexes[folder] for folder in self._shards.folders if folder in self._indexes}

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
        roots: dict[str, Path | None] = {}
        for folder, index in self._local_indexes().items():
            with suppress(StoreError):  # its folder is gone, and its shard missing
                roots[folder] = index.root

        def hit(query: int, rank: int, item: ShardItem) -> Hit:
            bare = Hit(
                item.id,
                float(result.scores[query, rank]),
                float(result.global_scores[query, rank]),
                None if result.fine_scores is None else float(result.fine_scores[query, rank]),
                item.metadata,
                result.modes[item.shard],
            )
            return with_path(bare, roots[item.shard]) if item.shard in roots else bare

        hits = [
            Hits(hit(query, rank, item) for rank, item in enumerate(items)) for query, items in enumerate(result.items)
        ]
        shards = [[item.shard for item in items] for items in result.items]
        return Found(hits, result.covered, result.missing, shards)

    def embeddings_of(self, ids: Sequence[str]) -> dict[str, Tensor]:
        embeddings: dict[str, Tensor] = {}
        for index in self._all_here().values():
            embeddings = {**index.embeddings_of(ids), **embeddings}
        return embeddings

    def _all_here(self) -> dict[str, Index]:
        """
        Raises:
            StoreError: A folder is not on this machine, or cannot be read.
        """
        indexes = self._local_indexes()
        for folder in self._shards.folders:
            if folder not in indexes:
                raise StoreError(
                    f"the folder of the shard {folder} is not on this machine or cannot be read; shards elsewhere can "
                    "be searched only by text and by picture: for its items, run finelip serve --index there"
                )
        return indexes

    def items(
        self, *, where: str | None = None, limit: int = 100, after: str | None = None
    ) -> tuple[list[Item], str | None]:
        indexes = list(self._all_here().values())
        number, _, place = ("0:" if after is None else after).partition(":")
        if not re.fullmatch("[0-9]{1,6}", number) or int(number) >= len(indexes):
            raise InputError(
                f"expected after to be the cursor of a previous page, got {after!r:.80}; list from the beginning"
            )
        at, items, end = int(number), list[Item](), place or None
        while True:
            part, end = indexes[at].page(where=where, limit=limit - len(items), after=end)
            items += part
            at += end is None
            if at == len(indexes):
                return items, None
            if len(items) == limit:
                return items, f"{at}:{end or ''}"

    def fields(self) -> list[Field]:
        return joined_fields([index.fields() for index in self._local_indexes().values()])

    def picture(self, id: str) -> Path | None:
        for index in self._local_indexes().values():
            for item in index.get([id]).values():
                if (path := local_file(item.id, item.metadata, index.root)) is not None:
                    return path
        return None

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
