"""Requests and their answers: what to send again, and what a refusal means."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import httpx2

from finelip_fast._addresses import API_KEY_VARIABLE
from finelip_fast._json import parse_json
from finelip_fast.client.sending import as_json
from finelip_fast.errors import FineLIPError, InputError, ServerError

T = TypeVar("T")

# A full or starting server says when to ask again: number of tries, and longest pause accepted between them, in seconds.
_TRIES, _LONGEST_PAUSE = 3, 5.0

_WRONG_INPUT = {400, 404, 413, 415}  # statuses that concern the input
# What to do about refusals, if the server's own message does not say it.
_REMEDIES = {
    401: (
        API_KEY_VARIABLE,
        f"pass api_key=..., or set {API_KEY_VARIABLE}, to the key that the server was started with",
    ),
    403: ("--writable", "start the server with finelip serve --writable to add and delete"),
    421: ("--allowed-host", "name the host by which the server is called: finelip serve --allowed-host"),
}


class Request(NamedTuple):
    """A request.

    Attributes:
        method, path: HTTP method, and path below the server's address.
        arguments: Body or query, as httpx2 takes them.
        repeatable: Whether it may be sent again, because it changes nothing.
        pause: Seconds to wait before it is sent.
    """

    method: str
    path: str
    arguments: dict[str, Any] = {}  # noqa: RUF012  # never changed
    repeatable: bool = True
    pause: float = 0.0


Steps: TypeAlias = Generator[Request, httpx2.Response, T]


def json_request(route: str, body: dict[str, Any]) -> Request:
    return Request("POST", f"v1/{route}", {"content": as_json(body), "headers": {"content-type": "application/json"}})


def exchange(request: Request) -> Steps[dict[str, Any]]:
    """Send a request, again if the server says when to, and return its answer."""
    for _ in range(_TRIES - 1):
        response = yield request
        pause = _pause(response)
        if pause is None or not request.repeatable:
            return answer_of(response)
        request = request._replace(pause=pause)
    response = yield request
    return answer_of(response)


def _pause(response: httpx2.Response) -> float | None:
    """Return the seconds after which to ask again, or None for not at all."""
    if response.status_code not in (429, 503):
        return None
    try:
        seconds = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return seconds if 0 <= seconds <= _LONGEST_PAUSE else None


def answer_of(response: httpx2.Response) -> dict[str, Any]:
    if not response.is_success:
        raise _refusal(response)
    expected = "the answer of finelip serve"
    # An id may be a file name that is not valid UTF-8.
    answer: dict[str, Any] = parse_json(
        response.content, response.url, error=ServerError, expected=expected, kind=dict, surrogates=True
    )
    return answer


def _refusal(response: httpx2.Response) -> FineLIPError:
    """Return the error that an answer reports."""
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
def expected_answer() -> Iterator[None]:
    """Turn an answer of unexpected shape into a ServerError."""
    try:
        yield
    except FineLIPError:  # a refusal of the input, which is a ValueError, too
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"expected the answer of finelip serve, got one in another format ({error!r:.200}); run the same version on both "
            "sides"
        ) from None
