"""Small copies of pictures, made once and kept in memory.

A file is decoded within the same bounds as every other picture (:mod:`finelip_fast._decode`) and encoded again, so no byte of
a file that is not a picture leaves the server.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import features

from finelip_fast.errors import ImageError, InputError
from finelip_fast.preprocess import open_thumbnail

SIDES = (160, 320, 640, 1280, 2048)

_QUALITY = 80


def thumbnail_address(id: str, shard: str | None = None) -> str:
    """Return the address of an item's thumbnail; any id is one segment of the path."""
    address = f"/v1/items/{quote(id, safe='', errors='surrogateescape')}/thumbnail"
    return address if shard is None else f"{address}?shard={quote(shard, safe='', errors='surrogateescape')}"


class _Key(NamedTuple):
    """Key of the thumbnail of a file in its current state; an overwritten file has another key."""

    path: str
    side: int
    bytes: int
    modified: int


class Thumbnails:
    """Cache of the latest thumbnails by path and side; used by several threads at once.

    Attributes:
        media_type: Media type of the thumbnails that :meth:`get` returns.

    Args:
        capacity: Bytes to keep.
    """

    def __init__(self, capacity: int = 64 << 20) -> None:
        self._format = "WEBP" if features.check("webp") else "JPEG"
        self.media_type = f"image/{self._format.lower()}"
        self._capacity, self._bytes = capacity, 0
        self._lock = threading.Lock()
        self._copies: OrderedDict[_Key, bytes] = OrderedDict()
        self._under_way: dict[_Key, Future[bytes]] = {}

    def get(self, path: Path, side: int) -> bytes:
        """Return an encoded copy of a picture, upright, at most ``side`` pixels wide and high, and never enlarged.

        If another thread is already making the copy, wait for that thread.

        Args:
            path: File of a picture.
            side: 160, 320, 640, 1280 or 2048.

        Raises:
            InputError: Another side.
            ImageError: The file is not a readable picture, or no longer exists.
        """
        if side not in SIDES:
            raise InputError(f"expected side to be one of {', '.join(map(str, SIDES))}, got {side!r:.80}")
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            raise ImageError(f"no such file: {str(path)!r:.200}") from None
        key = _Key(str(path), side, status.st_size, status.st_mtime_ns)
        with self._lock:
            if (copy := self._copies.get(key)) is not None:
                self._copies.move_to_end(key)
                return copy
            promise = self._under_way.get(key)
            is_ours = promise is None
            if promise is None:
                promise = self._under_way[key] = Future()
        if is_ours:
            self._fulfil(promise, key)
        return promise.result()

    def _fulfil(self, promise: Future[bytes], key: _Key) -> None:
        try:
            content = self._encoded(key)
        except BaseException as error:
            promise.set_exception(error)
        else:
            promise.set_result(content)
            self._keep(key, content)
        finally:
            with self._lock:
                del self._under_way[key]

    def _encoded(self, key: _Key) -> bytes:
        file = io.BytesIO()
        open_thumbnail(key.path, key.side).save(file, self._format, quality=_QUALITY, method=2)
        return file.getvalue()

    def _keep(self, key: _Key, content: bytes) -> None:
        if len(content) > self._capacity:
            return
        with self._lock:
            self._copies[key] = content
            self._bytes += len(content)
            while self._bytes > self._capacity:
                _, oldest = self._copies.popitem(last=False)
                self._bytes -= len(oldest)
