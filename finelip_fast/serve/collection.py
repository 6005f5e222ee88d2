"""What a server searches and changes: an index folder with its retriever, or shards."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from finelip_fast._arguments import share, whole_number
from finelip_fast._decode import suffix_of
from finelip_fast.collection import item_id, picture_path, prepare_root
from finelip_fast.distributed import Shards
from finelip_fast.distributed.shards import ShardItem
from finelip_fast.engines import Engine
from finelip_fast.errors import FineLIPError, InputError, StoreError
from finelip_fast.explain import Explanation, explain
from finelip_fast.hits import Hit, Hits, is_local_file
from finelip_fast.index import Field, Index, stored_index
from finelip_fast.index.catalogue import Item
from finelip_fast.index.checks import as_json
from finelip_fast.index.fields import joined_fields
from finelip_fast.index.search import Mode
from finelip_fast.ingest import Ingest
from finelip_fast.model import FineLIP
from finelip_fast.picture_files import HASH, STAMP, describe
from finelip_fast.reports import AddReport
from finelip_fast.retriever import Retriever
from finelip_fast.serve.uploads import Uploads

_AT_ONCE = 32  # uploads that are embedded and committed together


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


class RetrieverCollection:
    """The items of a retriever's index.

    What other processes change in the index folder is seen by the next call.

    Args:
        retriever: Retriever, which is closed with the collection.
        uploads: Folder that keeps added pictures, made if it is missing; None: nothing can be added or deleted.

    Raises:
        WriteError: The folder cannot be made.
    """

    def __init__(self, retriever: Retriever, uploads: Path | None = None) -> None:
        self._retriever, self._index = retriever, retriever.index
        self._uploads = None if uploads is None else Uploads(uploads)
        self.engine, self.alpha, self.writable = retriever.engine, retriever.alpha, uploads is not None
        self._changing, self._counting = threading.Lock(), threading.Lock()

    def __len__(self) -> int:
        return len(self._index)

    def version(self) -> int:
        return self._index.version

    def search(
        self,
        queries: Tensor,
        k: int,
        *,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> Found:
        results = self._retriever.search_embeddings(queries, k=k, mode=mode, where=where, alpha=alpha)
        root = self._index.root
        return Found([Hits(_with_path(hit, root) for hit in hits) for hits in results])

    def embeddings_of(self, ids: Sequence[str]) -> dict[str, Tensor]:
        return self._index.embeddings_of(ids)

    def items(
        self, *, where: str | None = None, limit: int = 100, after: str | None = None
    ) -> tuple[list[Item], str | None]:
        return self._index.page(where=where, limit=limit, after=after)

    def fields(self) -> list[Field]:
        with self._counting:  # by one thread: the others get what it keeps
            return self._index.fields()

    def picture(self, id: str) -> Path | None:
        item = self._index.get([id]).get(id)
        return None if item is None else self._file_of(item, self._index.root)

    def _file_of(self, item: Item, root: Path | None) -> Path | None:
        if (path := _local_file(item.id, item.metadata, root)) is not None:
            return path
        return None if self._uploads is None else self._uploads.find(item.id)

    def explain(self, image: bytes | Path, text: str) -> Explanation:
        return self._retriever.explain(image, text)

    def add(self, uploads: Sequence[Upload]) -> list[Added]:
        folder, results = self._writable(), list[Added]()
        with self._changing:
            root = prepare_root(self._index, [folder.folder])
        for start in range(0, len(uploads), _AT_ONCE):
            results += self._add(uploads[start : start + _AT_ONCE], folder, root)
        return results

    def _add(self, uploads: Sequence[Upload], folder: Uploads, root: Path) -> list[Added]:
        with ThreadPoolExecutor() as pool:
            checked = list(pool.map(self._check, uploads))
        sound = {at: picture for at, picture in enumerate(checked) if isinstance(picture, _Sound)}
        first = {picture.digest: at for at, picture in reversed(sound.items())}  # of the same picture sent twice
        pictures = {at: sound[at] for at in sorted(first.values())}

        def places() -> dict[int, Path]:
            return {
                at: folder.path_for(picture.digest, uploads[at].name, picture.suffix)
                for at, picture in pictures.items()
            }

        def absent(ids: dict[int, str]) -> list[int]:
            present = self._index.present(list(ids.values()))
            return [at for at, item in ids.items() if item not in present]

        # Before anything is locked, as far as can be told.
        new = absent({at: item_id(path, root) for at, path in places().items()})
        embeddings = self._embedded(pictures, new)
        files: list[Path] = []
        with self._changing:
            try:
                with self._index.undisturbed():
                    paths = places()
                    files += [path for at, path in paths.items() if folder.keep(path, uploads[at].content)]
                    ids = {at: item_id(path, root) for at, path in paths.items()}
                    new = absent(ids)
                    metadata = [pictures[at].described(paths[at]) for at in new]
                embeddings |= self._embedded(pictures, [at for at in new if at not in embeddings])
                report = AddReport()
                with Ingest(self._index, "image", report, existing="skip") as ingest:
                    if new:
                        ingest.add([ids[at] for at in new], torch.stack([embeddings[at] for at in new]), metadata)
            except BaseException:
                with suppress(FineLIPError):
                    self._discard(files, folder, root)
                raise
            with (
                self._index.undisturbed()
            ):  # another process may have deleted an item of the same picture, and its file
                for at in ids.keys() - set(absent(ids)):
                    folder.keep(paths[at], uploads[at].content)
        added = set(report.added)

        def result(at: int) -> Added:
            picture, name = checked[at], uploads[at].name
            if not isinstance(picture, _Sound):
                return Added(None, name, picture)
            item = ids[first[picture.digest]]
            return Added(item, name, existing=item not in added or first[picture.digest] != at)

        return [result(at) for at in range(len(uploads))]

    def _check(self, upload: Upload) -> _Sound | str:
        """What is needed of a picture and its metadata, or why it cannot be added."""
        try:
            as_json(upload.metadata)
            pixels = self.engine.preprocess(upload.content)
            digest = hashlib.sha256(upload.content).hexdigest()
            return _Sound(pixels, digest, suffix_of(upload.content), upload.metadata)
        except InputError as error:
            return str(error)

    def _embedded(self, pictures: dict[int, _Sound], numbers: Sequence[int]) -> dict[int, Tensor]:
        if not numbers:
            return {}
        embeddings = self.engine.encode_image(torch.stack([pictures[at].pixels for at in numbers]))
        return dict(zip(numbers, embeddings, strict=True))

    def delete(self, ids: Sequence[str]) -> None:
        folder = self._writable()
        with self._changing:
            root = self._index.root
            files = [self._file_of(item, root) for item in self._index.get(ids).values()]
            self._index.delete(ids)
            self._discard([path for path in files if path is not None and folder.holds(path)], folder, root)

    def _discard(self, paths: Sequence[Path], folder: Uploads, root: Path | None) -> None:
        """Remove those uploaded files that are no item's."""
        if not paths:
            return
        with self._index.undisturbed():
            present = self._index.present([] if root is None else [item_id(path, root) for path in paths])
            for path in paths:
                if root is None or item_id(path, root) not in present:
                    folder.remove(path)

    def close(self) -> None:
        """Close the retriever."""
        self._retriever.close()

    def _writable(self) -> Uploads:
        if self._uploads is None:
            raise InputError(
                "expected a collection that can be changed, got one that is read only: serve it with --writable"
            )
        return self._uploads


class ShardCollection:
    """The items of shards, which are searched only.

    What else there is to tell of items is read from the folders of the shards, where they are on this machine.

    Args:
        engine: Engine of the checkpoint that made the shards.
        shards: Shards, which are closed with the collection; with ``partial="mark"`` a search is answered without those that
            are missing.
        alpha: Weight of the global cosine where a request names none; None: that of the shards.

    Raises:
        StoreError: The shards are of another checkpoint.
        InputError: ``alpha`` outside [0, 1].
    """

    writable = False

    def __init__(self, engine: Engine, shards: Shards, alpha: float | None = None) -> None:
        if engine.fingerprint != shards.spec.checkpoint:
            raise StoreError(
                f"expected shards made by {engine.source or 'the bundled checkpoint'}, {engine.fingerprint[:12]}…, got ones "
                f"made from {shards.spec.checkpoint[:12]}…: open them with the checkpoint that made them"
            )
        self.engine, self._shards = engine, shards
        self.alpha = engine.config.choose_alpha(shards.spec.alpha if alpha is None else share("alpha", alpha))
        self._indexes: dict[str, Index] = {}
        self._opening, self._loading = threading.Lock(), threading.Lock()
        self._model: FineLIP | None = None

    def __len__(self) -> int:
        return len(self._shards)

    def version(self) -> int:
        return sum(index.version for index in self._here().values())

    def _here(self) -> dict[str, Index]:
        """The indexes of those shards whose folders are on this machine, by these, in the order of the shards."""
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
        roots = {folder: index.root for folder, index in self._here().items()}

        def hit(query: int, rank: int, item: ShardItem) -> Hit:
            bare = Hit(
                item.id,
                float(result.scores[query, rank]),
                float(result.global_scores[query, rank]),
                None if result.fine_scores is None else float(result.fine_scores[query, rank]),
                item.metadata,
                result.modes[item.shard],
            )
            return _with_path(bare, roots[item.shard]) if item.shard in roots else bare

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
        indexes = self._here()
        for folder in self._shards.folders:
            if folder not in indexes:
                raise StoreError(
                    f"expected the folder of the shard {folder} on this machine, where it is not or cannot be read: shards "
                    "elsewhere can be searched by text and by picture; serve this one alone there, with --index"
                )
        return indexes

    def items(
        self, *, where: str | None = None, limit: int = 100, after: str | None = None
    ) -> tuple[list[Item], str | None]:
        indexes = list(self._all_here().values())
        number, _, place = ("0:" if after is None else after).partition(":")
        if not re.fullmatch("[0-9]{1,6}", number) or int(number) >= len(indexes):
            raise InputError(
                f"expected after as a page of the listing gave it, got {after!r:.80}; list from the beginning"
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
        return joined_fields([index.fields() for index in self._here().values()])

    def picture(self, id: str) -> Path | None:
        for index in self._here().values():
            for item in index.get([id]).values():
                if (path := _local_file(item.id, item.metadata, index.root)) is not None:
                    return path
        return None

    def explain(self, image: bytes | Path, text: str) -> Explanation:
        with self._loading:
            if self._model is None:
                self._model = self.engine.load_model()
        return explain(self._model, image, text, alpha=self.alpha)

    def add(self, uploads: Sequence[Upload]) -> list[Added]:
        raise InputError(
            "expected one index to add to, got shards, which are searched only: add to the folder of one with finelip add, or "
            "serve it with --index and --writable"
        )

    def delete(self, ids: Sequence[str]) -> None:
        raise InputError(
            "expected one index to delete from, got shards, which are searched only: take items out of the folder of one with "
            "finelip remove, or serve it with --index and --writable"
        )

    def close(self) -> None:
        """Close the shards, and those of their folders that were opened here."""
        with self._opening:
            for index in self._indexes.values():
                index.close()
            self._indexes.clear()
        self._shards.close()


def _local_file(id: str, metadata: Mapping[str, Any], root: Path | None) -> Path | None:
    """The file of an item's picture, of one that was added by its path without its hash, too; None: there is none here."""
    path = picture_path(id, metadata, root) or (id if root is None else os.path.normpath(root / id))
    return Path(path) if is_local_file(str(path)) else None


def _with_path(hit: Hit, root: Path | None) -> Hit:
    path = hit.path or _local_file(hit.id, hit.metadata, root)
    return hit if path is None else replace(hit, path=str(path))


class _Sound(NamedTuple):
    """A picture that can be added: pixels ``[3, S, S]``, SHA-256, the suffix of its file, what was sent with it."""

    pixels: Tensor
    digest: str
    suffix: str
    metadata: dict[str, Any]

    def described(self, path: Path) -> dict[str, Any]:
        """Metadata of its item: its size, time and hash are always the file's."""
        return {
            **describe(path),
            **{name: value for name, value in self.metadata.items() if name not in (*STAMP, HASH)},
        }
