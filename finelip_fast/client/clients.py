"""The two clients, which run the same generators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

import httpx2

from finelip_fast.client import calls
from finelip_fast.client.calls import RemoteItem
from finelip_fast.client.connection import Connection
from finelip_fast.client.exchange import Steps
from finelip_fast.client.sending import BATCH
from finelip_fast.hits import Hit, Hits
from finelip_fast.reports import AddReport

if TYPE_CHECKING:
    from PIL import Image

    from finelip_fast.client.calls import Array
    from finelip_fast.index.search import Mode

PictureSource: TypeAlias = "str | PathLike[str] | bytes | bytearray | memoryview | Image.Image"
Picture = TypeVar("Picture", bound=PictureSource)
T = TypeVar("T")


class Client(Connection):
    """Client of a ``finelip serve`` server, with the main methods of a :class:`finelip_fast.Retriever`.

    Unlike a retriever's, they return arrays instead of tensors, and :meth:`explain` a dictionary, and the server names the
    pictures that :meth:`add_images` adds. Pictures are paths on this machine, encoded bytes or PIL images, and are sent whole.
    There is no ``add_folder``, ``add_table``, ``add_texts``, ``search_embeddings`` or ``similarity``.

    May be used from several threads.
    Requests that change nothing are sent again, at most twice, if the server is full or starting and says for how long.

    Args:
        url: Address of the server, such as ``"http://127.0.0.1:8000"``.
        api_key: Key that the server requires; None: the environment variable ``FINELIP_API_KEY``, if set.
        timeout: Seconds to wait for an answer.

    Methods raise InputError if the server refuses the input, and :class:`finelip_fast.ServerError` if the server cannot be
    reached, is full, requires a key, or fails.

    Example:
        >>> with finelip_fast.Client("http://127.0.0.1:8000") as client:
        ...     hits = client.search("A red house with two floors stands on the left …", k=3)
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 30.0) -> None:
        super().__init__(url, api_key=api_key, timeout=timeout)
        self._http = httpx2.Client(**self._options())

    def __enter__(self) -> Client:
        self._refuse_if_closed()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._is_closed = True
        self._http.close()

    def _run(self, steps: Steps[T]) -> T:
        try:
            request = next(steps)
            while True:
                time.sleep(request.pause)
                with self._explaining():
                    response = self._http.request(request.method, request.path, **request.arguments)
                request = steps.send(response)
        except StopIteration as end:
            value: T = end.value
            return value

    @overload
    def search(
        self, text: str, *, k: int = 10, mode: Mode = "auto", where: str | None = None, alpha: float | None = None
    ) -> Hits: ...
    @overload
    def search(
        self,
        text: list[str] | tuple[str, ...] | Iterator[str],
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
        image: PictureSource,
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
        text: str | list[str] | tuple[str, ...] | Iterator[str] | None = None,
        *,
        image: PictureSource | list[Picture] | tuple[Picture, ...] | Iterator[Picture] | None = None,
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> Hits | list[Hits]:
        """Find the best items for a text or a picture.

        Args:
            text, image, k, mode, where: The same as for :meth:`finelip_fast.Retriever.search`.
            alpha: Weight of the global score; None: the server's.

        Returns:
            Hits, best first: a list for one query, a list of lists for a list of queries. Their paths are paths on the
            server's machine.

        Warns:
            TruncationWarning: Texts were cut.
            PartialAnswerWarning: Shards of the server did not answer.
        """
        return self._run(calls.search(text, image, k, mode, where, alpha))

    def score(self, images: Iterable[PictureSource], texts: Iterable[str]) -> Array:
        """Score every picture against every text, without the index: float32 ``[n_images, n_texts]``."""
        return self._run(calls.score(images, texts))

    def explain(self, image: PictureSource | Hit, text: str) -> dict[str, Any]:
        """Explain the score of a picture, or a hit's picture, and a description, as ``POST /v1/explain`` answers."""
        return self._run(calls.explain(image, text))

    def encode_texts(self, texts: Iterable[str], *, batch_size: int = BATCH) -> Array:
        """Embed descriptions: float32 ``[N, L, D]``, unit rows, row 0 = EOT; ``batch_size`` are sent at once."""
        return self._run(calls.encode_texts(texts, batch_size))

    def encode_images(self, images: Iterable[PictureSource], *, batch_size: int = BATCH) -> Array:
        """Embed pictures: float32 ``[N, L, D]``, unit rows, row 0 = CLS; ``batch_size`` are sent at once."""
        return self._run(calls.encode_images(images, batch_size))

    def add_images(
        self,
        images: Iterable[PictureSource] | PictureSource,
        *,
        metadata: Sequence[dict[str, Any]] | None = None,
        batch_size: int = BATCH,
    ) -> AddReport:
        """Add pictures; the server must have been started with ``--writable``.

        Args:
            images: Folder, one picture, or several; the server names them.
            metadata: A dictionary of JSON values for each picture.
            batch_size: Number of pictures sent at once. If a request fails, pictures of earlier requests stay added.

        Returns:
            Ids of the added pictures, and the skipped ones with reasons. Added pictures are found by every later search.

        Raises:
            InputError: There is nothing at the path, or ``metadata`` does not have a dictionary for each picture.
        """
        return self._run(calls.add_images(images, metadata, batch_size))

    def delete(self, ids: Sequence[str] | str) -> None:
        """Delete items one by one.

        Raises:
            InputError: An id that is not in the index; the items before it have been deleted.
        """
        return self._run(calls.delete(ids))

    def items(self, *, where: str | None = None) -> Iterator[RemoteItem]:
        """Iterate over the items in the order they were added; pages are fetched as needed."""
        page = self._run(calls.page(where, None))
        yield from page.items
        while page.following is not None:
            page = self._run(calls.page(where, page.following))
            yield from page.items

    def info(self) -> dict[str, Any]:
        """Return what is served, as ``GET /v1/info`` answers: the model, engine, number of items and limits."""
        return self._run(calls.info())


class AsyncClient(Connection):
    """:class:`Client` for ``asyncio``: the same methods as coroutines; ``items`` is an asynchronous iterator.

    Belongs to the event loop in which it is first used.

    Args:
        url, api_key, timeout: The same as for :class:`Client`.

    Example:
        >>> async with finelip_fast.AsyncClient("http://127.0.0.1:8000") as client:
        ...     hits = await client.search("A red house with two floors stands on the left …", k=3)
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 30.0) -> None:
        super().__init__(url, api_key=api_key, timeout=timeout)
        self._http = httpx2.AsyncClient(**self._options())

    async def __aenter__(self) -> AsyncClient:
        self._refuse_if_closed()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        self._is_closed = True
        await self._http.aclose()

    async def _run(self, steps: Steps[T]) -> T:
        try:
            request = next(steps)
            while True:
                await asyncio.sleep(request.pause)
                with self._explaining():
                    response = await self._http.request(request.method, request.path, **request.arguments)
                request = steps.send(response)
        except StopIteration as end:
            value: T = end.value
            return value

    @overload
    async def search(
        self, text: str, *, k: int = 10, mode: Mode = "auto", where: str | None = None, alpha: float | None = None
    ) -> Hits: ...
    @overload
    async def search(
        self,
        text: list[str] | tuple[str, ...] | Iterator[str],
        *,
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> list[Hits]: ...
    @overload
    async def search(
        self,
        *,
        image: PictureSource,
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> Hits: ...
    @overload
    async def search(
        self,
        *,
        image: list[Picture] | tuple[Picture, ...] | Iterator[Picture],
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> list[Hits]: ...

    async def search(
        self,
        text: str | list[str] | tuple[str, ...] | Iterator[str] | None = None,
        *,
        image: PictureSource | list[Picture] | tuple[Picture, ...] | Iterator[Picture] | None = None,
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> Hits | list[Hits]:
        """See :meth:`Client.search`."""
        return await self._run(calls.search(text, image, k, mode, where, alpha))

    async def score(self, images: Iterable[PictureSource], texts: Iterable[str]) -> Array:
        """See :meth:`Client.score`."""
        return await self._run(calls.score(images, texts))

    async def explain(self, image: PictureSource | Hit, text: str) -> dict[str, Any]:
        """See :meth:`Client.explain`."""
        return await self._run(calls.explain(image, text))

    async def encode_texts(self, texts: Iterable[str], *, batch_size: int = BATCH) -> Array:
        """See :meth:`Client.encode_texts`."""
        return await self._run(calls.encode_texts(texts, batch_size))

    async def encode_images(self, images: Iterable[PictureSource], *, batch_size: int = BATCH) -> Array:
        """See :meth:`Client.encode_images`."""
        return await self._run(calls.encode_images(images, batch_size))

    async def add_images(
        self,
        images: Iterable[PictureSource] | PictureSource,
        *,
        metadata: Sequence[dict[str, Any]] | None = None,
        batch_size: int = BATCH,
    ) -> AddReport:
        """See :meth:`Client.add_images`."""
        return await self._run(calls.add_images(images, metadata, batch_size))

    async def delete(self, ids: Sequence[str] | str) -> None:
        """See :meth:`Client.delete`."""
        return await self._run(calls.delete(ids))

    async def items(self, *, where: str | None = None) -> AsyncIterator[RemoteItem]:
        """See :meth:`Client.items`."""
        page = await self._run(calls.page(where, None))
        for item in page.items:
            yield item
        while page.following is not None:
            page = await self._run(calls.page(where, page.following))
            for item in page.items:
                yield item

    async def info(self) -> dict[str, Any]:
        """See :meth:`Client.info`."""
        return await self._run(calls.info())
