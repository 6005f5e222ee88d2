"""Adding many items to an index: they are read ahead in chunks, given ids, and gathered to segments large enough for a file.

This is the only path for the command line, the retriever and the workers of :mod:`finelip_fast.distributed`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count, islice
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from finelip_fast._arguments import listed, one_of, whole_number
from finelip_fast.collection import Listing, Plan, change_existing, filter_below, is_path_of, item_id, plan, relabel
from finelip_fast.errors import ImageError, InputError
from finelip_fast.index import remedies
from finelip_fast.index.checks import as_json, check_ids, id_conflict, repeated
from finelip_fast.index.index import Index
from finelip_fast.index.store import Existing
from finelip_fast.picture_files import HASH, combine, describe
from finelip_fast.preprocess import Preprocess
from finelip_fast.reports import AddReport, FolderReport
from finelip_fast.tokenizer import check_caption

Chunk = list[tuple[str, Any, dict[str, Any]]]  # id, item, metadata
T = TypeVar("T")
Pixels = TypeVar("Pixels")

# Amount gathered before it is written: bytes of embeddings, and seconds of work that a killed process may lose.
_FLUSH_BYTES, _FLUSH_SECONDS = 1 << 26, 30.0
_MAX_BATCH = 1 << 20


def as_images(images: Any) -> Any:
    """Wrap a single picture in a list; lists, generators and stacks of pictures are returned as they are."""
    single = isinstance(images, (str, PathLike, bytes, bytearray, memoryview, Image.Image))
    return [images] if single or getattr(images, "ndim", None) in (2, 3) else images


class Ingest:
    """One job of adding items. Leaving the ``with`` block writes what was passed to :meth:`add`, even after an error.

    Args:
        index: Index to add to.
        kind: Word for an item: ``image`` or ``text``.
        report: Report to which the ids of written items are added.
        existing: Treatment of an id that is already in the index: ``"error"``, ``"skip"`` the new item, or ``"replace"`` the
            old one.
        batch_size: Number of items in a chunk.

    Raises:
        InputError: ``existing`` is none of these, or ``batch_size`` is not an integer or below 1.
    """

    def __init__(
        self,
        index: Index,
        kind: str,
        report: AddReport | FolderReport,
        *,
        existing: Existing = "error",
        batch_size: int = 64,
    ) -> None:
        batch_size = whole_number("batch_size", batch_size, most=_MAX_BATCH)
        one_of("existing", existing, get_args(Existing))
        self._index, self._kind, self._report = index, kind, report
        self._existing: Existing = existing
        self._batch_size = batch_size
        self._batches: list[tuple[list[str], Tensor, list[dict[str, Any]]]] = []
        self._since = time.monotonic()
        self._pending: set[str] = set()  # ids that may not be written yet

    def __enter__(self) -> Ingest:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def add(self, ids: list[str], embeddings: Tensor, metadata: list[dict[str, Any]]) -> None:
        """Add the embedded items of a chunk, ``[n, L, D]``; they are written now or soon.

        Raises:
            InputError, StoreError: Whatever :meth:`finelip_fast.index.Index.add` raises.
        """
        self._batches.append((ids, embeddings.to("cpu", torch.float16), metadata))
        enough = sum(embeddings.nbytes for _, embeddings, _ in self._batches) >= _FLUSH_BYTES
        if enough or time.monotonic() - self._since >= _FLUSH_SECONDS:
            self._flush()

    def add_images(
        self,
        chunks: Iterable[Chunk],
        preprocess: Preprocess,
        encode_image: Callable[[Tensor], Tensor],
    ) -> None:
        """Read, embed and add the pictures of :meth:`chunks`; those that cannot be read are reported.

        A file whose path is its id is added with its own metadata (:func:`finelip_fast.picture_files.describe`), too.

        Args:
            chunks: Pictures with ids and metadata.
            preprocess: Preprocessing that turns a picture into pixels.
            encode_image: Function from pixels ``[B, 3, S, S]`` on the CPU to embeddings ``[B, L, D]``.

        Raises:
            InputError, StoreError: Whatever :meth:`finelip_fast.index.Index.add` raises.
        """

        root = self._index.root

        def read(entry: tuple[str, Any, dict[str, Any]]) -> tuple[Tensor | ImageError, dict[str, Any]]:
            item, image, metadata = entry
            pixels, described = read_picture(preprocess, image, describes=is_path_of(item, image, root))
            return pixels, combine(described, metadata)

        with ThreadPoolExecutor() as pool:
            for chunk in read_ahead(chunks, read, pool):
                readable = []
                for (item, image, _), (pixels, metadata) in chunk:
                    if isinstance(pixels, ImageError):
                        self._report.skipped.append(
                            (str(image) if is_path_of(item, image, root) else item, str(pixels))
                        )
                    else:
                        readable.append((item, metadata, pixels))
                if readable:
                    embeddings = encode_image(torch.stack([pixels for *_, pixels in readable]))
                    self.add([item for item, *_ in readable], embeddings, [metadata for _, metadata, _ in readable])

    def _flush(self) -> None:
        self._since = time.monotonic()
        if not self._batches:
            return
        batches_of_ids, embeddings, batches_of_metadata = zip(*self._batches, strict=True)
        ids = [name for batch in batches_of_ids for name in batch]
        metadata = [values for batch in batches_of_metadata for values in batch]
        self._report.keep(self._index.add(ids, torch.cat(embeddings), metadata, existing=self._existing))
        self._pending.difference_update(ids)
        self._batches.clear()

    def chunks(
        self,
        items: Iterable[Any],
        ids: Sequence[str] | None,
        metadata: Sequence[dict[str, Any]] | None,
        *,
        total: int | None = None,
        progress: bool | tqdm[Any] = True,
    ) -> Iterator[Chunk]:
        """Group new items with ids and metadata into lists of ``batch_size``.

        Args:
            items: Iterable of items, read chunk by chunk.
            ids: An id for each item; None: its path, relative to the index's root if it has one, or ``KIND-N`` without a path.
            metadata: A dictionary for each item.
            total: Number of items, if known.
            progress: Whether to show a progress bar, or the tqdm bar to advance.

        Raises:
            InputError: An id is already in the index or given twice, metadata cannot be written as JSON, a text is not a
                string, or lists differ in length; raised before any work if it can be known then.
        """
        ids = None if ids is None else listed("ids", ids)
        metadata = None if metadata is None else listed("metadata", metadata)
        try:
            entries = self._entries(iter(items), ids, metadata)
            total = len(items) if isinstance(items, Sized) else total
        except TypeError:  # such as an array without dimensions, which claims to have both
            raise InputError(f"expected {self._kind}s in a list or another iterable, got {items!r:.80}") from None
        if isinstance(items, Sized):
            self._check_lengths(len(items), ids, metadata)
        if isinstance(items, Sequence) and self._kind == "text":
            for number, item in enumerate(items):
                check_caption(item, number)
        if ids is not None:
            self._check_ids(ids)
        for number, values in enumerate(metadata or ()):
            as_json(values, f"{self._kind} {number}" if ids is None else ids[number])
        return self._chunks(entries, total, progress)

    def _chunks(
        self, entries: Iterator[tuple[str, Any, dict[str, Any]]], total: int | None, progress: bool | tqdm[Any]
    ) -> Iterator[Chunk]:
        with progress_bar(progress, total, self._kind) as bar:
            while chunk := list(islice(entries, self._batch_size)):
                if accepted := self._accepted(chunk):
                    yield accepted
                bar.update(len(chunk))

    def _accepted(self, chunk: Chunk) -> Chunk:
        """The items of a chunk that are not skipped."""
        ids = [item for item, *_ in chunk]
        if self._existing == "error":
            self._check_ids(ids)
        present = self._index.present(ids) if self._existing == "skip" else set()
        accepted: Chunk = []
        for entry in chunk:
            if entry[0] not in present and entry[0] not in self._pending:
                self._pending.add(entry[0])
                accepted.append(entry)
            elif self._existing != "skip":
                raise repeated(entry[0])
        return accepted

    def _entries(
        self, items: Iterable[Any], ids: Sequence[str] | None, metadata: Sequence[dict[str, Any]] | None
    ) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        """Pair each item with its id and metadata; the length of a generator is known only here."""
        numbered = (f"{self._kind}-{number}" for number in count(len(self._index)))
        free = (name for name in numbered if name not in self._index)
        root, total = self._index.root, 0
        for item in items:
            if any(values is not None and len(values) == total for values in (ids, metadata)):
                self._check_lengths(total + 1, ids, metadata)
            if self._kind == "text":
                check_caption(item, total)
            if ids is not None:
                name = ids[total]
            else:
                is_path = isinstance(item, PathLike) or (self._kind == "image" and isinstance(item, str))
                name = next(free) if not is_path else str(item) if root is None else item_id(item, root)
            yield name, item, {} if metadata is None else metadata[total]
            total += 1
        self._check_lengths(total, ids, metadata)

    def _check_ids(self, ids: Sequence[str]) -> None:
        check_ids(ids)
        if self._existing == "error" and (present := self._index.present(ids)):
            raise id_conflict(item for item in ids if item in present)

    def _check_lengths(self, total: int, ids: Sequence[Any] | None, metadata: Sequence[Any] | None) -> None:
        for name, values in (("ids", ids), ("metadata", metadata)):
            if values is not None and len(values) != total:
                raise InputError(f"expected as many {name} as {self._kind}s, got {len(values)} for {total}")


def refuse_emptied(index: Index, listing: Listing, root: Path, changes: Plan) -> None:
    """Refuse to remove all items of a folder that has no picture, since its disk may be missing.

    Raises:
        InputError: The listing is empty, and the index has items of it.
    """
    if changes.gone and not listing.paths:
        where = (listing.folder and filter_below(listing.folder, root)) or f"{HASH} is not null"
        raise InputError(
            f"expected pictures in the folder, got none, but the index has {len(changes.gone)} from it; nothing was removed. "
            f"Check that its disk is mounted. To remove them anyway: {remedies.remove(index.folder, where)}"
        )


def follow(
    index: Index,
    listing: Listing,
    root: Path,
    preprocess: Preprocess,
    encode_image: Callable[[Tensor], Tensor],
    *,
    sync: bool,
    batch_size: int,
    progress: bool | tqdm[Any],
) -> FolderReport:
    """Bring an index in line with a listing of pictures.

    Args:
        index, listing, root: The same as for :func:`finelip_fast.collection.plan`.
        preprocess, encode_image: The same as for :meth:`Ingest.add_images`.
        sync: Whether to remove items of the listing's folder whose file no longer exists; otherwise they are only counted.
        batch_size: Number of pictures embedded at once.
        progress: Whether to show a progress bar, or the tqdm bar to advance.

    Raises:
        InputError: ``sync`` would remove all items of a folder that now has no picture at all.
        StoreError: The index cannot be read or written; what was written before stays.
    """
    changes = plan(index, listing, root)
    if sync:
        refuse_emptied(index, listing, root, changes)
    report = FolderReport(moved=changes.moved, skipped=[*listing.skipped, *changes.skipped])
    relabel(index, changes.relabelled)
    if sync:
        report.removed = len(change_existing(index, changes.gone, index.delete))
    else:
        report.gone = len(changes.gone)
    fields = {**changes.changed, **changes.new}
    if not fields:
        return report
    ingest = Ingest(index, "image", report, existing="replace", batch_size=batch_size)
    paths = [listing.paths[item] for item in fields]
    chunks = ingest.chunks(paths, list(fields), list(fields.values()), progress=progress)
    with ingest:
        ingest.add_images(chunks, preprocess, encode_image)
    report.separate_changed([str(listing.paths[item]) for item in changes.changed], index.folder)
    return report


@contextmanager
def progress_bar(progress: bool | tqdm[Any], total: int | None, unit: str) -> Iterator[tqdm[Any]]:
    """Yield a new bar, hidden if ``progress`` is False, or the bar that was passed in."""
    if isinstance(progress, bool):
        with tqdm(total=total, unit=unit, disable=not progress, mininterval=0.5) as bar:
            yield bar
    elif not isinstance(progress, tqdm):
        raise InputError(f"expected progress as True, False or a tqdm bar, got {progress!r:.80}")
    else:
        yield progress


def read_picture(
    preprocess: Preprocess, image: Any, *, describes: bool = False
) -> tuple[Tensor | ImageError, dict[str, Any]]:
    """Read a picture.

    Args:
        preprocess: Preprocessing that turns a picture into pixels.
        image: Picture, as :func:`finelip_fast.preprocess.open_image` takes it.
        describes: Whether it is a file whose own metadata (:func:`finelip_fast.picture_files.describe`) is also read.

    Returns:
        Its pixels ``[3, S, S]``, or the error that prevents reading it, and the metadata.
    """
    described: dict[str, Any] = {}
    if describes:
        with suppress(OSError):  # reported as an error of the picture
            # Before the picture is read, so that a file written meanwhile counts as changed later.
            described = describe(image)
    try:
        return preprocess(image), described
    except ImageError as error:
        return error, described


def read_ahead(
    batches: Iterable[list[T]], read_item: Callable[[T], Pixels], pool: ThreadPoolExecutor
) -> Iterator[list[tuple[T, Pixels]]]:
    """Yield each batch as pairs of an item and what was read from it; the next batch is read while one is used.

    Args:
        batches: Lists of items.
        read_item: Function that reads an item, as :func:`read_picture` does.
        pool: Threads to read in; decoding and resizing release the GIL.
    """
    for batch in one_ahead([(item, pool.submit(read_item, item)) for item in batch] for batch in batches):
        yield [(item, future.result()) for item, future in batch]


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Produce the next item before yielding the current one; an error in the next is raised after the current one is used."""
    iterator = iter(items)
    ahead = list(islice(iterator, 1))
    while ahead:
        item, error = ahead.pop(), None
        try:
            ahead = list(islice(iterator, 1))
        except Exception as raised:
            error = raised
        yield item
        if error is not None:
            raise error
