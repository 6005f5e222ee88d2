"""The front door: add pictures or texts, search with either."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from finelip_fast._errors import ImageError, InputError
from finelip_fast.engines import Engine, open_engine
from finelip_fast.index import Index, IndexSpec, stored_dtype
from finelip_fast.kernels import clim_scores
from finelip_fast.preprocess import walk_folder
from finelip_fast.tokenizer import Overflow


@dataclass(frozen=True)
class Hit:
    """One found item.

    Attributes:
        id: What it was added as.
        score: ``alpha * global_score + (1 - alpha) * fine_score``; hits are ordered by it.
        global_score: Cosine of the two global embeddings, in [-1, 1].
        fine_score: Late interaction of all tokens in both directions, in [-0.2, 2].
        metadata: What was given with it.
        mode: How it was found: ``"exact"``, ``"exact-int8"`` (the same result) or ``"two-stage"``.
    """

    id: str
    score: float
    global_score: float
    fine_score: float
    metadata: dict[str, Any]
    mode: str = "exact"


@dataclass
class AddReport:
    """What became of the items given to ``add_images`` or ``add_texts``.

    Attributes:
        added: Ids, in order.
        skipped: ``(id, reason)`` of what could not be read.
    """

    added: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.added)} added, {len(self.skipped)} skipped"]
        return "\n".join(lines + [f"  {item}: {reason}" for item, reason in self.skipped])


Existing = Literal["error", "skip", "replace"]

# How much is gathered before it is kept: embeddings, and seconds of work that a killed process may lose.
_KEPT_BYTES, _KEPT_SECONDS = 1 << 26, 30.0


class Retriever:
    """Search pictures with long descriptions, and in the three other directions.

    Args:
        checkpoint: A checkpoint folder or file, an open_clip or hub name (see :func:`finelip_fast.load`); None: the bundled
            model, which knows drawn street scenes only.
        engine: ``"torch"``, ``"onnx"`` or ``"trt"``, or an error where that one cannot run; ``"auto"``: the fastest of those
            that are here, as timed once on this machine. ONNX and TensorRT run what ``finelip export`` wrote beside the
            checkpoint.
        index: Folder that keeps the items; None keeps them in memory.
        device: None takes a GPU if there is one.
        alpha: Weight of the global cosine in the score; None: the checkpoint's own, 0.8 with trained aggregators and 1
            without.
        overflow: What happens to texts longer than the context: ``"truncate"`` (warns), ``"error"`` or ``"window"``.
        precision: Of the exported files: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``; None: the fastest of those there.
        threads: Of ONNX Runtime on the CPU; None: as many as PyTorch uses.
        build: Export what is asked for where it is not there yet; takes a minute or more.
        dtype: How a new index keeps embeddings: ``"float16"``, or ``"int8"``, half the size; None: as the index that is there.

    May be used from several threads at once; several processes may have the same index open.

    Raises:
        EngineError, CheckpointError, StoreError: What was asked for cannot be opened; says why and what to do.

    Example:
        >>> retriever = finelip_fast.Retriever()
        >>> retriever.add_images("photos/")
        >>> retriever.search("A red house with two floors stands on the left …", k=3)
    """

    def __init__(
        self,
        checkpoint: str | PathLike[str] | None = None,
        *,
        engine: str = "auto",
        index: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        alpha: float | None = None,
        overflow: Overflow = "truncate",
        precision: str | None = None,
        threads: int | None = None,
        build: bool = False,
        dtype: str | None = None,
    ) -> None:
        if alpha is not None and not 0 <= alpha <= 1:
            raise InputError(f"expected alpha in [0, 1], got {alpha}")
        self._engine = open_engine(engine, checkpoint, device, precision=precision, threads=threads, build=build)
        self.alpha = self._engine.alpha if alpha is None else alpha
        self.overflow = overflow
        config = self._engine.config
        dtype = dtype or (None if index is None else stored_dtype(index)) or "float16"
        spec = IndexSpec(self._engine.fingerprint, config.tokens, config.embed_dim, self._engine.alpha, dtype)
        self.index = Index(spec, index, source=self._engine.source, device=self._engine.device)

    @property
    def engine(self) -> Engine:
        """The engine in use; printed, it says what runs, on what, and why it was chosen."""
        return self._engine

    def __len__(self) -> int:
        return len(self.index)

    def add_images(
        self,
        images: Iterable[Any] | str | PathLike[str],
        *,
        ids: Sequence[str] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        existing: Existing = "error",
        batch_size: int = 64,
        progress: bool | tqdm[Any] = True,
    ) -> AddReport:
        """Embed pictures and add them; one that cannot be read is skipped and reported.

        With an index folder, what was added is kept from time to time: at least every 30 seconds, and 64 MiB of embeddings. A
        job that was stopped goes on with ``existing="skip"``.

        Args:
            images: A folder, one picture, or any iterable of files, encoded bytes, PIL images, arrays and tensors (see
                :func:`finelip_fast.preprocess.open_image`). Read batch by batch.
            ids: One a picture; None: the path, or ``image-N`` where there is none.
            metadata: One dictionary of JSON values a picture.
            existing: Of ids that are in the index already: an ``"error"``, ``"skip"`` them, or ``"replace"`` the items.
            batch_size: Pictures at once.
            progress: Show a progress bar; or one of tqdm's to move.

        Returns:
            What was added and what was skipped, with reasons.

        Raises:
            InputError: An id that is in the index already, metadata that JSON cannot hold, or lists of different lengths.
                Batches before it are kept.
            StoreError: The index cannot be written; the report of what was kept is lost, and ``existing="skip"`` finds it.
        """
        report = AddReport()
        total = None
        if isinstance(images, (str, PathLike)) and Path(images).is_dir():
            total = sum(kind == "image" for _, kind in walk_folder(images))
            pictures: Iterable[Any] = _pictures(images, report)
        else:
            pictures = _listed(images)
        pending: set[str] = set()
        chunks = self._chunks(pictures, total, ids, metadata, existing, pending, batch_size, "image", progress)
        with ThreadPoolExecutor() as pool, self._adding(report, existing, pending) as add:
            for chunk in _one_ahead(self._decoded(pool, chunk) for chunk in chunks):
                readable = []
                for item, meta, future in chunk:
                    pixels = future.result()
                    if isinstance(pixels, ImageError):
                        report.skipped.append((item, str(pixels)))
                    else:
                        readable.append((item, meta, pixels))
                if readable:
                    embeddings = self._engine.encode_image(torch.stack([pixels for *_, pixels in readable]))
                    add([item for item, *_ in readable], embeddings, [meta for _, meta, _ in readable])
        return report

    def add_texts(
        self,
        texts: Iterable[str] | str,
        *,
        ids: Sequence[str] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        existing: Existing = "error",
        batch_size: int = 64,
        progress: bool | tqdm[Any] = True,
    ) -> AddReport:
        """Embed texts and add them. Arguments as :meth:`add_images`; default ids are ``text-N``."""
        report = AddReport()
        texts = [texts] if isinstance(texts, str) else texts
        pending: set[str] = set()
        chunks = self._chunks(texts, None, ids, metadata, existing, pending, batch_size, "text", progress)
        with self._adding(report, existing, pending) as add:
            for chunk in chunks:
                embeddings = self._engine.embed_texts(
                    [text for _, text, _ in chunk], batch_size=batch_size, overflow=self.overflow
                )
                add([item for item, *_ in chunk], embeddings, [meta for *_, meta in chunk])
        return report

    def delete(self, ids: Sequence[str] | str) -> None:
        """Take items out of the index; with a folder, they are gone for every later opening when this returns.

        Raises:
            InputError: An id that is not there; nothing was taken out.
            StoreError: The index cannot be written.
        """
        self.index.delete([ids] if isinstance(ids, str) else list(ids))

    @overload
    def search(self, text: str, *, k: int = 10, mode: str = "auto", where: str | None = None) -> list[Hit]: ...
    @overload
    def search(
        self, text: list[str] | tuple[str, ...], *, k: int = 10, mode: str = "auto", where: str | None = None
    ) -> list[list[Hit]]: ...
    @overload
    def search(self, *, image: Any, k: int = 10, mode: str = "auto", where: str | None = None) -> Any: ...

    def search(
        self,
        text: str | list[str] | tuple[str, ...] | None = None,
        *,
        image: Any = None,
        k: int = 10,
        mode: str = "auto",
        where: str | None = None,
    ) -> Any:
        """Find the best items for a text or a picture.

        Args:
            text: One description or a list of them. An empty one is a query like any other.
            image: Instead of a text: one picture or a list of them.
            k: How many hits; fewer come back when there are fewer.
            mode: ``"exact"``; ``"exact-int8"``, the same result from half the bytes; ``"two-stage"``, which may miss some;
                ``"auto"``: two stages where ``finelip index tune`` has measured that little enough is missed, else exact. See
                :mod:`finelip_fast.index.search`.
            where: Search only items whose metadata fit: ``"camera = 'front' and year >= 2024"``. See
                :mod:`finelip_fast.index.filters`.

        Returns:
            Hits best first, ties in order of insertion: a list for one query, a list of lists for a list.

        Raises:
            InputError: Not exactly one of text and image, a text that is no string, ``k < 1``, no such mode, or a filter that
                cannot be read.
            ImageError: A query picture that cannot be read.
        """
        if (text is None) == (image is None):
            raise InputError("expected either a text or image=..., " + ("got neither" if text is None else "got both"))
        if k < 1:
            raise InputError(f"expected k of at least 1, got {k}")
        given = image if text is None else text
        many = isinstance(given, (list, tuple))
        queries: list[Any] = list(given) if many else [given]
        if not queries:
            return []
        if text is None:
            embedded = self._engine.embed_images(queries)
        else:
            embedded = self._engine.embed_texts(queries, overflow=self.overflow)
        hits = self._hits(embedded, k, mode, where)
        return hits if many else hits[0]

    def score(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Score every picture against every text, without the index.

        Returns:
            float32 ``[n_images, n_texts]``.
        """
        images, texts = list(_listed(images)), [texts] if isinstance(texts, str) else list(texts)
        if not images or not texts:
            return torch.zeros(len(images), len(texts))
        embedded = self._engine.embed_images(images)
        return clim_scores(embedded, self._engine.embed_texts(texts, overflow=self.overflow), alpha=self.alpha)

    def _read(self, image: Any) -> Tensor | ImageError:
        try:
            return self._engine.preprocess(image)
        except ImageError as error:
            return error

    def _hits(self, queries: Tensor, k: int, mode: str, where: str | None) -> list[list[Hit]]:
        found = self.index.search(queries, k, alpha=self.alpha, mode=mode, where=where)
        return [
            [
                Hit(item.id, score, global_score, fine_score, item.metadata, found.mode)
                for item, score, global_score, fine_score in zip(items, *scores, strict=True)
            ]
            for items, *scores in zip(
                found.items,
                found.scores.tolist(),
                found.global_scores.tolist(),
                found.fine_scores.tolist(),
                strict=True,
            )
        ]

    def _decoded(
        self, pool: ThreadPoolExecutor, chunk: list[tuple[str, Any, dict[str, Any]]]
    ) -> list[tuple[str, dict[str, Any], Future[Tensor | ImageError]]]:
        # Decoding and resizing release the interpreter's lock.
        return [(item, meta, pool.submit(self._read, image)) for item, image, meta in chunk]

    @contextmanager
    def _adding(self, report: AddReport, existing: Existing, pending: set[str]) -> Iterator[Callable[..., None]]:
        """Gathers batches to segments worth a file; what was gathered is kept even when the next batch fails.

        ``pending`` are the ids that may be on their way into the index; those that have arrived are taken out.
        """
        put = self.index.upsert if existing == "replace" else self.index.add
        batches: list[tuple[list[str], Tensor, list[dict[str, Any]]]] = []
        since = time.monotonic()

        def keep() -> None:
            nonlocal since
            if batches:
                ids = [item for some, *_ in batches for item in some]
                put(ids, torch.cat([some for _, some, _ in batches]), [meta for *_, some in batches for meta in some])
                report.added += ids
                pending.difference_update(ids)
                batches.clear()
            since = time.monotonic()

        def add(ids: list[str], embeddings: Tensor, metadata: list[dict[str, Any]]) -> None:
            batches.append((ids, embeddings.to("cpu", torch.float16), metadata))
            enough = sum(some.nbytes for _, some, _ in batches) >= _KEPT_BYTES
            if enough or time.monotonic() - since >= _KEPT_SECONDS:
                keep()

        try:
            yield add
        finally:
            keep()

    def _chunks(
        self,
        items: Iterable[Any],
        total: int | None,
        ids: Sequence[str] | None,
        metadata: Sequence[dict[str, Any]] | None,
        existing: Existing,
        pending: set[str],
        size: int,
        kind: str,
        progress: bool | tqdm[Any],
    ) -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
        """``(id, item, metadata)`` in lists of ``size``; refuses repeated ids and lists that do not match before work."""
        if size < 1:
            raise InputError(f"expected batch_size of at least 1, got {size}")
        if existing not in get_args(Existing):
            raise InputError(f"expected existing among {', '.join(get_args(Existing))}, got {existing!r}")
        if isinstance(items, Sized):
            total = len(items)
            _check_lengths(kind, total, ids, metadata)
        if ids is not None:
            self.index.check_ids(ids, replace=existing != "error")
        return self._listed_chunks(
            self._named(items, ids, metadata, kind), total, existing, pending, size, kind, progress
        )

    def _listed_chunks(
        self,
        named: Iterator[tuple[str, Any, dict[str, Any]]],
        total: int | None,
        existing: Existing,
        pending: set[str],
        size: int,
        kind: str,
        progress: bool | tqdm[Any],
    ) -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
        with _bar(progress, total, kind) as bar:
            while chunk := list(islice(named, size)):
                ids = [item for item, *_ in chunk]
                if existing == "error":
                    self.index.check_ids(ids)
                there = pending if existing == "replace" else pending | self.index.catalogue.find(ids).keys()
                if existing != "skip" and not there.isdisjoint(ids):
                    again = next(item for item in ids if item in there)
                    raise InputError(f"expected ids that differ, got {again!r} again; give each item once")
                new = [one for one in chunk if one[0] not in there]
                pending.update(item for item, *_ in new)
                if new:
                    yield new
                bar.update(len(chunk))

    def _named(
        self, items: Iterable[Any], ids: Sequence[str] | None, metadata: Sequence[dict[str, Any]] | None, kind: str
    ) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        """Give each item its id and metadata; of a generator, the lengths show only here."""
        free = (name for number in count(len(self)) if (name := f"{kind}-{number}") not in self.index)
        total = 0
        for item in items:
            if any(given is not None and len(given) == total for given in (ids, metadata)):
                _check_lengths(kind, total + 1, ids, metadata)
            if ids is not None:
                name = ids[total]
            else:
                is_path = isinstance(item, PathLike) or (kind == "image" and isinstance(item, str))
                name = str(item) if is_path else next(free)
            yield name, item, {} if metadata is None else metadata[total]
            total += 1
        _check_lengths(kind, total, ids, metadata)


def _listed(images: Any) -> Any:
    """One picture as a list of it; lists, generators and stacks of pictures as they are."""
    single = isinstance(images, (str, PathLike, bytes, bytearray, memoryview, Image.Image))
    return [images] if single or getattr(images, "ndim", None) in (2, 3) else images


def _pictures(folder: str | PathLike[str], report: AddReport) -> Iterator[Path]:
    """The images of a folder; what is none is reported."""
    for path, kind in walk_folder(folder):
        if kind == "image":
            yield path
        else:
            reason = "not a picture by its name" if kind == "other" else "a folder that cannot be listed"
            report.skipped.append((str(path), reason))


@contextmanager
def _bar(progress: bool | tqdm[Any], total: int | None, unit: str) -> Iterator[tqdm[Any]]:
    if isinstance(progress, bool):
        with tqdm(total=total, unit=unit, disable=not progress, mininterval=0.5) as bar:
            yield bar
    else:
        yield progress


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The next item is made before this one is used."""
    iterator = iter(items)
    ahead = list(islice(iterator, 1))
    while ahead:
        item = ahead.pop()
        ahead = list(islice(iterator, 1))
        yield item


def _check_lengths(kind: str, total: int, ids: Sequence[Any] | None, metadata: Sequence[Any] | None) -> None:
    for name, given in (("ids", ids), ("metadata", metadata)):
        if given is not None and len(given) != total:
            raise InputError(f"expected as many {name} as {kind}s, got {len(given)} for {total}")
