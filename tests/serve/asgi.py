"""Pictures to send, and applications that are called without a network or at an address of their own."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Return a smooth unique picture: four random colours, blended."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    """Return the contents of the picture's file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    """Return the picture as base64."""
    return base64.b64encode(file_of(image, kind)).decode()


async def talk(app: FastAPI, messages: list[Any], **scope: Any) -> list[dict[str, Any]]:
    """Return what an application sends to a client of these messages: ASGI messages, and seconds or events to wait for."""
    sent: list[dict[str, Any]] = []
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        while waiting and not isinstance(waiting[0], dict):
            pause = waiting.pop(0)
            await (pause.wait() if isinstance(pause, asyncio.Event) else asyncio.sleep(pause))
        if waiting:
            return waiting.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), *scope.pop("headers", [])]
    headers = [(b"host", b"127.0.0.1"), *scope.pop("only_headers", headers)]
    path = scope.pop("path", "/v1/search")
    whole = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        **scope,
    }
    await app(whole, receive, send)
    return sent


def part(body: bytes, more_body: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more_body}


@contextmanager
def running(app: FastAPI, **options: Any) -> Iterator[str]:
    """Run an application in a thread of this process at a free port, and yield its address."""
    server = uvicorn.Server(
        uvicorn.Config(app, **{"lifespan": "on", "log_config": None, "access_log": False} | options)
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        until = time.monotonic() + 300
        while not server.started and thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        try:
            assert server.started
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
