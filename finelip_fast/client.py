"""A server that runs elsewhere, asked as a :class:`finelip_fast.Retriever` is asked; imports no PyTorch.

What a method does is a generator, the same for :class:`Client` and :class:`AsyncClient`: it gives the requests to send and is
sent their answers.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import time
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, overload
from urllib.parse import quote, urlsplit

import httpx2

from finelip_fast._addresses import API_KEY_VARIABLE, is_loopback
from finelip_fast._arguments import listed, share, whole_number
from finelip_fast._files import read_bytes
from finelip_fast._json import parse_json
from finelip_fast.errors import (
    FineLIPError,
    ImageError,
    InputError,
    PartialAnswerWarning,
    ServerError,
    TruncationWarning,
)
from finelip_fast.folders import list_images
from finelip_fast.hits import Hit, Hits
from finelip_fast.reports import AddReport

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from finelip_fast.index.search import Mode

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

__all__ = ["AsyncClient", "Client", "RemoteItem"]


PictureSource: TypeAlias = "str | PathLike[str] | bytes | bytearray | memoryview | Image.Image"
Picture = TypeVar("Picture", bound=PictureSource)
T = TypeVar("T")

_BATCH = 64  # texts or pictures of a request; bytes of one, as they are sent:
_BATCH_BYTES = 32 << 20
_PICTURE_BYTES = 1 << 30
# A full or a starting server says when to ask again; it is asked so often, and waited for so long each time.
_TRIES, _LONGEST_PAUSE = 3, 5.0
_IDLE_SECONDS = 4.0  # after which a connection is not used again, long before the server closes it

_HIT_FIELDS = [field.name for field in fields(Hit)]
_WRONG_INPUT = {400, 404, 413, 415}  # statuses that are about what was sent
# What to do about refusals, where the server's own words do not say it.
_REMEDIES = {
    401: (
        API_KEY_VARIABLE,
        f"pass api_key=..., or set {API_KEY_VARIABLE}, to the key that the server was started with",
    ),
    403: ("--writable", "start the server with finelip serve --writable to add and delete"),
    421: ("--allowed-host", "name the host by which the server is called: finelip serve --allowed-host"),
}


class RemoteItem(NamedTuple):
    """An item of a server's index.

    Attributes:
        id: What it was added as.
        metadata: What was given with it.
        path: File of its picture on the server's machine; None where it has none.
    """

    id: str
    metadata: dict[str, Any]
    path: str | None


class _Request(NamedTuple):
    """A request.

    Attributes:
        method, path: HTTP method, and path below the server's address.
        arguments: Its body or query, as httpx2 takes them.
        repeatable: Whether it may be sent again: it changes nothing.
        pause: Seconds to wait before it is sent.
    """

    method: str
    path: str
    arguments: dict[str, Any] = {}  # noqa: RUF012  # never changed
    repeatable: bool = True
    pause: float = 0.0


Steps: TypeAlias = Generator[_Request, httpx2.Response, T]


class _Connection:
    """Address, key and timeout of a server; both clients have one."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 30.0) -> None:
        self.url = _checked_url(url)
        self.timeout = _checked_timeout(timeout)
        self._key = None if api_key is None else _checked_key("api_key", api_key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        """Pickle the arguments; a key from the environment is not among them."""
        return partial(type(self), self.url, api_key=self._key, timeout=self.timeout), ()

    def _options(self) -> dict[str, Any]:
        """What both of httpx2's clients are opened with."""
        key = self._key
        if key is None and (variable := os.environ.get(API_KEY_VARIABLE)):
            key = _checked_key(API_KEY_VARIABLE, variable)
        address = urlsplit(self.url)
        return {
            "base_url": self.url,
            "headers": {} if key is None else {"authorization": f"Bearer {key}"},
            "timeout": self.timeout,
            "limits": httpx2.Limits(keepalive_expiry=_IDLE_SECONDS),
            # A proxy of the environment is for other hosts. Without TLS no certificates are read, which take a while.
            "trust_env": not is_loopback(address.hostname or ""),
            "verify": address.scheme == "https",
        }

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn a connection that fails into a ServerError."""
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise ServerError(
                f"no server answers at {self.url} ({str(error) or 'it took too long'}): start it with finelip serve, or check "
                "the address"
            ) from None
        except httpx2.TimeoutException:
            raise ServerError(
                f"the server at {self.url} did not answer within {self.timeout:g} seconds: ask for less at once, or with a "
                "longer timeout"
            ) from None
        except httpx2.HTTPError as error:
            raise ServerError(
                f"the connection to {self.url} broke: {error or type(error).__name__}; ask again"
            ) from None


class Client(_Connection):
    """A server that ``finelip serve`` started, searched and filled as a :class:`finelip_fast.Retriever` is.

    May be used from several threads. Pictures are given as paths, which are read here, as encoded bytes or as PIL images, and
    sent whole. What changes nothing is sent again, at most twice, when the server is full or starting and says for how long.

    Args:
        url: Address of the server, such as ``"http://127.0.0.1:8000"``.
        api_key: Key that the server wants; None: that of the environment's ``FINELIP_API_KEY``, if it is set.
        timeout: Seconds to wait for an answer.

    Methods raise InputError where the server refuses what was sent, and :class:`finelip_fast.ServerError` where it cannot be
    reached, is full, wants a key, or fails.

    Example:
        >>> with finelip_fast.Client("http://127.0.0.1:8000") as client:
        ...     hits = client.search("A red house with two floors stands on the left …", k=3)
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 30.0) -> None:
        super().__init__(url, api_key=api_key, timeout=timeout)
        self._http = httpx2.Client(**self._options())

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
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
        text: list[str] | tuple[str, ...],
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
        image: list[Picture] | tuple[Picture, ...],
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> list[Hits]: ...

    def search(
        self,
        text: str | list[str] | tuple[str, ...] | None = None,
        *,
        image: PictureSource | list[Picture] | tuple[Picture, ...] | None = None,
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
            Hits, best first: a list for one query, a list of lists for a list of queries. Their paths are those of the
            server's machine.

        Warns:
            TruncationWarning: Texts were cut.
            PartialAnswerWarning: Shards of the server did not answer.
        """
        return self._run(_search(text, image, k, mode, where, alpha))

    def score(self, images: Iterable[PictureSource], texts: Iterable[str]) -> Array:
        """Scores of every picture with every text, without the index: float32 ``[n_images, n_texts]``."""
        return self._run(_score(images, texts))

    def explain(self, image: PictureSource | Hit, text: str) -> dict[str, Any]:
        """Why a picture, or a hit's, and a description score as they do, as ``POST /v1/explain`` answers."""
        return self._run(_explain(image, text))

    def encode_texts(self, texts: Iterable[str], *, batch_size: int = _BATCH) -> Array:
        """Embeddings of descriptions, float32 ``[N, L, D]``, unit rows, row 0 = EOT; ``batch_size`` are sent at once."""
        return self._run(_encode_texts(texts, batch_size))

    def encode_images(self, images: Iterable[PictureSource], *, batch_size: int = _BATCH) -> Array:
        """Embeddings of pictures, float32 ``[N, L, D]``, unit rows, row 0 = CLS; ``batch_size`` are sent at once."""
        return self._run(_encode_images(images, batch_size))

    def add_images(
        self,
        images: Iterable[PictureSource] | PictureSource,
        *,
        metadata: Sequence[dict[str, Any]] | None = None,
        batch_size: int = _BATCH,
    ) -> AddReport:
        """Send pictures to be added; the server must have been started with ``--writable``.

        Args:
            images: Folder, one picture, or several; the server names them.
            metadata: A dictionary of JSON values for each picture.
            batch_size: Number of pictures sent at once. Where a request fails, those before it stay added.

        Returns:
            Ids of the pictures added, and those skipped, with the reason. What was added is found by every later search.
        """
        return self._run(_add_images(images, metadata, batch_size))

    def delete(self, ids: Sequence[str] | str) -> None:
        """Delete items, one after the other.

        Raises:
            InputError: An id that is not in the index; those before it are gone.
        """
        return self._run(_delete(ids))

    def items(self, *, where: str | None = None) -> Iterator[RemoteItem]:
        """The items in the order in which they were added, page by page as they are asked for."""
        page = self._run(_page(where, None))
        yield from page.items
        while page.following is not None:
            page = self._run(_page(where, page.following))
            yield from page.items

    def info(self) -> dict[str, Any]:
        """What is served, as ``GET /v1/info`` answers: the model, the engine, the number of items, the limits."""
        return self._run(_info())


class AsyncClient(_Connection):
    """:class:`Client` for ``asyncio``: the same methods, to be awaited; ``items`` is an asynchronous iterator.

    Belongs to the event loop that it is first used in.

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
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
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
        text: list[str] | tuple[str, ...],
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
        image: list[Picture] | tuple[Picture, ...],
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> list[Hits]: ...

    async def search(
        self,
        text: str | list[str] | tuple[str, ...] | None = None,
        *,
        image: PictureSource | list[Picture] | tuple[Picture, ...] | None = None,
        k: int = 10,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
    ) -> Hits | list[Hits]:
        """See :meth:`Client.search`."""
        return await self._run(_search(text, image, k, mode, where, alpha))

    async def score(self, images: Iterable[PictureSource], texts: Iterable[str]) -> Array:
        """See :meth:`Client.score`."""
        return await self._run(_score(images, texts))

    async def explain(self, image: PictureSource | Hit, text: str) -> dict[str, Any]:
        """See :meth:`Client.explain`."""
        return await self._run(_explain(image, text))

    async def encode_texts(self, texts: Iterable[str], *, batch_size: int = _BATCH) -> Array:
        """See :meth:`Client.encode_texts`."""
        return await self._run(_encode_texts(texts, batch_size))

    async def encode_images(self, images: Iterable[PictureSource], *, batch_size: int = _BATCH) -> Array:
        """See :meth:`Client.encode_images`."""
        return await self._run(_encode_images(images, batch_size))

    async def add_images(
        self,
        images: Iterable[PictureSource] | PictureSource,
        *,
        metadata: Sequence[dict[str, Any]] | None = None,
        batch_size: int = _BATCH,
    ) -> AddReport:
        """See :meth:`Client.add_images`."""
        return await self._run(_add_images(images, metadata, batch_size))

    async def delete(self, ids: Sequence[str] | str) -> None:
        """See :meth:`Client.delete`."""
        return await self._run(_delete(ids))

    async def items(self, *, where: str | None = None) -> AsyncIterator[RemoteItem]:
        """See :meth:`Client.items`."""
        page = await self._run(_page(where, None))
        for item in page.items:
            yield item
        while page.following is not None:
            page = await self._run(_page(where, page.following))
            for item in page.items:
                yield item

    async def info(self) -> dict[str, Any]:
        """See :meth:`Client.info`."""
        return await self._run(_info())


def _search(
    text: Any, image: Any, k: int, mode: str, where: str | None, alpha: float | None
) -> Steps[Hits | list[Hits]]:
    if (text is None) == (image is None):
        raise InputError("expected either a text or image=..., " + ("got neither" if text is None else "got both"))
    options: dict[str, Any] = {"k": whole_number("k", k), "mode": mode}
    options |= {} if where is None else {"where": where}
    options |= {} if alpha is None else {"alpha": share("alpha", alpha)}
    query = image if text is None else text
    several = isinstance(query, (list, tuple))
    queries = query if several else [query]
    hits: list[Hits] = []
    cut: list[int] = []
    for batch in _batches(queries if text is not None else map(_encoded, queries), _BATCH):
        answer = yield from _exchange(_json_request("search", {("image" if text is None else "text"): batch} | options))
        with _expected_answer():
            hits += [Hits(map(_hit, result["hits"])) for result in answer["results"]]
            cut += [result["tokens_cut"] or 0 for result in answer["results"]]
            if answer["missing"]:
                reasons = "; ".join(f"{shard}: {reason}" for shard, reason in answer["missing"].items())
                message = f"hits are those of {answer['covered']:.1%} of the items: shards did not answer ({reasons})"
                warnings.warn(message, PartialAnswerWarning, stacklevel=4)
            if len(answer["results"]) != len(batch):
                raise ValueError(f"{len(answer['results'])} results for {len(batch)} queries")
    if any(cut):
        lost = f"{sum(map(bool, cut))} of {len(cut)} texts were longer than the context and lost their ends"
        warnings.warn(f"{lost}, {max(cut)} tokens at most", TruncationWarning, stacklevel=4)
    return hits if several else hits[0]


def _score(images: Iterable[Any], texts: Iterable[str]) -> Steps[Array]:
    import numpy as np

    columns = listed("texts", [texts] if isinstance(texts, str) else texts)
    pictures = list(map(_encoded, _pictures(images)))
    scores = np.zeros((len(pictures), len(columns)), np.float32)
    row = 0
    for image_batch in _batches(pictures, _BATCH):
        column = 0
        for text_batch in _batches(columns, _BATCH):
            answer = yield from _exchange(_json_request("score", {"images": image_batch, "texts": text_batch}))
            with _expected_answer():
                scores[row : row + len(image_batch), column : column + len(text_batch)] = answer["scores"]
            column += len(text_batch)
        row += len(image_batch)
    return scores


def _explain(image: Any, text: str) -> Steps[dict[str, Any]]:
    picture = {"item": image.id} if isinstance(image, Hit) else {"image": _encoded(image)}
    return (yield from _exchange(_json_request("explain", {"text": text, **picture})))


def _encode_texts(texts: Iterable[str], batch_size: int) -> Steps[Array]:
    return (yield from _embed(listed("texts", [texts] if isinstance(texts, str) else texts), batch_size))


def _encode_images(images: Iterable[Any], batch_size: int) -> Steps[Array]:
    return (yield from _embed(({"image": _encoded(image)} for image in _pictures(images)), batch_size))


def _embed(inputs: Iterable[Any], batch_size: int) -> Steps[Array]:
    import numpy as np

    embeddings: list[Array] = []
    for batch in _batches(inputs, batch_size):
        body = {"input": batch, "encoding_format": "base64", "multi_vector": True}
        answer = yield from _exchange(_json_request("embeddings", body))
        with _expected_answer():
            embeddings += [
                np.frombuffer(base64.b64decode(entry["embedding"]), "<f4").reshape(entry["shape"]).astype(np.float32)
                for entry in answer["data"]
            ]
    return np.stack(embeddings) if embeddings else np.zeros((0, 0, 0), np.float32)


def _add_images(images: Any, metadata: Sequence[dict[str, Any]] | None, batch_size: int) -> Steps[AddReport]:
    if isinstance(images, (str, PathLike)) and os.path.isdir(images):
        images = list_images(images)
    pictures = _pictures(images)
    if metadata is not None and len(metadata) != len(pictures):
        raise InputError(f"expected metadata for {len(pictures)} pictures, got {len(metadata)}")
    report = AddReport()

    def readable() -> Iterator[tuple[int, str, bytes]]:
        """Places, names and contents of the pictures that can be read."""
        for number, picture in enumerate(pictures):
            name = os.path.basename(picture) if isinstance(picture, (str, PathLike)) else f"image-{number}"
            try:
                yield number, name.encode(errors="replace").decode(), _content(picture)
            except ImageError as error:
                report.skipped.append((name, str(error)))

    for batch in _batches(readable(), batch_size, size=lambda entry: len(entry[2])):
        data: dict[str, Any] = {}
        if metadata is not None:
            data["metadata"] = _json([metadata[number] for number, *_ in batch]).decode()
        files = [("image", (name, content, "application/octet-stream")) for _, name, content in batch]
        response = yield _Request("POST", "v1/items", {"files": files, "data": data}, repeatable=False)
        with _expected_answer():
            for item in _added(response):
                if item["id"] is None:
                    report.skipped.append((item["name"], item["reason"]))
                else:
                    report.added.append(item["id"])
    return report


def _added(response: httpx2.Response) -> list[dict[str, Any]]:
    """What became of each picture, which is told where all were refused, too."""
    if response.status_code == 400:
        with suppress(ServerError, KeyError):
            refused: list[dict[str, Any]] = parse_json(
                response.content, "", error=ServerError, kind=dict, surrogates=True
            )["items"]
            return refused
    added: list[dict[str, Any]] = _answer(response)["items"]
    return added


def _delete(ids: Sequence[str] | str) -> Steps[None]:
    for name in [ids] if isinstance(ids, str) else listed("ids", ids):
        # A dot is written out, too: a path of one or two dots is shortened on its way.
        segment = quote(_file_name("ids", name), safe="", errors="surrogateescape").replace(".", "%2E")
        yield from _exchange(_Request("DELETE", f"v1/items/{segment}", repeatable=False))


class _Page(NamedTuple):
    items: list[RemoteItem]
    following: str | None  # what to ask for the next one by


def _page(where: str | None, after: str | None) -> Steps[_Page]:
    values = {"where": where, "after": after}
    params = {name: _sound(name, value) for name, value in values.items() if value is not None}
    answer = yield from _exchange(_Request("GET", "v1/items", {"params": params}))
    with _expected_answer():
        return _Page(
            [RemoteItem(item["id"], item["metadata"], item["path"]) for item in answer["items"]], answer["next"]
        )


def _info() -> Steps[dict[str, Any]]:
    return (yield from _exchange(_Request("GET", "v1/info")))


def _exchange(request: _Request) -> Steps[dict[str, Any]]:
    """Send a request, also again where the server says when; its answer."""
    for _ in range(_TRIES - 1):
        response = yield request
        pause = _pause(response)
        if pause is None or not request.repeatable:
            return _answer(response)
        request = request._replace(pause=pause)
    response = yield request
    return _answer(response)


def _pause(response: httpx2.Response) -> float | None:
    """Seconds after which to ask again; None: not at all."""
    if response.status_code not in (429, 503):
        return None
    try:
        seconds = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return seconds if 0 <= seconds <= _LONGEST_PAUSE else None


def _answer(response: httpx2.Response) -> dict[str, Any]:
    if not response.is_success:
        raise _refusal(response)
    expected = "the answer of finelip serve"
    # An id may be the name of a file that is no UTF-8.
    answer: dict[str, Any] = parse_json(
        response.content, response.url, error=ServerError, expected=expected, kind=dict, surrogates=True
    )
    return answer


def _refusal(response: httpx2.Response) -> FineLIPError:
    """The error that an answer tells of."""
    status, request_id = response.status_code, response.headers.get("x-request-id")
    try:
        fault = parse_json(response.content, "", error=ServerError, kind=dict)["error"]
        message, code = str(fault["message"]), fault.get("code")
    except (ServerError, KeyError, TypeError, AttributeError):
        return ServerError(
            f"expected the answer of finelip serve at {response.url}, got status {status}; check the address",
            status=status,
            request_id=request_id,
        )
    if status in _WRONG_INPUT:
        return InputError(message)
    word, remedy = _REMEDIES.get(status, ("", ""))
    if word not in message:
        message += f"; {remedy}"
    return ServerError(message, status=status, code=code, request_id=request_id)


@contextmanager
def _expected_answer() -> Iterator[None]:
    """Turn an answer of another shape into a ServerError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"expected the answer of finelip serve, got one of another shape ({error!r:.200}); run the same version on both "
            "sides"
        ) from None


def _hit(values: dict[str, Any]) -> Hit:
    return Hit(**{name: values[name] for name in _HIT_FIELDS})


def _json_request(route: str, body: dict[str, Any]) -> _Request:
    return _Request("POST", f"v1/{route}", {"content": _json(body), "headers": {"content-type": "application/json"}})


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"expected values that JSON can hold, got others: {error}") from None


def _batches(values: Iterable[T], count: int, *, size: Callable[[T], int] | None = None) -> Iterator[list[T]]:
    """Values in lists of at most ``count``, and of at most some megabytes, if one value alone is no larger."""
    count, size = whole_number("batch_size", count), size or (lambda value: len(str(value)))
    batch: list[T] = []
    total = 0
    for value in values:
        length = size(value)
        if batch and (len(batch) == count or total + length > _BATCH_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(value)
        total += length
    if batch:
        yield batch


def _pictures(images: Any) -> list[Any]:
    """Pictures as a list; one is a list of it."""
    single = isinstance(images, (str, PathLike, bytes, bytearray, memoryview)) or hasattr(images, "save")
    return [images] if single else listed("images", images)


def _encoded(source: Any) -> str:
    return base64.b64encode(_content(source)).decode()


def _content(source: Any) -> bytes:
    """An encoded picture: a file's content, bytes as they are, an image as PNG.

    Raises:
        ImageError: A file that cannot be read, or anything else.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (str, PathLike)):
        return read_bytes(source, error=ImageError, max_bytes=_PICTURE_BYTES)
    from PIL import Image, ImageOps

    if not isinstance(source, Image.Image):
        raise ImageError(f"expected a path, encoded bytes or a PIL image, got {type(source).__name__}")
    image = ImageOps.exif_transpose(source)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=1)
    return content.getvalue()


def _file_name(name: str, text: Any) -> str:
    """A text that can be the name of a file, of whatever bytes.

    Raises:
        InputError: No text, an empty one, or none that a file can have.
    """
    try:
        if isinstance(text, str) and text.encode(errors="surrogateescape"):
            return text
    except UnicodeEncodeError:
        pass
    raise InputError(f"expected {name} as texts that are not empty, got {text!r:.80}")


def _sound(name: str, text: Any) -> str:
    """A text that can be sent.

    Raises:
        InputError: No text, or half of a surrogate pair in it.
    """
    try:
        if isinstance(text, str):
            text.encode()
            return text
    except UnicodeEncodeError:
        pass
    raise InputError(f"expected {name} as text that UTF-8 can hold, got {text!r:.80}")


def _checked_url(url: Any) -> str:
    try:
        address = urlsplit(url) if isinstance(url, str) else None
        is_sound = (
            address is not None
            and address.scheme in ("http", "https")
            and bool(address.hostname)
            and not (address.query or address.fragment or address.username or address.password)
            and (address.port is None or address.port > 0)
            and url.isprintable()
            and " " not in url
            and httpx2.URL(url).host
        )
    except (ValueError, httpx2.InvalidURL):
        is_sound = False
    if not is_sound:
        raise InputError(f"expected the address of a server, such as http://127.0.0.1:8000, got {url!r:.200}")
    return str(url).rstrip("/")


def _checked_timeout(timeout: Any) -> float:
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout < math.inf:
        raise InputError(f"expected timeout as seconds above 0, got {timeout!r:.80}")
    return float(timeout)


def _checked_key(name: str, key: Any) -> str:
    if not isinstance(key, str) or not key.isascii() or not key.isprintable() or not key or " " in key:
        raise InputError(f"expected {name} as ASCII characters without spaces, got something else")
    return key
