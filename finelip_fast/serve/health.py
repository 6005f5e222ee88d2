"""Liveness and readiness checks, and the metrics that Prometheus reads."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from finelip_fast.serve.answers import answer, log
from finelip_fast.serve.batching import Overloaded
from finelip_fast.serve.metrics import CONTENT_TYPE
from finelip_fast.serve.requests import Serving, serving

_SECONDS = 1.0  # for which a result is reused
_TRIAL_SECONDS = 10.0  # within which a trial must end, or within the timeout of requests if that is shorter

router = APIRouter()


class Health:
    """Trials of a server: encode a text and search with it, at most once a second."""

    def __init__(self, server: Serving) -> None:
        self._server = server
        self._lock = asyncio.Lock()
        self._until, self._fault = 0.0, "has not been tried"

    async def fault(self) -> str | None:
        """Return what is wrong, or None if the server encodes and searches."""
        if self._server.state != "ready":
            return self._server.state
        clock = asyncio.get_running_loop().time
        async with self._lock:
            if clock() >= self._until:
                self._fault = await self._trial() or ""
                self._until = clock() + _SECONDS
        return self._fault or None

    async def _trial(self) -> str | None:
        seconds = min(_TRIAL_SECONDS, self._server.settings.timeout)
        try:
            await asyncio.wait_for(try_search(self._server, "a house", seconds), seconds + 1)
        except Overloaded:  # it works, and has no room
            return "full"
        except Exception as error:  # whatever the error is, the server does not answer
            log.error("the server is not ready: %s: %s", type(error).__name__, error)
            return "failing"
        return None


async def try_search(server: Serving, text: str, seconds: float) -> None:
    """Encode a text and search with it.

    Raises:
        Exception: Any failure to do so within ``seconds``.
    """
    deadline = asyncio.get_running_loop().time() + seconds
    (embedded,) = await server.pipeline.embed_texts([text], deadline=deadline, recent=False)
    await server.pipeline.search([embedded.embedding], 1, deadline=deadline)


async def warm(server: Serving, picture: bytes) -> None:
    """Run everything that a first request would wait for; failures are left for the health check to report."""
    seconds = 600.0  # a GPU may build kernels
    with suppress(Exception):
        await server.pipeline.embed_images([picture], deadline=asyncio.get_running_loop().time() + seconds)
        for text in ("a", "a house with a door and a window, " * 8):
            await try_search(server, text, seconds)


@router.get("/health/live", tags=["health"])
async def live() -> Response:
    """Confirm that the process answers."""
    return answer({"status": "live"})


@router.get(
    "/health/ready", tags=["health"], responses={503: {"description": "The server cannot answer searches now."}}
)
async def ready(request: Request) -> Response:
    """Confirm that a text was encoded and searched with within the last second."""
    fault = await request.app.state.health.fault()
    if fault is None:
        return answer({"status": "ready"})
    return answer({"status": fault}, status=503, headers={"Retry-After": "2"})


@router.get("/metrics", tags=["health"], response_class=Response)
async def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus."""
    server = serving(request)
    figures: Any = request.app.state.metrics

    def text() -> bytes:
        with suppress(Exception):  # an unreadable index is no reason to report nothing
            figures.describe(items=len(server.collection), **request.app.state.described)
        content: bytes = figures.text()
        return content

    return Response(await asyncio.to_thread(text), headers={"Content-Type": CONTENT_TYPE})
