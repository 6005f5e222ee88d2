"""Data to send: pictures as bytes, values as JSON, many of them in batches."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

from finelip_fast._arguments import listed, whole_number
from finelip_fast._files import read_bytes
from finelip_fast.errors import ImageError, InputError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

BATCH = 64  # texts or pictures per request
_BATCH_BYTES = 32 << 20  # per request, as sent
_PICTURE_BYTES = 1 << 30
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # in which a PNG holds an image without loss


def as_json(value: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"expected values that JSON can hold: {error}") from None


def batches(values: Iterable[T], count: int, *, size: Callable[[T], int] | None = None) -> Iterator[list[T]]:
    """Yield lists of at most ``count`` values and at most some megabytes, unless a single value is larger."""
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


def is_picture(source: Any) -> bool:
    """Return whether a value is a single picture: a path, encoded bytes or a PIL image."""
    return isinstance(source, (str, PathLike, bytes, bytearray, memoryview)) or hasattr(source, "save")


def as_pictures(images: Any) -> list[Any]:
    """Return pictures as a list; a single picture becomes a list of one."""
    return [images] if is_picture(images) else listed("images", images)


def encoded(source: Any) -> str:
    return base64.b64encode(content_of(source)).decode()


def content_of(source: Any) -> bytes:
    """Return an encoded picture: a file's content, bytes unchanged, or an image as PNG.

    Raises:
        ImageError: A file or an image that cannot be read, or a source of another type.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (str, PathLike)):
        return read_bytes(source, error=ImageError, max_bytes=_PICTURE_BYTES)
    from PIL import Image

    if not isinstance(source, Image.Image):
        raise ImageError(f"expected a path, encoded bytes or a PIL image, got {type(source).__name__}")
    return _as_png(source)


def _as_png(source: Image.Image) -> bytes:
    """Return an image, upright, with the pixels that a retriever here would see."""
    from finelip_fast._decode import UPRIGHT, blaming, orientation
    from finelip_fast._pixels import as_rgb

    with blaming(f"PIL image of mode {source.mode}"):
        source.load()
        image = source if source.mode in _PNG_MODES else as_rgb(source)
        turn = UPRIGHT.get(orientation(source))
        image = image.copy() if turn is None else image.transpose(turn)
        image.info = {name: value for name, value in image.info.items() if name == "transparency"}
        content = io.BytesIO()
        image.save(content, "PNG", compress_level=1)
    return content.getvalue()


def file_name(name: str, text: Any) -> str:
    """Return a text that can be a file name, of any bytes.

    Raises:
        InputError: A value that is not a text, an empty text, or one that cannot be a file name.
    """
    try:
        if isinstance(text, str) and text.encode(errors="surrogateescape"):
            return text
    except UnicodeEncodeError:
        pass
    raise InputError(f"expected {name} to be texts that are not empty, got {text!r:.80}")
