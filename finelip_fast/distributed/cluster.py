"""The Ray cluster: the one this process is connected to, the one at ``RAY_ADDRESS``, or else one on this machine alone."""

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
from numbers import Real
from typing import Any

from finelip_fast.errors import EngineError, InputError

# Bytes; embeddings go through files, so little passes through Ray's own memory.
_OBJECT_STORE = 128 << 20

_SMALLEST_SHARE = 0.0001  # of a core or a GPU, Ray's unit

_lock = threading.Lock()
_users = 0  # number of users of the connection made here
_handler: Any = signal.SIG_DFL  # SIGTERM handler from before that connection


@contextmanager
def cluster(cpus: float) -> Iterator[Any]:
    """Connect to Ray; a connection or cluster started here ends with its last user.

    Args:
        cpus: Number of cores to be used. A cluster started here offers as many, even if the machine has fewer.

    Returns:
        The module ``ray``.

    Raises:
        EngineError: Ray is not installed or does not start, or the cluster at ``RAY_ADDRESS`` cannot be reached.
    """
    global _users, _handler
    ray = import_ray()
    with _lock:
        started_here = _users > 0 or not ray.is_initialized()
        if started_here and not _users:
            _handler = signal.getsignal(signal.SIGTERM)
            try:
                _connect(ray, cpus)
            except BaseException:
                _handle(_handler)  # Ray replaces it first of all
                raise
            if callable(_handler):  # a command's own handler, which ends it as documented; Ray replaces it
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


def check_resources(cpus: Any, gpus: Any) -> tuple[float, float]:
    """Return the resources for each process, as Ray takes them.

    Raises:
        InputError: One is not a number of at least 0, or is one that Ray cannot share out.
    """
    for name, value in (("cpus", cpus), ("gpus", gpus)):
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or (value != 0 and not _SMALLEST_SHARE <= float(value) < math.inf):
            raise InputError(f"expected {name} to be 0 or a number of at least {_SMALLEST_SHARE}, got {value!r:.80}")
    if gpus > 1 and gpus % 1:
        raise InputError(f"expected gpus above 1 to be a whole number, got {gpus!r:.80}")
    return float(cpus), float(gpus)


def _handle(handler: Any) -> None:
    with suppress(ValueError, TypeError):  # only the main thread may do this; the handler may not be Python's
        signal.signal(signal.SIGTERM, handler)


def import_ray() -> Any:
    """Import Ray, with the settings for a cluster of our own if it is not imported yet and ``RAY_ADDRESS`` is not set.

    Raises:
        EngineError: It is not installed.
    """
    if "ray" not in sys.modules and "RAY_ADDRESS" not in os.environ:
        for name, value in _settings().items():  # read when Ray is imported; the user's own settings are kept
            os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise EngineError(f"ray is not installed ({error}): pip install 'finelip-fast[distributed]'") from None
    return ray


def _settings() -> dict[str, str]:
    return {
        # Ray listens on all of the machine's addresses: with a secret in its environment it obeys only this process.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # otherwise Ray warns that this will be the default
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
                "to use only this machine"
            ) from None
        return
    for is_last in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=max(math.ceil(cpus), os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                **quiet,
            )
            return
        except Exception as error:  # also a bare one, if Ray's processes do not answer within its fixed 30 s
            ray.shutdown()
            if is_last:
                reason = reason_of(error).rstrip(".")
                raise EngineError(
                    f"Ray does not start on this machine, tried twice: {reason}; try again when the machine is less busy, "
                    "or start a cluster with 'ray start --head' and give its address in RAY_ADDRESS"
                ) from None


def _knock(address: str) -> None:
    """Raise at once if nothing listens at the address; Ray would keep trying for many minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():  # not "auto"
        socket.create_connection((host, int(port)), timeout=10).close()


def reason_of(error: BaseException) -> str:
    """Return the reason for an error that Ray has wrapped, in one line."""
    inner = getattr(error, "cause", None) or error
    return str(inner).strip().partition("\n")[0] or type(inner).__name__
