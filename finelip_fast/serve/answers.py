"""Answers as JSON, files with their ETag, and refusals in the format of OpenAI's errors.

Ids are file names, which may not be valid UTF-8, and metadata may hold values that JSON cannot represent. So the output is
ASCII with escapes, and null replaces numbers that are not finite.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from finelip_fast.errors import FineLIPError, InputError, StoreError, WriteError
from finelip_fast.serve.batching import DeadlineExceeded, Draining, Overloaded

log = logging.getLogger("finelip_fast.serve")

_MAX_MESSAGE = 2000
_LARGEST_INTEGER = 1 << 64
_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An unsuccessful answer.

    Args:
        status: HTTP status.
        code: Short name of the reason, for programs.
        message: Statement of what was expected, what was received, and what to do.
        param: Field of the request at fault.
        headers: Further headers.
        fields: Fields of the answer in addition to the error.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers, self.fields = dict(headers or {}), dict(fields or {})

    def answer(self, request_id: str | None) -> Response:
        """Return the answer that the client receives."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {
            "message": self.message[:_MAX_MESSAGE],
            "type": "timeout_error" if self.status == 504 else kind,
            "code": self.code,
            "param": self.param,
            "request_id": request_id,
        }
        return answer({"error": error, **self.fields}, status=self.status, headers=self.headers)


def no_item(id: str, clause: str = "", shard: str | None = None) -> Refusal:
    """Return the refusal for the id of a missing item, of a shard if the request names one."""
    message = f"expected the id of an item {clause}".rstrip() + f", got {id!r:.200}"
    if shard is not None:
        message += f" of the shard {shard!r:.200}"
    return Refusal(404, "no_such_item", message, param="item")


def answer(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a value as a JSON answer."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def file_answer(request: Request, content: bytes, media_type: str, *, private: bool) -> Response:
    """Return the content of a file, or 304 without it if the client has it.

    Args:
        request: Request for the file.
        content: Content of the file.
        media_type: Media type of the content.
        private: Whether only the client may keep a copy, and no cache on the way.
    """
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache" if private else "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON in ASCII."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    return text.encode()


def _plain(value: Any) -> Any:
    """Return a value with null for numbers that are not finite, and text for integers too long for readers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        return hex(value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def refusal_of(error: FineLIPError) -> Refusal:
    """Return what a client is told about a library error; if it is not the client's fault, the log has the rest."""
    if isinstance(error, Overloaded):
        return Refusal(429, "overloaded", str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, DeadlineExceeded):
        return Refusal(504, "deadline", str(error))
    if isinstance(error, Draining):
        return Refusal(503, "not_ready", str(error), headers={"Retry-After": "2"})
    if isinstance(error, InputError):
        return Refusal(400, "invalid_input", str(error))
    log.error("%s: %s", type(error).__name__, error)
    if isinstance(error, StoreError):
        message = "the index cannot be read or written now; the server's log says why"
    elif isinstance(error, WriteError):
        message = "the server cannot write to its disk; the server's log says why"
    else:
        message = "the server cannot do this now; the server's log says why"
    return Refusal(503, "unavailable", message, headers={"Retry-After": "5"})
