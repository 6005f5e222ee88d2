"""The address of a server, and how to connect to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx2

from finelip_fast._addresses import API_KEY_VARIABLE, is_loopback
from finelip_fast._arguments import seconds
from finelip_fast.errors import InputError, ServerError

_IDLE_SECONDS = 4.0  # after which a connection is not reused, long before the server closes it


class Connection:
    """Address, key and timeout of a server; the base of both clients."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 30.0) -> None:
        self.url = _checked_url(url)
        self.timeout = seconds("timeout", timeout)
        self._key = None if api_key is None else _checked_key("api_key", api_key)
        self._is_closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise ServerError(f"this client of {self.url} is closed: open another, {type(self).__name__}({self.url!r})")

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        """Pickle the arguments; a key from the environment is not among them."""
        return partial(type(self), self.url, api_key=self._key, timeout=self.timeout), ()

    def _options(self) -> dict[str, Any]:
        """Return the options that both of httpx2's clients are opened with."""
        key = self._key
        if key is None and (variable := os.environ.get(API_KEY_VARIABLE)):
            key = _checked_key(API_KEY_VARIABLE, variable)
        address = urlsplit(self.url)
        return {
            "base_url": self.url,
            "headers": {} if key is None else {"authorization": f"Bearer {key}"},
            "timeout": self.timeout,
            "limits": httpx2.Limits(keepalive_expiry=_IDLE_SECONDS),
            # Proxies from the environment are for other hosts. Without TLS, skip loading certificates, which takes a while.
            "trust_env": not is_loopback(address.hostname or ""),
            "verify": address.scheme == "https",
        }

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn a failing connection into a ServerError, and an address that cannot be into an InputError."""
        self._refuse_if_closed()
        try:
            yield
        except httpx2.InvalidURL as error:
            raise InputError(
                f"expected an id, a filter or a cursor that fits into an address, got one that does not ({error}); shorten it"
            ) from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise ServerError(
                f"no server answers at {self.url} ({str(error) or 'it took too long'}): start it with finelip serve, or check "
                "the address"
            ) from None
        except httpx2.TimeoutException:
            raise ServerError(
                f"the server at {self.url} did not answer within {self.timeout:g} seconds; send fewer items per request, or "
                "pass a longer timeout"
            ) from None
        except httpx2.HTTPError as error:
            raise ServerError(
                f"the connection to {self.url} broke: {error or type(error).__name__}; try again"
            ) from None


def _checked_url(url: Any) -> str:
    if not _is_sound(url):
        message = f"expected the address of a server, such as http://127.0.0.1:8000, got {url!r:.200}"
        lacks_scheme = isinstance(url, str) and ":/" not in url and _is_sound(f"http://{url}")
        raise InputError(f"{message}; did you mean http://{url:.200}?" if lacks_scheme else message)
    return str(url).rstrip("/")


def _is_sound(url: Any) -> bool:
    try:
        address = urlsplit(url) if isinstance(url, str) else None
        return (
            address is not None
            and address.scheme in ("http", "https")
            and bool(address.hostname)
            and not (address.query or address.fragment or address.username or address.password)
            and (address.port is None or address.port > 0)
            and url.isprintable()
            and " " not in url
            and bool(httpx2.URL(url).host)
        )
    except (ValueError, httpx2.InvalidURL):
        return False


def _checked_key(name: str, key: Any) -> str:
    if not isinstance(key, str) or not key.isascii() or not key.isprintable() or not key or " " in key:
        got = "other characters" if isinstance(key, str) else type(key).__name__
        raise InputError(f"expected {name} to be printable ASCII without spaces, got {got}")
    return key
