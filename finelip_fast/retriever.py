"""The main interface: add pictures or texts, search with either."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast import known_checkpoints
from finelip_fast._arguments import Embeddings, folder_path, listed, one_of, share, whole_number
from finelip_fast.collection import (
    Listing,
    fields_of,
    list_files,
    list_folder,
    list_table,
    picture_path,
    prepare_root,
    read_fields,
    root_of,
)
from finelip_fast.embedder import Embedder
from finelip_fast.engines import EngineName
from finelip_fast.errors import InputError, StoreError
from finelip_fast.explain import Explanation
from finelip_fast.folders import refuse_missing, walk_folder
from finelip_fast.hits import Hit, Hits, hits_of
from finelip_fast.index import Existing, Index, IndexSpec, StoredDtype, remedies, stored_dtype, stored_source
from finelip_fast.index.search import Mode
from finelip_fast.index.segments import DTYPES
from finelip_fast.ingest import Ingest, as_images, follow
from finelip_fast.preprocess import ImageSource
from finelip_fast.reports import AddReport, FolderReport
from finelip_fast.runtimes.manifest import Precision
from finelip_fast.tokenizer import Overflow

Picture = TypeVar("Picture", bound=ImageSource)
Texts: TypeAlias = "list[str] | tuple[str, ...] | Iterator[str] | np.ndarray[Any, Any]"


class Retriever(Embedder):
    """Search pictures with long descriptions, and in the three other directions.

    Args:
        checkpoint: Checkpoint folder or file, or an open_clip or hub name (see :func:`finelip_fast.load`); None: the bundled
            model, which knows drawn street scenes only.
        engine: ``"torch"``, ``"onnx"`` or ``"trt"``, which raise an error if they cannot run; ``"auto"``: the fastest of those
            available, as timed once on this machine. ONNX and TensorRT run what ``finelip export`` wrote beside the
            checkpoint.
        index: Folder that stores the items; None: they are kept in memory.
        device: Device of the model; None: a GPU if there is one.
        alpha: Weight of the global cosine in the score, in [0, 1]; None: the checkpoint's own, which is 1, the only
            possible value, without trained aggregators.
        overflow: Treatment of texts longer than the context: ``"truncate"`` (warns), ``"error"`` or ``"window"``.
        precision: Precision of exported files, ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"int8"``, or of ``"torch"`` on a CPU,
            ``"fp32"``, ``"bf16"`` or ``"int8"``; an error if no engine has it. None: the fastest file available, or
            ``"fp32"``.
        threads: Number of ONNX Runtime threads on the CPU; None: as many as PyTorch uses.
        build: Whether to export missing files that ``engine`` and ``precision`` need; takes a minute or more.
        dtype: Format in which a new index stores embeddings: ``"float16"``, or ``"int8"`` at half the size (aggregated rows
            only: global ones stay in float16); None: the format of the index if it exists, else ``"float16"``.
        verify: Whether to compare every embedding of the index folder with its checksum before the first search; otherwise
            a search checks only the hits it returns.

    A retriever may be used from several threads at once, and several processes may have the same index open. With an index
    folder it can be pickled: unpickling opens the same folder again. In a forked process it raises EngineError.

    Opening a checkpoint by name together with an index folder allows ``finelip`` to load that checkpoint for an index,
    see :mod:`finelip_fast.known_checkpoints`.

    Raises:
        InputError: An argument is out of range, such as an ``alpha`` outside [0, 1], or below 1 without trained aggregators.
        EngineError, CheckpointError, StoreError: The engine, the checkpoint or the index cannot be opened; the message says
            why and what to do.

    Example:
        >>> retriever = finelip_fast.Retriever()
        >>> retriever.add_images("photos/")
        >>> retriever.search("A red house with two floors stands on the left …", k=3)
    """

    def __init__(
        self,
        checkpoint: str | PathLike[str] | None = None,
        *,
        engine: EngineName = "auto",
        index: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        alpha: float | None = None,
        overflow: Overflow = "truncate",
        precision: Precision | None = None,
        threads: int | None = None,
        build: bool = False,
        dtype: StoredDtype | None = None,
        verify: bool = False,
    ) -> None:
        if index is not None:
            folder_path("index", index)
        if dtype is not None:
            one_of("dtype", dtype, DTYPES)
        super().__init__(
            checkpoint,
            engine=engine,
            device=device,
            alpha=alpha,
            overflow=overflow,
            precision=precision,
            threads=threads,
            build=build,
        )
        self._folder = None if index is None else Path(index).absolute()
        self._verify = verify
        config = self._engine.config
        dtype = dtype or (None if index is None else stored_dtype(index)) or "float16"
        spec = IndexSpec(self._engine.fingerprint, config.tokens, config.embed_dim, self._engine.alpha, dtype)
        if index is not None:
            spec = spec.as_stored(index)
        self._index = Index(spec, index, source=self._engine.source, device=self._engine.device, verify=verify)
        if index is not None and checkpoint is not None:
            known_checkpoints.note(self._engine.source, self._engine.fingerprint)

    @classmethod
    def open(
        cls,
        index: str | PathLike[str],
        *,
        engine: EngineName = "auto",
        device: str | torch.device | None = None,
        alpha: float | None = None,
        overflow: Overflow = "truncate",
        precision: Precision | None = None,
        threads: int | None = None,
        build: bool = False,
        verify: bool = False,
    ) -> Retriever:
        """Open an index folder with the checkpoint that made it, as the command line does.

        The folder names that checkpoint. It is loaded only if this user has opened it by name before, together with an
        index, and its fingerprint is still the one in the folder; see :mod:`finelip_fast.known_checkpoints`.

        Args:
            index: Folder of an index.
            engine, device, alpha, overflow, precision, threads, build, verify: The same as for :class:`Retriever`.

        Raises:
            StoreError: There is no index, or it names a checkpoint that this user has not opened or that came with it.
            InputError, EngineError, CheckpointError: The same as for :class:`Retriever`.

        Example:
            >>> finelip_fast.Retriever("checkpoint", index="index").add_images("photos/")
            >>> finelip_fast.Retriever.open("index").search("A red house …")
        """
        folder_path("index", index)
        if stored_source(index) is None:
            raise StoreError(f"there is no index at {index}: make one with Retriever(checkpoint, index={str(index)!r})")
        return cls(
            known_checkpoints.checkpoint_of(index),
            engine=engine,
            index=index,
            device=device,
            alpha=alpha,
            overflow=overflow,
            precision=precision,
            threads=threads,
            build=build,
            verify=verify,
        )

    def __enter__(self) -> Retriever:
        self.index.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index; items in a folder stay there."""
        self._index.close()

    def __repr__(self) -> str:
        return f"<Retriever of {self._index!r} by {self._engine}>"

    @property
    def index(self) -> Index:
        """The index that holds the items."""
        self._refuse_after_fork()
        return self._index

    def __reduce__(self) -> tuple[Callable[[], Retriever], tuple[()]]:
        """Pickle the arguments: unpickling opens the same folder with the same engine.

        Raises:
            InputError: The index is in memory.
        """
        settings = self.engine.settings
        if self._folder is None:
            raise InputError("a retriever with an in-memory index cannot be pickled; open it with index=FOLDER")
        opening = partial(
            Retriever,
            settings.pop("checkpoint"),
            engine=settings.pop("name"),
            index=self._folder,
            alpha=self.alpha,
            overflow=self.overflow,
            verify=self._verify,
            **settings,
        )
        return opening, ()

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
        """Embed pictures and add them; a picture that cannot be read is skipped and reported.

        An index folder is written to at least every 30 seconds and every 64 MiB of embeddings. To resume a job that was
        stopped, run it again with ``existing="skip"``.

        Args:
            images: Folder, one picture, or an iterable of files, encoded bytes, PIL images, arrays and tensors (see
                :func:`finelip_fast.preprocess.open_image`), read batch by batch.
            ids: An id for each picture; None: its path, relative to the index's root if that is known, or ``image-N`` if it
                has no path.
            metadata: A dictionary of JSON values for each picture, checked before anything is embedded. A file whose id is
                its path also gets its file's metadata, and one of a folder that of the JSON file beside it, as by
                :meth:`add_folder`.
            existing: Treatment of an id that is already in the index: ``"error"``, ``"skip"`` the picture, or ``"replace"``
                the item, which stays if the picture cannot be read.
            batch_size: Number of pictures embedded at once.
            progress: Whether to show a progress bar, or the tqdm bar to advance.

        Returns:
            Ids of the pictures added, and those skipped, with the reason.

        Raises:
            InputError: There is nothing at the path, an id is already in the index, metadata cannot be written as JSON, or
                lists differ in length; raised before any work if the lists show it. If a generator shows it later, earlier
                batches stay.
            StoreError: The index cannot be written. What was written before stays, and ``existing="skip"`` resumes from it.
        """
        refuse_missing(images)
        report = AddReport()
        if isinstance(images, (str, PathLike)) and os.path.isdir(images):
            listing = list_folder(images, prepare_root(self.index, [images]), index=self._folder)
            report.skipped += listing.skipped
            ids, images = list(listing.paths) if ids is None else ids, list(listing.paths.values())
            metadata = _with_sidecars(listing, metadata)
        ingest = Ingest(self.index, "image", report, existing=existing, batch_size=batch_size)
        chunks = ingest.chunks(as_images(images), ids, metadata, progress=progress)
        with ingest:
            ingest.add_images(chunks, self.engine.preprocess, self.engine.encode_image)
        return report

    def add_folder(
        self,
        folder: str | PathLike[str],
        *,
        sync: bool = False,
        exclude: Collection[str] = (),
        include: Collection[str] = (),
        metadata: str | PathLike[str] | None = None,
        batch_size: int = 64,
        progress: bool | tqdm[Any] = True,
    ) -> FolderReport:
        """Bring the index in line with the pictures in a folder and its subfolders, however many.

        New and changed pictures are embedded; a file that was moved keeps its embedding. A later call reads only the files
        whose size or time has changed. The id of a picture is its path relative to the index's root, which is the first folder
        that was added; its metadata comes from the file and the camera, see :func:`finelip_fast.picture_files.describe`, and
        from a JSON file beside it, ``a.jpg.json`` or ``a.json``.

        Args:
            folder: Folder of pictures.
            sync: Whether to remove items of the folder whose file no longer exists; otherwise they are only counted.
            exclude: Patterns of names or paths below the folder to leave out, such as ``"*.png"`` or ``"2019/scans"``.
            include: Patterns of names or paths to include although they are hidden or left out by default
                (:data:`finelip_fast.folders.LEFT_OUT`).
            metadata: Table of additional metadata, JSON Lines or CSV, with a column of paths relative to the folder.
            batch_size: Number of pictures embedded at once.
            progress: Whether to show a progress bar, or the tqdm bar to advance.

        Returns:
            Numbers of pictures added, changed and moved, and those skipped, with the reason.

        Raises:
            InputError: There is no such folder, the patterns are not lists, the table cannot be read, or ``sync`` would remove
                all items of a folder that now has no picture at all.
            StoreError: The index cannot be written; what was written before stays.
        """
        walk_folder(folder, exclude=exclude, include=include)  # raises an error before anything is changed
        root = root_of(self.index, [folder])
        fields = None if metadata is None else read_fields(metadata, root, base=folder)
        listing = list_folder(folder, root, exclude=exclude, include=include, fields=fields, index=self._folder)
        prepare_root(self.index, [root])  # after all that may fail: what failed leaves no root
        return self._follow(listing, root, sync, batch_size, progress)

    def add_files(
        self,
        files: Iterable[str | PathLike[str]],
        *,
        batch_size: int = 64,
        progress: bool | tqdm[Any] = True,
    ) -> FolderReport:
        """Bring the index in line with picture files, as :meth:`add_folder` does with those of a folder.

        The root of a new index is the folder of the files, or the common parent of their folders.

        Args:
            files: Paths of pictures.
            batch_size: Number of pictures embedded at once.
            progress: Whether to show a progress bar, or the tqdm bar to advance.

        Returns:
            Numbers of pictures added, changed and moved, and those skipped, with the reason.

        Raises:
            InputError: ``files`` is not a list of paths, or is empty.
            StoreError: The index cannot be written; what was written before stays.
        """
        paths = [folder_path("a file", file) for file in listed("files", files)]
        if not paths:
            raise InputError("expected files with at least one path, got none")
        root = prepare_root(self.index, [path.absolute().parent for path in paths])
        return self._follow(list_files(paths, root), root, False, batch_size, progress)

    def add_table(
        self,
        table: str | PathLike[str],
        *,
        root: str | PathLike[str] | None = None,
        image_field: str | None = None,
        batch_size: int = 64,
        progress: bool | tqdm[Any] = True,
    ) -> FolderReport:
        """Bring the index in line with the pictures that a table names; its other columns are their metadata.

        Args:
            table: JSON Lines or CSV, see :func:`finelip_fast.picture_tables.read_rows`.
            root: Folder that the paths are relative to; None: that of the table.
            image_field: Name of the path column; None: ``image``, ``file``, ``path`` or the like.
            batch_size: Number of pictures embedded at once.
            progress: Whether to show a progress bar, or the tqdm bar to advance.

        Returns:
            Numbers of pictures added, changed and moved, and those skipped, with the reason.

        Raises:
            InputError: The table cannot be read, or a row names no picture.
            StoreError: The index cannot be written; what was written before stays.
        """
        table = folder_path("table", table)
        base = table.parent if root is None else folder_path("root", root)
        index_root = root_of(self.index, [base])
        listing = list_table(table, index_root, base=base, image_field=image_field)
        prepare_root(self.index, [index_root])  # as in add_folder
        return self._follow(listing, index_root, False, batch_size, progress)

    def _follow(
        self, listing: Listing, root: Path, sync: bool, batch_size: int, progress: bool | tqdm[Any]
    ) -> FolderReport:
        return follow(
            self.index,
            listing,
            root,
            self.engine.preprocess,
            self.engine.encode_image,
            sync=sync,
            batch_size=batch_size,
            progress=progress,
        )

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
        """Embed texts and add them. The arguments are those of :meth:`add_images`; ids default to ``text-N``.

        Raises:
            InputError: ``texts`` is not an iterable of strings, or as for :meth:`add_images`.
            StoreError: As for :meth:`add_images`.
        """
        if isinstance(texts, dict):
            raise InputError("expected texts to be a list, got a dict; pass list(texts.values()) with ids=list(texts)")
        texts = [texts] if isinstance(texts, str) else texts
        report = AddReport()
        ingest = Ingest(self.index, "text", report, existing=existing, batch_size=batch_size)
        chunks = ingest.chunks(texts, ids, metadata, progress=progress)
        with ingest:
            for chunk in chunks:
                embeddings = self.engine.embed_texts(
                    [text for _, text, _ in chunk], batch_size=batch_size, overflow=self.overflow
                )
                ingest.add([item for item, *_ in chunk], embeddings, [meta for *_, meta in chunk])
        return report

    def delete(self, ids: Sequence[str] | str) -> None:
        """Delete items from the index. Once this returns, they are gone from an index folder for good.

        Raises:
            InputError: An id is not in the index; nothing is deleted.
            StoreError: The index cannot be written.
        """
        self.index.delete([ids] if isinstance(ids, str) else ids)

    @overload
    def search(
        self, text: str, *, k: int = 10, mode: Mode = "auto", where: str | None = None, alpha: float | None = None
    ) -> Hits: ...
    @overload
    def search(
        self,
        text: Texts,
        *,
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> list[Hits]: ...
    @overload
    def search(
        self,
        *,
        image: ImageSource,
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> Hits: ...
    @overload
    def search(
        self,
        *,
        image: list[Picture] | tuple[Picture, ...] | Iterator[Picture],
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> list[Hits]: ...

    def search(
        self,
        text: str | Texts | None = None,
        *,
        image: ImageSource | list[Picture] | tuple[Picture, ...] | Iterator[Picture] | None = None,
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> Hits | list[Hits]:
        """Find the best items for a text or a picture.

        Args:
            text: Description, or several in a list or another iterable. An empty string is a query like any other.
            image: Picture to search by instead of a text, or several in a list or another iterable.
            k: Number of hits; fewer are returned where the index has fewer.
            mode: ``"exact"``; ``"exact-int8"``, the same result from half the bytes; ``"two-stage"``, which may miss hits;
                ``"sketch"``, two stages of which the first compares tokens, too, and misses fewer hits if these matter;
                ``"auto"``: whichever of these two ``finelip index tune`` has chosen, if it measured that few enough hits are
                missed, else exact. See :mod:`finelip_fast.index.search`.
            where: Expression that the metadata of items must satisfy: ``"camera = 'front' and year >= 2024"``. See
                :mod:`finelip_fast.index.filters`.
            alpha: Weight of the global cosine in this search; None: the retriever's.

        Returns:
            Hits, best first, ties in order of insertion: a list for one query, a list of lists for several. A
            notebook shows them with thumbnails. There are ``k`` of them even if nothing matches: see ``Hit.stands_out``.

        Raises:
            InputError: Both or neither of text and image are given, a text is not a string, ``k`` is not an integer or below
                1, the mode is unknown, the filter cannot be parsed, or the checkpoint has no scores for ``alpha``.
            ImageError: A query picture cannot be read.
        """
        if (text is None) == (image is None):
            raise InputError("expected either a text or image=..., " + ("got neither" if text is None else "got both"))
        options = self._search_options(k, mode, where, alpha)
        name, query = ("image", image) if text is None else ("text", text)
        several = isinstance(query, Iterable) and not isinstance(query, (str, bytes)) and as_images(query) is query
        queries: list[Any] = listed(name, query) if several else [query]
        if not queries:
            return []
        if text is None:
            embedded = self.engine.embed_images(queries)
        else:
            embedded = self.engine.embed_texts(queries, overflow=self.overflow)
        hits = self._hits(embedded, **options)
        return hits if several else hits[0]

    def search_embeddings(
        self,
        queries: Embeddings,
        *,
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> list[Hits]:
        """Find the best items for embeddings from :meth:`encode_texts`, :meth:`encode_images` or ``Index.embeddings_of``.

        Args:
            queries: Embeddings ``[Q, L, D]``, unit rows, a dense tensor or an array.
            k, mode, where, alpha: The same as for :meth:`search`.

        Returns:
            Hits of each query, best first.

        Raises:
            InputError: The embeddings have another shape or are not unit rows of floating-point numbers; or as for
                :meth:`search`.
        """
        options = self._search_options(k, mode, where, alpha)
        return self._hits(self._on_device("queries", queries), **options)

    def _search_options(self, k: int, mode: Mode, where: str | None, alpha: float | None) -> dict[str, Any]:
        """Checked arguments of a search."""
        k = whole_number("k", k)
        if where is not None and not isinstance(where, str):
            raise InputError(f"expected where as an expression in a str, got {where!r:.80}")
        alpha = self.alpha if alpha is None else self._engine.config.choose_alpha(share("alpha", alpha))
        return {"k": k, "mode": mode, "where": where, "alpha": alpha}

    def explain(self, image: Any, text: str) -> Explanation:
        """Explain the score of a picture and a description: which words matched which patches, and what each contributes.

        The PyTorch model computes it whatever the engine, since exported encoders do not return their aggregation weights.

        Args:
            image: Picture as :meth:`add_images` takes it, or a hit of one; its file is found from any working folder.
            text: Description; words beyond the context are left out.

        Raises:
            ImageError: The picture cannot be read.
            InputError: The text is not a string, or the hit's picture does not exist.
        """
        if isinstance(image, Hit):
            path = image.path or image.id
            if not os.path.isfile(path):  # unlike Path's, never raises
                if image.path is None:
                    raise InputError(
                        f"expected a hit with a picture file, got {path!r:.80}, which has none; pass the picture"
                    )
                raise InputError(
                    f"expected a hit whose picture is there, got {path!r}; pass the picture itself, or say where the pictures "
                    f"lie now: {remedies.move_root(self._folder)}"
                )
            image = path
        return self._explain(image, text)

    def _hits(self, queries: Tensor, *, k: int, mode: Mode, where: str | None, alpha: float) -> list[Hits]:
        result, root = self.index.search(queries, k, alpha=alpha, mode=mode, where=where), self.index.root
        return hits_of(
            result.items,
            result.scores,
            result.global_scores,
            result.fine_scores,
            result.stands_out,
            mode=lambda _: result.mode,
            path=lambda item: picture_path(item.id, item.metadata, root),
        )


def _with_sidecars(listing: Listing, metadata: Sequence[dict[str, Any]] | None) -> list[Any]:
    """Metadata from the JSON files beside a folder's pictures, overridden by what was passed, which is checked later."""
    fields = [fields_of(listing, item) for item in listing.paths]
    if metadata is None:
        return fields
    passed = listed("metadata", metadata)
    if len(passed) != len(fields):
        return passed
    return [{**low, **high} if isinstance(high, dict) else high for low, high in zip(fields, passed, strict=True)]
