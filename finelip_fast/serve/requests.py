"""Read requests: models from JSON and forms, pictures from base64, all within bounds."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import unquote_to_bytes

from PIL import ExifTags
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from finelip_fast._decode import header, quiet, upright_size
from finelip_fast._json import parse_json
from finelip_fast.errors import InputError
from finelip_fast.serve.answers import Refusal
from finelip_fast.serve.collection import Collection
from finelip_fast.serve.pipeline import Pipeline
from finelip_fast.serve.settings import Limits, ServeSettings
from finelip_fast.serve.thumbnails import Thumbnails

Model = TypeVar("Model", bound=BaseModel)

_IN_LOOP = 1 << 18  # bytes; larger bodies are parsed in a thread, so that other requests are not blocked
_DATA = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*(?:https?|ftp|file|s3|gs):", re.IGNORECASE)
_MAX_ERRORS = 3  # errors listed in one message


@dataclass
class Serving:
    """State shared by the routes of one application."""

    collection: Collection
    settings: ServeSettings
    pipeline: Pipeline
    thumbnails: Thumbnails
    state: Literal["warming", "ready", "draining"] = "warming"


def serving(request: Request) -> Serving:
    """Return the state of the application that handles a request."""
    return request.app.state.serving  # type: ignore[no-any-return]


def deadline(request: Request) -> float:
    """Return the time, on the event loop's clock, at which a request is abandoned."""
    return (
        getattr(request.state, "deadline", None)
        or asyncio.get_running_loop().time() + serving(request).settings.timeout
    )


@contextmanager
def stage(request: Request, name: str) -> Iterator[None]:
    """Time a part of a request, for ``Server-Timing`` and the metrics."""
    start = perf_counter()
    try:
        yield
    finally:
        stages = request.scope.setdefault("finelip.stages", {})
        stages[name] = stages.get(name, 0.0) + perf_counter() - start


# Bodies ------------------------------------------------------------------------------------------------------------


async def read_json(request: Request, model: type[Model]) -> Model:
    """Read the body of a request as a model.

    Raises:
        Refusal: 415 for another media type, 400 for a body that is not JSON or does not match the model.
    """
    return validated(model, await read_object(request), strict=True)


async def read_object(request: Request) -> dict[str, Any]:
    """Read the body of a request as a JSON object; errors as in :func:`read_json`."""
    kind = media_type(request)
    if kind != "application/json":
        raise unsupported(kind, "application/json")
    body = await request.body()
    parse = partial(parse_json, error=InputError, expected="a JSON object", kind=dict, surrogates=True)
    if len(body) < _IN_LOOP:
        values: dict[str, Any] = parse(body, "the body")
    else:
        values = await asyncio.to_thread(parse, body, "the body")
    return values


class File(NamedTuple):
    """A file from a form."""

    name: str
    content: bytes


async def read_form(request: Request, limits: Limits) -> list[tuple[str, str | File]]:
    """Read the names and values of a multipart form in order; files stay in memory, within the bound on bodies.

    Raises:
        Refusal: 400 for a form that cannot be read, 413 for too many files or fields.
    """
    most = max(limits.images, limits.texts)
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=limits.images, max_fields=most + 16, max_part_size=limits.body
    )
    parser.spool_max_size = limits.body + 1
    try:
        return [(name, await _read(value)) for name, value in (await parser.parse()).multi_items()]
    except MultiPartException as error:
        if error.message.startswith("Too many"):
            raise Refusal(
                413, "too_many", f"expected at most {limits.images} files and {most} texts, got more"
            ) from None
        reason = error.message
    except (FormParserError, KeyError, ValueError) as error:
        reason = str(error)
    raise Refusal(400, "invalid_form", f"expected a multipart form: {reason}")


async def _read(value: str | UploadFile) -> str | File:
    if isinstance(value, str):
        return value
    content = await value.read()
    await value.close()
    return File(value.filename or "", content)


def media_type(request: Request) -> str:
    """Return the media type of a request's body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def unsupported(kind: str, *expected: str) -> Refusal:
    """Return the refusal for a body of an unsupported media type."""
    return Refusal(
        415, "media_type", f"expected Content-Type {' or '.join(expected)}, got {f'{kind!r:.80}' if kind else 'none'}"
    )


def validated(model: type[Model], values: dict[str, Any], *, strict: bool) -> Model:
    """Validate values as a model; not strictly for a form, whose values are all text.

    Raises:
        Refusal: 400, naming the first invalid field.
    """
    try:
        return model.model_validate(values, strict=strict)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False)) from None


def invalid(errors: Sequence[Any]) -> Refusal:
    """Return the refusal for invalid values, from pydantic's errors."""
    parts, param = [], None
    for error in errors[:_MAX_ERRORS]:
        field = ".".join(str(part) for part in error["loc"] if part not in ("body", "query"))
        param = param or field or None
        got = "" if error["type"] in ("missing", "extra_forbidden") else f", got {error.get('input')!r:.80}"
        reason = "this name is not known" if error["type"] == "extra_forbidden" else error["msg"]
        parts.append(f"{field or 'the body'}: {reason}{got}")
    return Refusal(400, "invalid_request", "; ".join(parts), param=None if param is None else param[:200])


# Bounds ------------------------------------------------------------------------------------------------------------


def listed(value: Any) -> list[Any]:
    """Return one or several values as a list."""
    return value if isinstance(value, list) else [value]


def check_texts(texts: Sequence[str], limits: Limits, param: str) -> list[str]:
    """
    Raises:
        Refusal: 413 for too many texts, 400 for a text that is too long.
    """
    check_count(texts, limits.texts, "texts", param)
    for text in texts:
        if len(text) > limits.characters:
            message = f"expected texts of at most {limits.characters} characters, got {len(text)}; shorten it"
            raise Refusal(400, "text_too_long", message, param=param)
    return list(texts)


def check_count(values: Sequence[Any], most: int, name: str, param: str) -> None:
    """
    Raises:
        Refusal: 413 if there are more than ``most``.
    """
    if len(values) > most:
        message = f"expected at most {most} {name} in one request, got {len(values)}; send several requests"
        raise Refusal(413, "too_many", message, param=param)


def check_where(where: str | None, limits: Limits) -> str | None:
    """
    Raises:
        Refusal: 400 if the filter is too long.
    """
    if where is not None and len(where) > limits.where:
        message = f"expected a filter of at most {limits.where} characters, got {len(where)}; shorten it"
        raise Refusal(400, "filter_too_long", message, param="where")
    return where or None


async def check_pictures(pictures: Sequence[str | bytes], limits: Limits, param: str) -> list[bytes]:
    """Return pictures as bytes, within the bound on pixels.

    Raises:
        Refusal: 413 for too many pictures or pixels; 400 for invalid base64 or an address.
    """
    check_count(pictures, limits.images, "pictures", param)
    if not pictures:
        return []
    return await asyncio.to_thread(lambda: [_picture(picture, limits, param) for picture in pictures])


async def refused_pictures(pictures: Sequence[bytes], limits: Limits) -> list[str | None]:
    """Return why each picture is refused, or None if it is one within the bound on pixels."""

    def reason(picture: bytes) -> str | None:
        try:
            _picture(picture, limits, "image")
        except (Refusal, InputError) as error:
            return str(error)
        return None

    return await asyncio.to_thread(lambda: [reason(picture) for picture in pictures])


def _picture(picture: str | bytes, limits: Limits, param: str) -> bytes:
    content = picture if isinstance(picture, bytes) else _decoded(picture, param)
    try:
        width, height = size_of(content)
    except InputError:
        raise
    except Exception:  # any fault shows when the picture is decoded
        return content
    if width * height > limits.pixels:
        message = f"expected pictures of at most {limits.pixels} pixels, got {width} x {height}; shrink it"
        raise Refusal(413, "too_many_pixels", message, param=param)
    return content


def _decoded(text: str, param: str) -> bytes:
    if _ADDRESS.match(text):
        message = (
            "expected a picture in base64 or a data URI, got an address: this server fetches nothing; send the file"
        )
        raise Refusal(400, "address", message, param=param)
    if match := _DATA.match(text):
        text = text[match.end() :]
    try:
        content = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        message = f"expected a picture in base64, or as a data URI of base64, got {text!r:.60}"
        raise Refusal(400, "invalid_base64", message, param=param) from None
    if not content:
        raise Refusal(400, "invalid_base64", "expected a picture in base64, got nothing", param=param)
    return content


def size_of(picture: bytes | Path) -> tuple[int, int]:
    """Return the width and height of a picture in upright orientation, from its header.

    Raises:
        ImageError: Not a picture, or too large. Errors raised by Pillow pass through.
    """
    with quiet, header(picture if isinstance(picture, bytes) else str(picture)) as (size, exif):
        return upright_size(size, exif.get(ExifTags.Base.Orientation))


# Addresses -----------------------------------------------------------------------------------------------------------


def item_of(request: Request, tail: str = "") -> str:
    """Return the id in a request's path: one percent-encoded segment in which no character is special.

    Args:
        tail: Part of the path after the id.

    Raises:
        Refusal: 404 if there are several segments.
    """
    path: bytes = request.scope["raw_path"].partition(b"?")[0]
    segment = path.removeprefix(b"/v1/items/").removesuffix(tail.encode())
    if b"/" in segment:
        message = "expected an id as one segment of the path, with / as %2F; take the address that a search gives"
        raise Refusal(404, "no_such_item", message)
    return unquote_to_bytes(segment).decode("utf-8", "surrogateescape")
