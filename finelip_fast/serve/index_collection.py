"""An index folder that a server searches and changes."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finelip_fast._decode import suffix_of
from finelip_fast.collection import item_id, prepare_root
from finelip_fast.errors import FineLIPError, InputError
from finelip_fast.explain import Explanation
from finelip_fast.hits import Hit, Hits
from finelip_fast.index import Field
from finelip_fast.index.catalogue import Item
from finelip_fast.index.checks import as_json
from finelip_fast.index.search import Mode
from finelip_fast.ingest import Ingest
from finelip_fast.picture_files import combine, describe
from finelip_fast.reports import AddReport
from finelip_fast.retriever import Retriever
from finelip_fast.serve.collection import Added, Found, ListedItem, Upload, local_file
from finelip_fast.serve.uploads import Uploads

_logger = logging.getLogger(__name__)

_AT_ONCE = 32  # uploads embedded and committed together


class IndexCollection:
    """The items of a retriever's index.

    Changes that other processes make to the index folder are visible to the next call.

    Args:
        retriever: Retriever, closed together with the collection.
        uploads: Folder for added pictures, created if missing; None: nothing can be added or deleted.

    Raises:
        WriteError: The folder cannot be created.
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

        def with_path(hit: Hit) -> Hit:
            path = self._file_of(hit, root)
            return replace(hit, path=None if path is None else str(path))

        return Found([Hits(map(with_path, hits)) for hits in results])

    def embeddings_of(self, ids: Sequence[str], shard: str | None = None) -> dict[str, Tensor]:
        return self._index.embeddings_of(ids) if shard is None else {}

    def items(
        self, *, where: str | None = None, limit: int = 100, after: str | None = None
    ) -> tuple[list[ListedItem], str | None]:
        items, following = self._index.page(where=where, limit=limit, after=after)
        root = self._index.root
        return [ListedItem(item.id, item.metadata, self._file_of(item, root)) for item in items], following

    def fields(self) -> list[Field]:
        with self._counting:  # by one thread; the others get its cached result
            return self._index.fields()

    def picture(self, id: str, shard: str | None = None) -> Path | None:
        item = self._index.get([id]).get(id) if shard is None else None
        return None if item is None else self._file_of(item, self._index.root)

    def _file_of(self, item: Hit | Item, root: Path | None) -> Path | None:
        if (path := local_file(item.id, item.metadata, root)) is not None:
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
        first = {picture.digest: at for at, picture in reversed(sound.items())}  # first copy of a picture sent twice
        pictures = {at: sound[at] for at in sorted(first.values())}

        def places() -> dict[int, Path]:
            return {
                at: folder.path_for(picture.digest, uploads[at].name, picture.suffix)
                for at, picture in pictures.items()
            }

        # Before anything is locked, as far as is known by then.
        new = [at for at, path in places().items() if self._item_of(path, folder, root) is None]
        embeddings = self._embedded(pictures, new)
        files: list[Path] = []
        with self._changing:
            try:
                with self._index.undisturbed():
                    paths = places()
                    known = {at: self._item_of(path, folder, root) for at, path in paths.items()}
                    for at, path in paths.items():
                        if folder.keep(path, uploads[at].content):
                            files.append(path)
                    ids = {at: known[at] or item_id(path, root) for at, path in paths.items()}
                    new = [at for at, item in known.items() if item is None]
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
            # Another process may have deleted an item of the same picture, and its file.
            with self._index.undisturbed():
                present = self._index.present(list(ids.values()))
                for at in [at for at, item in ids.items() if item in present]:
                    folder.keep(paths[at], uploads[at].content)
        try:
            self._index.compact_recent()
        except FineLIPError as error:  # the added items are stored
            _logger.warning("cannot merge the segments of the index: %s", error)
        added = set(report.added)

        def result(at: int) -> Added:
            picture, name = checked[at], uploads[at].name
            if not isinstance(picture, _Sound):
                return Added(None, name, picture)
            item = ids[first[picture.digest]]
            return Added(item, name, existing=item not in added or first[picture.digest] != at)

        return [result(at) for at in range(len(uploads))]

    def _check(self, upload: Upload) -> _Sound | str:
        """Return what is needed to add a picture, or why it cannot be added."""
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
        """Remove uploaded files that belong to no item."""
        if not paths:
            return
        with self._index.undisturbed():
            for path in paths:
                if self._item_of(path, folder, root) is None:
                    folder.remove(path)

    def _item_of(self, path: Path, folder: Uploads, root: Path | None) -> str | None:
        """Return the id of an uploaded picture's item, from before the index was moved, too; None if there is none."""
        if root is not None and self._index.present([item := item_id(path, root)]):
            return item
        if not path.is_file():  # never uploaded before
            return None
        items, _ = self._index.page(where=f"id like '{folder.pattern(path)}'")
        return next((item.id for item in items if folder.find(item.id) == path), None)

    def close(self) -> None:
        """Close the retriever."""
        self._retriever.close()

    def _writable(self) -> Uploads:
        if self._uploads is None:
            raise InputError("the collection is read-only; serve it with --writable")
        return self._uploads


class _Sound(NamedTuple):
    """A picture that can be added: pixels ``[3, S, S]``, SHA-256, file suffix, and the metadata sent with it."""

    pixels: Tensor
    digest: str
    suffix: str
    metadata: dict[str, Any]

    def described(self, path: Path) -> dict[str, Any]:
        """Return the metadata of its item; size, time and hash are always those of the file."""
        return combine(describe(path), self.metadata)
