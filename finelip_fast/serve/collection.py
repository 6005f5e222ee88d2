"""The interface through which a server uses the items that it serves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from finelip_fast.collection import picture_path
from finelip_fast.engines import Engine
from finelip_fast.explain import Explanation
from finelip_fast.hits import Hits, is_local_file
from finelip_fast.index import Field
from finelip_fast.index.search import Mode


@dataclass(frozen=True)
class Found:
    """Hits of a search.

    Attributes:
        hits: Hits of each query, best first.
        covered: Share of the items that were searched; below 1 where shards did not answer.
        missing: Reasons why shards did not answer, by folder.
    """

    hits: list[Hits]
    covered: float = 1.0
    missing: dict[str, str] = field(default_factory=dict)


class ListedItem(NamedTuple):
    """An item of a listing.

    Attributes:
        id, metadata: Id and metadata that it was added with.
        path: File of its picture; None if there is none.
        shard: Folder of the shard that holds it; None: there are no shards.
    """

    id: str
    metadata: dict[str, Any]
    path: Path | None
    shard: str | None = None


@dataclass(frozen=True)
class Upload:
    """A picture to add.

    Attributes:
        content: Bytes of its file.
        name: Name of the file as it was sent.
        metadata: Metadata in addition to that from its file.
    """

    content: bytes
    name: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Added:
    """Outcome of an upload.

    Attributes:
        id: Id of its item; None: it was not added.
        name: Name of the file as it was sent.
        reason: Reason why it was not added; None: it was added, or was there already.
        existing: Whether the same picture had been uploaded before.
    """

    id: str | None
    name: str
    reason: str | None = None
    existing: bool = False


class Collection(Protocol):
    """Items to serve; used by several threads at once.

    Attributes:
        engine: Engine that embeds queries.
        alpha: Weight of the global cosine for requests that name none.
        writable: Whether items can be added and deleted.
    """

    engine: Engine
    alpha: float
    writable: bool

    def __len__(self) -> int: ...

    def version(self) -> int:
        """Return a counter of the changes to the items."""
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
        """Find the best items for embeddings ``[Q, L, D]``; errors as in :meth:`finelip_fast.Retriever.search_embeddings`."""
        ...

    def embeddings_of(self, ids: Sequence[str], shard: str | None = None) -> dict[str, Tensor]:
        """Return the stored embeddings ``[L, D]`` of those ids that exist.

        Args:
            ids: Ids of items.
            shard: Folder of the shard that holds them; None: the first that has the id.
        """
        ...

    def items(
        self, *, where: str | None = None, limit: int = 100, after: str | None = None
    ) -> tuple[list[ListedItem], str | None]:
        """Return a page of the items in the order they were added, and the ``after`` of the next page, None for the last.

        Raises:
            InputError: A filter that cannot be parsed, or an ``after`` that no page returned.
        """
        ...

    def fields(self) -> list[Field]:
        """Return the metadata fields that items can be filtered by."""
        ...

    def picture(self, id: str, shard: str | None = None) -> Path | None:
        """Return the file of an item, or None if there is no such item or no regular file.

        Args:
            id: Id of the item.
            shard: Folder of the shard that holds it; None: the first that has a picture of the id.
        """
        ...

    def explain(self, image: bytes | Path, text: str) -> Explanation:
        """Explain the score of a picture and a text; errors as in :meth:`finelip_fast.Retriever.explain`."""
        ...

    def add(self, uploads: Sequence[Upload]) -> list[Added]:
        """Store pictures and add them; those reported as added are on disk.

        Raises:
            InputError: The collection is read-only.
            StoreError, WriteError: The disk cannot be written; pictures that were not reported may be added again.
        """
        ...

    def delete(self, ids: Sequence[str]) -> None:
        """Delete items permanently.

        Raises:
            InputError: An id does not exist, or the collection is read-only; nothing was deleted.
            StoreError: The disk cannot be written; nothing was deleted.
        """
        ...

    def close(self) -> None:
        """Release the collection's resources."""


def model_name(source: str) -> str:
    """Return the name of a checkpoint from its source, without any folder of this machine."""
    return (Path(source).name if Path(source).is_absolute() else source) or "finelip-scenes"


def local_file(id: str, metadata: Mapping[str, Any], root: Path | None) -> Path | None:
    """Return the local file of an item's picture, even if added by path without a hash, or None if there is none."""
    path = picture_path(id, metadata, root) or (id if root is None else os.path.normpath(root / id))
    return Path(path) if is_local_file(str(path)) else None
