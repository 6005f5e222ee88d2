"""Answers as JSON, and refusals in the shape of OpenAI's.

Ids are names of files, which may be no UTF-8, and metadata may hold what JSON has no word for: what goes out is ASCII, with
escapes, and null in the place of what is not finite.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from finelip_fast.errors import FineLIPError, InputError, StoreError, WriteError
from finelip_fast.serve.batching import DeadlineExceeded, Draining, Overloaded

log = logging.getLogger("finelip_fast.serve")

_MAX_MESSAGE = 2000
_LARGEST_INTEGER = 1 << 64
_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer that is no success.

    Args:
        status: Status of HTTP.
        code: Short name of the reason, for programs.
        message: What was expected, what came, and what to do.
        param: Field of the request that is meant.
        headers: Further headers.
        fields: What the answer holds beside the error.
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
        """The answer that a client gets."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {
            "message": self.message[:_MAX_MESSAGE],
            "type": "timeout_error" if self.status == 504 else kind,
            "code": self.code,
            "param": self.param,
            "request_id": request_id,
        }
        return answer({"error": error, **self.fields}, status=self.status, headers=self.headers)


def answer(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A value as an answer of JSON."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def json_bytes(value: Any) -> bytes:
    """A value as JSON in ASCII."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    return text.encode()


def _plain(value: Any) -> Any:
    """A value with null for what is not finite, and text for integers of more digits than readers take."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        return hex(value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def refusal_of(error: FineLIPError) -> Refusal:
    """What a client is told of an error of the library; of one that is not its fault, the log has the rest."""
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
        message = "the index cannot be read or written now: its server's log says why"
    elif isinstance(error, WriteError):
        message = "the disk of the server takes no more: its log says why"
    else:
        message = "the server cannot do this now: its log says why"
    return Refusal(503, "unavailable", message, headers={"Retry-After": "5"})
