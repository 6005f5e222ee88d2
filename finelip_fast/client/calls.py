"""The clients' methods as generators, which yield requests, receive their answers, and return the method's result."""

from __future__ import annotations

import base64
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from urllib.parse import quote

import httpx2

from finelip_fast._arguments import listed, share, sound_text, strings, whole_number
from finelip_fast._json import parse_json
from finelip_fast.client.exchange import Request, Steps, answer_of, exchange, expected_answer, json_request
from finelip_fast.client.sending import (
    BATCH,
    as_json,
    as_pictures,
    batches,
    content_of,
    encoded,
    file_name,
    is_picture,
)
from finelip_fast.errors import (
    ImageError,
    InputError,
    PartialAnswerWarning,
    ServerError,
    TruncationWarning,
)
from finelip_fast.folders import list_images, refuse_missing
from finelip_fast.hits import Hit, Hits
from finelip_fast.reports import AddReport

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

_HIT_FIELDS = [field.name for field in fields(Hit)]


class RemoteItem(NamedTuple):
    """An item of a server's index.

    Attributes:
        id: Id that it was added with.
        metadata: Metadata that was given with it.
        path: File of its picture on the server's machine; None if it has none.
    """

    id: str
    metadata: dict[str, Any]
    path: str | None


def search(
    text: Any, image: Any, k: int, mode: str, where: str | None, alpha: float | None
) -> Steps[Hits | list[Hits]]:
    if (text is None) == (image is None):
        raise InputError("expected either text or image, " + ("got neither" if text is None else "got both"))
    options: dict[str, Any] = {"k": whole_number("k", k), "mode": mode}
    options |= {} if where is None else {"where": where}
    options |= {} if alpha is None else {"alpha": share("alpha", alpha)}
    query = image if text is None else text
    several = isinstance(query, Iterable) and not is_picture(query)  # a text is a path, too
    queries = listed("image" if text is None else "text", query) if several else [query]
    if text is not None:
        strings("text", queries)
    hits: list[Hits] = []
    cut: list[int] = []
    for batch in batches(queries if text is not None else map(encoded, queries), BATCH):
        answer = yield from exchange(json_request("search", {("image" if text is None else "text"): batch} | options))
        with expected_answer():
            hits += [Hits(map(_hit, result["hits"])) for result in answer["results"]]
            cut += [result["tokens_cut"] or 0 for result in answer["results"]]
            if answer["missing"]:
                reasons = "; ".join(f"{shard}: {reason}" for shard, reason in answer["missing"].items())
                message = f"only {answer['covered']:.1%} of the items were searched; shards did not answer ({reasons})"
                warnings.warn(message, PartialAnswerWarning, stacklevel=4)
            if len(answer["results"]) != len(batch):
                raise ValueError(f"{len(answer['results'])} results for {len(batch)} queries")
    if any(cut):
        number, lost = sum(map(bool, cut)), max(cut)
        were = f"{number} of {len(cut)} texts exceeded the context and {'was' if number == 1 else 'were'} cut"
        warnings.warn(f"{were}; the longest lost {lost} token{'s' * (lost > 1)}", TruncationWarning, stacklevel=4)
    return hits if several else hits[0]


def score(images: Iterable[Any], texts: Iterable[str]) -> Steps[Array]:
    import numpy as np

    columns = listed("texts", [texts] if isinstance(texts, str) else texts)
    pictures = list(map(encoded, as_pictures(images)))
    scores = np.zeros((len(pictures), len(columns)), np.float32)
    row = 0
    for image_batch in batches(pictures, BATCH):
        column = 0
        for text_batch in batches(columns, BATCH):
            answer = yield from exchange(json_request("score", {"images": image_batch, "texts": text_batch}))
            with expected_answer():
                scores[row : row + len(image_batch), column : column + len(text_batch)] = answer["scores"]
            column += len(text_batch)
        row += len(image_batch)
    return scores


def explain(image: Any, text: str) -> Steps[dict[str, Any]]:
    if isinstance(image, Hit):
        picture = {"item": image.id} | ({} if image.shard is None else {"shard": image.shard})
    else:
        picture = {"image": encoded(image)}
    return (yield from exchange(json_request("explain", {"text": text, **picture})))


def encode_texts(texts: Iterable[str], batch_size: int) -> Steps[Array]:
    return (yield from _embed(listed("texts", [texts] if isinstance(texts, str) else texts), batch_size))


def encode_images(images: Iterable[Any], batch_size: int) -> Steps[Array]:
    return (yield from _embed(({"image": encoded(image)} for image in as_pictures(images)), batch_size))


def _embed(inputs: Iterable[Any], batch_size: int) -> Steps[Array]:
    import numpy as np

    embeddings: list[Array] = []
    for batch in batches(inputs, batch_size):
        body = {"input": batch, "encoding_format": "base64", "multi_vector": True}
        answer = yield from exchange(json_request("embeddings", body))
        with expected_answer():
            embeddings += [
                np.frombuffer(base64.b64decode(entry["embedding"]), "<f4").reshape(entry["shape"]).astype(np.float32)
                for entry in answer["data"]
            ]
    return np.stack(embeddings) if embeddings else np.zeros((0, 0, 0), np.float32)


def add_images(images: Any, metadata: Sequence[dict[str, Any]] | None, batch_size: int) -> Steps[AddReport]:
    refuse_missing(images)
    if isinstance(images, (str, PathLike)) and os.path.isdir(images):
        images = list_images(images)
    pictures = as_pictures(images)
    metadata = None if metadata is None else listed("metadata", metadata)
    if metadata is not None and len(metadata) != len(pictures):
        raise InputError(f"expected metadata for {len(pictures)} pictures, got {len(metadata)}")
    report = AddReport()

    def readable() -> Iterator[tuple[int, str, bytes]]:
        """Yield numbers, names and contents of the readable pictures."""
        for number, picture in enumerate(pictures):
            name = os.path.basename(picture) if isinstance(picture, (str, PathLike)) else f"image-{number}"
            try:
                yield number, name.encode(errors="replace").decode(), content_of(picture)
            except ImageError as error:
                report.skipped.append((name, str(error)))

    for batch in batches(readable(), batch_size, size=lambda entry: len(entry[2])):
        data: dict[str, Any] = {}
        if metadata is not None:
            data["metadata"] = as_json([metadata[number] for number, *_ in batch]).decode()
        files = [("image", (name, content, "application/octet-stream")) for _, name, content in batch]
        response = yield Request("POST", "v1/items", {"files": files, "data": data}, repeatable=False)
        with expected_answer():
            for item in _added(response):
                if item["id"] is None:
                    report.skipped.append((item["name"], item["reason"]))
                else:
                    report.added.append(item["id"])
    return report


def _added(response: httpx2.Response) -> list[dict[str, Any]]:
    """Return the outcome for each picture, which the server reports even if all were refused."""
    if response.status_code == 400:
        with suppress(ServerError, KeyError):
            refused: list[dict[str, Any]] = parse_json(
                response.content, "", error=ServerError, kind=dict, surrogates=True
            )["items"]
            return refused
    added: list[dict[str, Any]] = answer_of(response)["items"]
    return added


def delete(ids: Sequence[str] | str) -> Steps[None]:
    for name in [ids] if isinstance(ids, str) else listed("ids", ids):
        # Dots are encoded, too: a segment of one or two dots is removed from the path on its way.
        segment = quote(file_name("ids", name), safe="", errors="surrogateescape").replace(".", "%2E")
        yield from exchange(Request("DELETE", f"v1/items/{segment}", repeatable=False))


class Page(NamedTuple):
    items: list[RemoteItem]
    following: str | None  # value of ``after`` for the next page


def page(where: str | None, after: str | None) -> Steps[Page]:
    values = {"where": where, "after": after}
    params = {name: sound_text(name, value) for name, value in values.items() if value is not None}
    answer = yield from exchange(Request("GET", "v1/items", {"params": params}))
    with expected_answer():
        return Page(
            [RemoteItem(item["id"], item["metadata"], item["path"]) for item in answer["items"]], answer["next"]
        )


def info() -> Steps[dict[str, Any]]:
    return (yield from exchange(Request("GET", "v1/info")))


def _hit(values: dict[str, Any]) -> Hit:
    return Hit(**{name: values[name] for name in _HIT_FIELDS})
