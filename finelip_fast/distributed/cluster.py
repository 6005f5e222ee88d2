"""The Ray cluster: the one that this process is connected to, that of ``RAY_ADDRESS``, or else one on this machine alone."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from finelip_fast.errors import EngineError

# Embeddings go through files, so little passes through Ray's own memory; bytes.
_OBJECT_STORE = 128 << 20

_lock = threading.Lock()
_users = 0  # of the connection that was made here
_handler: Any = signal.SIG_DFL  # of SIGTERM, before it was made


@contextmanager
def cluster(cpus: float) -> Iterator[Any]:
    """Ray, connected; what was connected or started here ends with its last user.

    Args:
        cpus: Cores that will be taken. A cluster of our own offers as many, even if the machine has fewer.

    Returns:
        The module ``ray``.

    Raises:
        EngineError: Ray is not installed, or the cluster of ``RAY_ADDRESS`` cannot be reached.
    """
    global _users, _handler
    ray = import_ray()
    with _lock:
        started_here = _users > 0 or not ray.is_initialized()
        if started_here and not _users:
            _handler = signal.getsignal(signal.SIGTERM)
            _connect(ray, cpus)
            if callable(_handler):  # a command's own, which ends it as documented; Ray puts another in its place
                _handle(_handler)
        _users += started_here
    try:
        yield ray
    finally:
        with _lock:
            _users -= started_here
            if started_here and not _users:
                ray.shutdown()
                _handle(_handler)


def _handle(handler: Any) -> None:
    with suppress(ValueError, TypeError):  # only the main thread may; and there may be one that is not Python's
        signal.signal(signal.SIGTERM, handler)


def import_ray() -> Any:
    """The module; where it is new to this process and no cluster is named, with the settings of one of our own.

    Raises:
        EngineError: It is not installed.
    """
    if "ray" not in sys.modules and "RAY_ADDRESS" not in os.environ:
        for name, value in _settings().items():  # read when Ray is imported; what the user has set stays
            os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise EngineError(f"ray is not installed ({error}): pip install 'finelip-fast[distributed]'") from None
    return ray


def _settings() -> dict[str, str]:
    return {
        # It listens on all of the machine's addresses: with a secret in its environment it obeys this process alone.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns that it will be so
    }


def _connect(ray: Any, cpus: float) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            _knock(address)
            ray.init(**quiet)
        except (OSError, RuntimeError, ValueError) as error:
            raise EngineError(
                f"the Ray cluster of RAY_ADDRESS={address!r} cannot be used: {error}; start it, or unset RAY_ADDRESS "
                "to use this machine alone"
            ) from None
        return
    ray.init(
        address="local",
        num_cpus=max(math.ceil(cpus), os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE,
        **quiet,
    )


def _knock(address: str) -> None:
    """Raise at once where nobody is; Ray would try for many minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():  # not "auto"
        socket.create_connection((host, int(port)), timeout=10).close()


def told(error: BaseException) -> str:
    """Why, in a line, of an error that Ray has wrapped."""
    inner = getattr(error, "cause", None) or error
    return str(inner).strip().partition("\n")[0] or type(inner).__name__
