"""Guards between a client and the routes, from the outside in.

- :class:`Account` gives each request an id, a log line and a place in the metrics, adds security headers for browsers to
  each answer, and answers uncaught exceptions without revealing anything.
- :class:`Doors` refuses requests by their headers: headers that are too large, a host name that is not the server's (DNS
  rebinding), a page of another origin, a missing key.
- :class:`Bounds` limits the bytes and seconds of a request, and stops work for a client that has disconnected.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finelip_fast._addresses import API_KEY_VARIABLE, is_loopback
from finelip_fast.errors import InputError
from finelip_fast.serve.answers import Refusal, log
from finelip_fast.serve.metrics import Metrics
from finelip_fast.serve.requests import Serving
from finelip_fast.serve.settings import ServeSettings

MAX_HEADERS = 64 << 10  # bytes of the request line and headers

access = logging.getLogger("finelip_fast.serve.access")

_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_DOCS_CSP = _CSP.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")  # Swagger UI sets styles
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_CLOSED = 499  # in the log: the client disconnected and got no answer
_OPEN = ("/", "/docs", "/openapi.json", "/favicon.ico", "/health/live", "/health/ready")
_CORS = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": "authorization, content-type, x-request-id",
    "Access-Control-Max-Age": "600",
}
_ROOM = 4  # bodies of the largest size held at once, across all requests
_DISCARD_SECONDS = 2.0  # for a refused body to end, so that the client reads the reason
_GRACE = 1.0  # seconds after the deadline in which an answer due by then is still sent


class Account:
    """The outermost guard; see the module docstring."""

    def __init__(self, app: ASGIApp, server: Serving, metrics: Metrics) -> None:
        self._app, self._server, self._metrics = app, server, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        wanted_id = headers.get("x-request-id", "")
        request_id = wanted_id if _REQUEST_ID.fullmatch(wanted_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(MutableHeaders(scope=message), scope, request_id, time.perf_counter() - start)
            await send(message)

        self._metrics.begin()
        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            scope["finelip.code"] = "internal"
            log.error("request %s failed", request_id, exc_info=error)
            if not status:
                refusal = Refusal(
                    500, "internal", f"internal server error; see request ID {request_id} in the server's log"
                )
                await refusal.answer(request_id)(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - start
            self._metrics.end(scope, scope.get("finelip.status") or status or _CLOSED, seconds)
            self._write(scope, scope.get("finelip.status") or status or _CLOSED, seconds, request_id)

    def _add_headers(self, headers: MutableHeaders, scope: Scope, request_id: str, seconds: float) -> None:
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        headers["Content-Security-Policy"] = _DOCS_CSP if scope["path"] == "/docs" else _CSP
        headers.setdefault("Cache-Control", "no-store")
        headers["X-Request-ID"] = request_id
        stages = {**scope.get("finelip.stages", {}), "total": seconds}
        headers["Server-Timing"] = ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in stages.items())
        if (origin := Headers(scope=scope).get("origin")) and origin in self._server.settings.origins:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "x-request-id, retry-after, server-timing"
            headers.add_vary_header("Origin")
        if self._server.state == "draining":
            headers["Connection"] = "close"

    def _write(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(1000 * seconds, 1),
            "request_id": request_id,
            "client": scope["client"][0] if scope.get("client") else None,
        }
        if "finelip.code" in scope:
            line["code"] = scope["finelip.code"]
        if self._server.settings.log_queries and "finelip.queries" in scope:
            line["queries"] = scope["finelip.queries"]
        access.info(json.dumps(line))


class Doors:
    """Guard that checks host names, origins and the key; see the module docstring."""

    def __init__(self, app: ASGIApp, server: Serving) -> None:
        self._app, self._settings = app, server.settings
        self._key = None if server.settings.api_key is None else server.settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (answer := self._answer(scope, Headers(scope=scope))) is not None:
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _answer(self, scope: Scope, headers: Headers) -> Any:
        """Return the answer that ends the request here, or None to continue."""
        try:
            _check_size(scope)
            self._check_host(headers)
            origin = headers.get("origin")
            is_named = origin is not None and origin in self._settings.origins
            if is_named and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                return Preflight()
            if origin is not None and not is_named and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                _check_origin(origin, headers)
            if self._key is not None and not is_open(scope["path"]):
                self._check_key(self._key, headers)
        except Refusal as refusal:
            scope["finelip.code"] = refusal.code
            return refusal.answer(scope["state"]["request_id"])
        return None

    def _check_host(self, headers: Headers) -> None:
        names = headers.getlist("host")
        name = host_name(names[0]) if len(names) == 1 else None
        if name is None or not is_ours(name, self._settings):
            got = ", ".join(names) or "none"
            message = f"expected the Host header to name this server, got {got!r:.80}; name it with --allowed-host"
            raise Refusal(421, "wrong_host", message)

    def _check_key(self, key: bytes, headers: Headers) -> None:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        sent = value.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent, key):
            got = "another key" if value else "none"
            message = f"expected the server's key as Authorization: Bearer KEY, got {got}"
            raise Refusal(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})


class Preflight:
    """Answer to a CORS preflight request of an allowed origin."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in _CORS.items()]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def is_open(path: str) -> bool:
    """Return whether a path answers without the key: the page, its files, the API's documentation, and the health checks."""
    return path in _OPEN or path.startswith("/static/")


def host_name(host: str) -> str | None:
    """Return the name in a Host header, in lower case and without the port, or None if it is invalid."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]/@\s]+)(?::[0-9]{1,5})?", host)
    return None if match is None else match[1].strip("[]").lower().rstrip(".") or None


def is_ours(name: str, settings: ServeSettings) -> bool:
    """Return whether a server accepts a host name; any IP address if it listens on all, since these cannot be rebound."""
    if name == "localhost" or name == settings.host.lower() or name in (host.lower() for host in settings.hosts):
        return True
    try:
        address = ipaddress.ip_address(name)
        return address.is_loopback or ipaddress.ip_address(settings.host).is_unspecified
    except ValueError:
        return False


def _check_size(scope: Scope) -> None:
    """
    Raises:
        Refusal: 431. The protocol refuses only large headers that it has to wait for, not those that arrive at once.
    """
    size = sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])
    if size + len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_HEADERS:
        raise headers_too_large()


def headers_too_large() -> Refusal:
    """Return the refusal for request headers that are too large."""
    message = f"expected a request line and headers of at most {MAX_HEADERS} bytes, got more; send it in the body"
    return Refusal(431, "headers_too_large", message, headers={"Connection": "close"})


def _check_origin(origin: str, headers: Headers) -> None:
    """
    Raises:
        Refusal: 403 for a page that is not this server's.
    """
    scheme, _, host = origin.partition("://")
    if scheme not in ("http", "https") or host.lower() != headers.get("host", "").lower():
        message = f"expected requests of this server's own page, got one of {origin!r:.200}; name it with --origin"
        raise Refusal(403, "cross_site", message)


def check_exposure(settings: ServeSettings) -> None:
    """
    Raises:
        InputError: The address is not a loopback address and there is no key, or the key is invalid.
    """
    key = settings.api_key
    if key is not None and not re.fullmatch(r"[\x21-\x7e]{16,4096}", key):
        got = "others" if 16 <= len(key) <= 4096 else len(key)
        raise InputError(
            f"expected an API key of 16 to 4096 printable ASCII characters without spaces, got {got}; make one: "
            "python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    if key is None and not is_loopback(settings.host):
        raise InputError(
            f"expected an API key to listen on {settings.host!r:.80}, where other machines reach the server: put one in a "
            f"file and pass it with --api-key-file, or set {API_KEY_VARIABLE}; or listen on 127.0.0.1"
        )


class Gone(Exception):
    """The client disconnected before its request had arrived."""


class Bounds:
    """Guard that limits bytes and seconds; see the module docstring."""

    def __init__(self, app: ASGIApp, server: Serving) -> None:
        self._app, self._server = app, server
        self._room = Room(_ROOM * server.settings.limits.body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = Body(receive, Headers(scope=scope), self._server.settings, self._room)
        started = False

        async def send_after_body(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not await body.discard():
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        async def refuse(refusal: Refusal) -> None:
            scope["finelip.code"] = refusal.code
            await refusal.answer(scope["state"]["request_id"])(scope, receive, send_after_body)

        if self._server.state != "ready" and scope["path"].startswith("/v1/"):
            message = f"the server is {self._server.state}; try again soon"
            await refuse(Refusal(503, "not_ready", message, headers={"Retry-After": "2"}))
            return
        loop, settings = asyncio.get_running_loop(), self._server.settings
        late = loop.create_future()
        seconds = settings.timeout + (settings.limits.body_seconds if body.is_expected else 0)
        timer = loop.call_later(seconds + _GRACE, _set, late)

        def start_clock() -> None:
            nonlocal timer
            timer.cancel()
            timer = loop.call_later(settings.timeout + _GRACE, _set, late)
            scope["state"]["deadline"] = loop.time() + settings.timeout

        work = asyncio.ensure_future(self._work(scope, body, send_after_body))
        leaving = asyncio.ensure_future(body.wait_for_leaving(start_clock))
        try:
            await asyncio.wait({work, leaving, late}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await _cancelled(work)
                if started or not late.done():
                    scope["finelip.status"] = _CLOSED
                else:
                    message = f"the request took longer than {settings.timeout:g} s and was aborted; send less at once"
                    await refuse(Refusal(504, "deadline", message))
                return
            try:
                work.result()
            except Gone:
                scope["finelip.status"] = _CLOSED
        finally:
            timer.cancel()
            await _cancelled(leaving)
            await _cancelled(work)
            body.release()

    async def _work(self, scope: Scope, body: Body, send: Send) -> None:
        await self._app(scope, body.receive, send)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel a task, whatever it is doing, and wait until it is done."""
    while not task.done():
        task.cancel()
        # Before Python 3.12, a wait that ends at the same moment swallows the cancellation.
        await asyncio.wait({task}, timeout=0.1)


class Room:
    """Budget of bytes for the bodies held at once."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, size: int) -> None:
        """
        Raises:
            Refusal: 429 if there is not enough room.
        """
        if size > self._left:
            message = "the server is busy; try again soon"
            raise Refusal(429, "overloaded", message, headers={"Retry-After": "1"})
        self._left -= size

    def give(self, size: int) -> None:
        """Return bytes to the budget."""
        self._left += size


class Body:
    """The body of one request, received within bounds or not at all.

    Attributes:
        is_expected: Whether the headers announce a body.
        ended: Event that is set once the whole body has arrived.
    """

    def __init__(self, receive: Receive, headers: Mapping[str, str], settings: ServeSettings, room: Room) -> None:
        self._receive, self._limits, self._room = receive, settings.limits, room
        length = headers.get("content-length", "0")
        self._length = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
        self._waits_for_word = headers.get("expect", "").lower() == "100-continue"
        self.is_expected = self._length > 0 or "transfer-encoding" in headers
        self._size, self._until, self._is_handed = 0, 0.0, False
        self.ended, self._left = asyncio.Event(), asyncio.Event()

    async def receive(self) -> Message:
        """Return the next part as an ASGI message.

        Raises:
            Refusal: 413, 408 or 429.
            Gone: The client disconnected.
        """
        if not self.is_expected and not self._is_handed:
            await self.ended.wait()
            self._is_handed = True
            return {"type": "http.request", "body": b"", "more_body": False}
        if self.ended.is_set():
            await self._left.wait()
            return {"type": "http.disconnect"}
        if self._length > self._limits.body:
            raise self._too_large()
        clock = asyncio.get_running_loop().time
        self._until = self._until or clock() + self._limits.body_seconds
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._until - clock()))
        except asyncio.TimeoutError:
            seconds = self._limits.body_seconds
            raise Refusal(408, "slow_body", f"expected the body within {seconds:g} s, got only a part of it") from None
        if message["type"] == "http.disconnect":
            raise Gone
        self._waits_for_word = False
        size = len(message.get("body", b""))
        if self._size + size > self._limits.body:
            raise self._too_large()
        self._room.take(size)
        self._size += size
        if not message.get("more_body", False):
            self.ended.set()
        return message

    async def wait_for_leaving(self, ended: Callable[[], None]) -> None:
        """Return once the client has disconnected; anything it sends after the body does not belong to this request.

        Args:
            ended: Function that is called once the whole body has arrived.
        """
        if not self.is_expected:
            if (await self._receive())["type"] == "http.disconnect":
                self._left.set()
            self.ended.set()
        await self.ended.wait()
        ended()
        while not self._left.is_set():
            if (await self._receive())["type"] == "http.disconnect":
                self._left.set()

    async def discard(self) -> bool:
        """Discard the rest of a body that is answered before its end; return whether the end arrived.

        A client that is still sending does not read. If the connection were closed, it would not learn why.
        """
        if self.ended.is_set() or not self.is_expected:
            return True
        if self._waits_for_word or self._length > 2 * self._limits.body:
            return False
        with suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(self._rest(), _DISCARD_SECONDS)
        return False

    async def _rest(self) -> bool:
        most, size = 2 * self._limits.body, 0
        while size < most:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return False
            size += len(message.get("body", b""))
            if not message.get("more_body", False):
                self.ended.set()
                return True
        return False

    def release(self) -> None:
        """Release the room that the body took."""
        self._room.give(self._size)
        self._size = 0

    def _too_large(self) -> Refusal:
        message = f"expected a body of at most {self._limits.body} bytes, got more; send less at once"
        return Refusal(413, "body_too_large", message)
