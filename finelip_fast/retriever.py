"""The front door: add pictures or texts, search with either."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice
from os import PathLike
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from finelip_fast._errors import ImageError, InputError
from finelip_fast.engines import Engine, open_engine
from finelip_fast.index import Index, IndexSpec
from finelip_fast.kernels import clim_scores
from finelip_fast.preprocess import scan_folder
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
    """

    id: str
    score: float
    global_score: float
    fine_score: float
    metadata: dict[str, Any]


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

    Searching, scoring and the engine may be used from several threads at once, though not while items are added.

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
    ) -> None:
        if alpha is not None and not 0 <= alpha <= 1:
            raise InputError(f"expected alpha in [0, 1], got {alpha}")
        self._engine = open_engine(engine, checkpoint, device, precision=precision, threads=threads, build=build)
        self.alpha = self._engine.alpha if alpha is None else alpha
        self.overflow = overflow
        config = self._engine.config
        spec = IndexSpec(self._engine.fingerprint, config.tokens, config.embed_dim)
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
        batch_size: int = 64,
        progress: bool = True,
    ) -> AddReport:
        """Embed pictures and add them; one that cannot be read is skipped and reported.

        Args:
            images: A folder, one picture, or any iterable of files, encoded bytes, PIL images, arrays and tensors (see
                :func:`finelip_fast.preprocess.open_image`). Read batch by batch.
            ids: One a picture; None: the path, or ``image-N`` where there is none.
            metadata: One dictionary of JSON values a picture.
            batch_size: Pictures at once.
            progress: Show a progress bar.

        Returns:
            What was added and what was skipped, with reasons.

        Raises:
            InputError: An id that is in the index already, metadata that JSON cannot hold, or lists of different lengths.
                Batches before it are kept.
        """
        report = AddReport()
        if isinstance(images, (str, PathLike)) and Path(images).is_dir():
            scan = scan_folder(images)
            report.skipped += [(str(path), "not a picture by its name") for path in scan.others]
            pictures: Iterable[Any] = scan.images
        else:
            pictures = _listed(images)
        with ThreadPoolExecutor() as pool:  # decoding and resizing release the interpreter's lock
            for chunk in self._chunks(pictures, ids, metadata, batch_size, "image", progress):
                read = pool.map(self._read, [image for _, image, _ in chunk])
                readable = []
                for (item, _, meta), pixels in zip(chunk, read, strict=True):
                    if isinstance(pixels, ImageError):
                        report.skipped.append((item, str(pixels)))
                    else:
                        readable.append((item, meta, pixels))
                if readable:
                    embeddings = self._engine.encode_image(torch.stack([pixels for *_, pixels in readable]))
                    self._add(report, [(item, meta) for item, meta, _ in readable], embeddings)
        return report

    def add_texts(
        self,
        texts: Iterable[str] | str,
        *,
        ids: Sequence[str] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        batch_size: int = 64,
        progress: bool = True,
    ) -> AddReport:
        """Embed texts and add them. Arguments as :meth:`add_images`; default ids are ``text-N``."""
        report = AddReport()
        texts = [texts] if isinstance(texts, str) else texts
        for chunk in self._chunks(texts, ids, metadata, batch_size, "text", progress):
            embeddings = self._engine.embed_texts(
                [text for _, text, _ in chunk], batch_size=batch_size, overflow=self.overflow
            )
            self._add(report, [(item, meta) for item, _, meta in chunk], embeddings)
        return report

    def delete(self, ids: Sequence[str] | str) -> None:
        """Take items out of the index; with a folder, they are gone for every later opening when this returns.

        Raises:
            InputError: An id that is not there; nothing was taken out.
            StoreError: The index cannot be written.
        """
        self.index.delete([ids] if isinstance(ids, str) else list(ids))

    @overload
    def search(self, text: str, *, k: int = 10) -> list[Hit]: ...
    @overload
    def search(self, text: list[str] | tuple[str, ...], *, k: int = 10) -> list[list[Hit]]: ...
    @overload
    def search(self, *, image: Any, k: int = 10) -> Any: ...

    def search(self, text: str | list[str] | tuple[str, ...] | None = None, *, image: Any = None, k: int = 10) -> Any:
        """Find the best items for a text or a picture.

        Args:
            text: One description or a list of them. An empty one is a query like any other.
            image: Instead of a text: one picture or a list of them.
            k: How many hits; fewer come back when the index holds fewer.

        Returns:
            Hits best first, ties in order of insertion: a list for one query, a list of lists for a list.

        Raises:
            InputError: Not exactly one of text and image, a text that is no string, or ``k < 1``.
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
        hits = self._hits(embedded.to(self.index.device, torch.float16), k)
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

    def _hits(self, queries: Tensor, k: int) -> list[list[Hit]]:
        scores, positions = self.index.search(queries, k, alpha=self.alpha)
        if not positions.numel():
            return [[] for _ in queries]
        result = []
        for query, own_scores, own_positions in zip(queries, scores, positions, strict=True):
            found = self.index.embeddings[own_positions]
            parts = [clim_scores(query[None], found, alpha=alpha)[0].tolist() for alpha in (1.0, 0.0)]
            rows = zip(own_positions.tolist(), own_scores.tolist(), *parts, strict=True)
            result.append([self._hit(*row) for row in rows])
        return result

    def _hit(self, position: int, score: float, global_score: float, fine_score: float) -> Hit:
        return Hit(self.index.ids[position], score, global_score, fine_score, self.index.metadata[position])

    def _add(self, report: AddReport, items: list[tuple[str, dict[str, Any]]], embeddings: Tensor) -> None:
        ids = [item for item, _ in items]
        self.index.add(ids, embeddings, [meta for _, meta in items])
        report.added += ids

    def _chunks(
        self,
        items: Iterable[Any],
        ids: Sequence[str] | None,
        metadata: Sequence[dict[str, Any]] | None,
        size: int,
        kind: str,
        progress: bool,
    ) -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
        """``(id, item, metadata)`` in lists of ``size``; refuses repeated ids and lists that do not match before work."""
        if size < 1:
            raise InputError(f"expected batch_size of at least 1, got {size}")
        total = len(items) if isinstance(items, Sized) else None
        if total is not None:
            _check_lengths(kind, total, ids, metadata)
        if ids is not None:
            self.index.check_ids(ids)
        named = self._named(items, ids, metadata, kind)
        iterator = iter(tqdm(named, total=total, unit=kind, disable=not progress, mininterval=0.5))
        while chunk := list(islice(iterator, size)):
            yield chunk

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


def _check_lengths(kind: str, total: int, ids: Sequence[Any] | None, metadata: Sequence[Any] | None) -> None:
    for name, given in (("ids", ids), ("metadata", metadata)):
        if given is not None and len(given) != total:
            raise InputError(f"expected as many {name} as {kind}s, got {len(given)} for {total}")
