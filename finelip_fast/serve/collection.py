"""What a server needs of the items that it serves, and what it is told of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from finelip_fast.collection import picture_path
from finelip_fast.engines import Engine
from finelip_fast.explain import Explanation
from finelip_fast.hits import Hit, Hits, is_local_file
from finelip_fast.index import Field
from finelip_fast.index.catalogue import Item
from finelip_fast.index.search import Mode


@dataclass(frozen=True)
class Found:
    """Hits of a search.

    Attributes:
        hits: Hits of each query, best first.
        covered: Share of the items that were searched; below 1 where shards did not answer.
        missing: Reasons of the shards that did not answer, by their folders.
        shards: Folder of the shard that holds each hit; None: there are no shards.
    """

    hits: list[Hits]
    covered: float = 1.0
    missing: dict[str, str] = field(default_factory=dict)
    shards: list[list[str]] | None = None


@dataclass(frozen=True)
class Upload:
    """A picture to add.

    Attributes:
        content: Bytes of its file.
        name: Name of the file as it was sent.
        metadata: What is known of it beside what its file says.
    """

    content: bytes
    name: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Added:
    """What became of an upload.

    Attributes:
        id: Id of its item; None: it was not added.
        name: Name of the file as it was sent.
        reason: Why it was not added; None: it was, or was there already.
        existing: Whether the very picture had been uploaded before.
    """

    id: str | None
    name: str
    reason: str | None = None
    existing: bool = False


class Collection(Protocol):
    """Items to serve; used from several threads at once.

    Attributes:
        engine: Engine that embeds queries.
        alpha: Weight of the global cosine where a request names none.
        writable: Whether items can be added and deleted.
    """

    engine: Engine
    alpha: float
    writable: bool

    def __len__(self) -> int: ...

    def version(self) -> int:
        """Counts the changes to what is served."""
        ...

    def search(
        self,
        queries: Tensor,
        k: int,
        *,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> Found:
        """The best items for embeddings ``[Q, L, D]``; errors as those of :meth:`finelip_fast.Retriever.search_embeddings`."""
        ...

    def embeddings_of(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """Stored embeddings ``[L, D]`` of those ids that are there."""
        ...

    def items(
        self, *, where: str | None = None, limit: int = 100, after: str | None = None
    ) -> tuple[list[Item], str | None]:
        """A page of the items in the order in which they were added, and the ``after`` of the next page; None: the last.

        Raises:
            InputError: A filter that cannot be read, or an ``after`` that no page gave.
        """
        ...

    def fields(self) -> list[Field]:
        """Fields of the metadata that items can be filtered by."""
        ...

    def picture(self, id: str) -> Path | None:
        """The file of an item; None: there is no such item, or no regular file."""
        ...

    def explain(self, image: bytes | Path, text: str) -> Explanation:
        """Why a picture and a text score as they do; errors as those of :meth:`finelip_fast.Retriever.explain`."""
        ...

    def add(self, uploads: Sequence[Upload]) -> list[Added]:
        """Keep pictures and add them; what is reported as added is on disk.

        Raises:
            InputError: The collection is read only.
            StoreError, WriteError: The disk refuses; what was not reported may be added again.
        """
        ...

    def delete(self, ids: Sequence[str]) -> None:
        """Take items out for good.

        Raises:
            InputError: An id that is not there, or the collection is read only; nothing was taken out.
            StoreError: The disk refuses; nothing was taken out.
        """
        ...

    def close(self) -> None:
        """Release what is served."""


def local_file(id: str, metadata: Mapping[str, Any], root: Path | None) -> Path | None:
    """The file of an item's picture, of one that was added by its path without its hash, too; None: there is none here."""
    path = picture_path(id, metadata, root) or (id if root is None else os.path.normpath(root / id))
    return Path(path) if is_local_file(str(path)) else None


def with_path(hit: Hit, root: Path | None) -> Hit:
    path = hit.path or local_file(hit.id, hit.metadata, root)
    return hit if path is None else replace(hit, path=str(path))
