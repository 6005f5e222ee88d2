"""``finelip serve``: a page and an API that search an index."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import threading
import warnings
import webbrowser
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from finelip_fast._addresses import API_KEY_VARIABLE
from finelip_fast._files import read_bytes
from finelip_fast.cli.commands import Command, ModelOptions, Several, alpha_option, index_option, model_options
from finelip_fast.cli.values import Number
from finelip_fast.errors import InputError

if TYPE_CHECKING:
    from finelip_fast.serve.opening import Opening
    from finelip_fast.serve.settings import ServeSettings

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "fastapi_offline")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\.?")
_MAX_WORKERS = 256


@click.command(cls=Command)
@index_option
@click.option(
    "--shards",
    cls=Several,
    metavar="FOLDER",
    help="Index folders to search together, each in its own process.",
)
@click.option(
    "--ray", metavar="ADDRESS", help="Ray cluster of the shards, such as ray://head:10001.  [default: this machine]"
)
@click.option(
    "--host",
    default="127.0.0.1",
    metavar="ADDRESS",
    help="Address to listen on; any but a local one needs a key.",
)
@click.option(
    "--port", type=Number(0, 65535), metavar="PORT", default=8000, help="Port to listen on; 0 picks a free one."
)
@click.option(
    "--workers",
    type=Number(1, _MAX_WORKERS),
    default=1,
    help="Number of worker processes; each loads the model.",
)
@click.option(
    "--api-key-file",
    metavar="FILE",
    help=f"File with the key that requests must carry.  [default: {API_KEY_VARIABLE}, or none]",
)
@click.option("--writable", is_flag=True, help="Allow pictures to be added and deleted.")
@click.option(
    "--uploads",
    metavar="FOLDER",
    help="With --writable: folder for added pictures.  [default: uploads in the index]",
)
@click.option(
    "--allowed-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Host name of the server, besides its address and localhost; can be repeated.",
)
@click.option(
    "--origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Origin of another page that may send requests, such as https://example.org; can be repeated.",
)
@click.option("--timeout", type=float, default=30.0, metavar="SECONDS", help="Timeout of a request, in seconds.")
@click.option(
    "--batch-wait",
    type=float,
    default=2.0,
    metavar="MS",
    help="Milliseconds to wait for other requests that can share a batch.",
)
@click.option("--max-batch", type=Number(1, 4096), default=32, help="Texts or pictures in one batch.")
@click.option(
    "--queue",
    type=Number(1, 10**6),
    default=256,
    help="Texts or pictures that may wait in the queue; more are answered with 429.",
)
@click.option(
    "--drain",
    type=float,
    default=20.0,
    metavar="SECONDS",
    help="Seconds that running requests get to finish when the server is stopped.",
)
@click.option("--log-queries", is_flag=True, help="Write the texts of queries to the access log.")
@click.option("--open", "opens", is_flag=True, help="Open the page in the browser.")
@alpha_option
@model_options
def serve(
    index: str,
    shards: tuple[str, ...],
    ray: str | None,
    host: str,
    port: int,
    workers: int,
    api_key_file: str | None,
    writable: bool,
    uploads: str | None,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    timeout: float,
    batch_wait: float,
    max_batch: int,
    queue: int,
    drain: float,
    log_queries: bool,
    opens: bool,
    alpha: float | None,
    model: ModelOptions,
) -> Iterator[str]:
    """Search an index in a browser, and over HTTP.

    The command prints the address of the page; the API's documentation is at /docs there. Stop it with Ctrl-C or SIGTERM.
    """
    from finelip_fast.serve.opening import Opening
    from finelip_fast.serve.settings import ServeSettings

    source = click.get_current_context().get_parameter_source("index")
    if shards and source == ParameterSource.COMMANDLINE:
        raise InputError("expected --index or --shards, got both")
    if ray is not None and not shards:
        raise InputError("expected --ray with --shards, got it alone")
    if shards and workers > 1:
        raise InputError(f"expected --workers 1 with --shards, got {workers}: shards are processes of their own")
    if uploads is not None and not writable:
        raise InputError("expected --uploads with --writable, got it alone")
    if shards and writable:
        raise InputError("expected --writable with --index, got --shards: add to a shard's own folder by finelip add")
    settings = ServeSettings(
        host=_checked_host(host),
        port=port,
        api_key=_api_key(api_key_file),
        hosts=tuple(map(_checked_name, hosts)),
        origins=tuple(map(_checked_origin, origins)),
        writable=writable,
        uploads=uploads,
        timeout=_seconds("--timeout", timeout, 0.1, 3600),
        batch_wait=_seconds("--batch-wait", batch_wait, 0, 1000) / 1000,
        max_batch=max_batch,
        queue=queue,
        drain=_seconds("--drain", drain, 0, 3600),
        log_queries=log_queries,
    )
    opening = Opening(
        index=None if shards else index,
        shards=shards,
        ray=ray,
        checkpoint=model.checkpoint,
        engine=model.engine,
        precision=model.precision,
        device=model.device,
        alpha=alpha,
        uploads=(uploads or str(Path(index) / "uploads")) if writable else None,
    )
    return run(settings, opening, workers=workers, opens=opens)


def run(settings: ServeSettings, opening: Opening, *, workers: int = 1, opens: bool = False) -> Iterator[str]:
    """Serve until a signal arrives; nothing is printed after that.

    Args:
        settings, opening: Settings of the server, and what it serves.
        workers: Number of processes.
        opens: Whether to open the page in the browser.

    Raises:
        InputError: A package is missing.
        StoreError: There is no such index, or it names a checkpoint that this user has not opened.
    """
    require_packages()
    from finelip_fast.serve import run as server

    opening.check()

    def ready(address: str) -> None:
        server.print_address(address)
        if opens:  # a browser in the terminal would block the server that it waits for
            threading.Thread(target=_open_page, args=(address,), daemon=True).start()

    server.serve(settings, opening, workers, ready=ready)
    yield from ()


def require_packages() -> None:
    """
    Raises:
        InputError: A package that serving needs is missing; the message says how to install it.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"finelip serve needs the packages {', '.join(missing)}: pip install 'finelip-fast[serve]'")


def _open_page(address: str) -> None:
    if not webbrowser.open(address):
        warnings.warn(f"no browser was found to open {address}", stacklevel=2)


def _api_key(path: str | None) -> str | None:
    """Return the key from a file, or else from the environment; None if there is none.

    Raises:
        InputError: The file cannot be read.
    """
    if path is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    return read_bytes(path, error=InputError, max_bytes=1 << 14).decode("latin-1").strip()


def _checked_host(host: str) -> str:
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    return _checked_name(host, "--host as an address or a name")


def _checked_name(name: str, expected: str = "--allowed-host as a name without port and path") -> str:
    if not _NAME.fullmatch(name):
        raise InputError(f"expected {expected}, such as photos.example.org, got {name!r:.80}")
    return name


def _checked_origin(origin: str) -> str:
    with suppress(ValueError):
        parts = urlsplit(origin)
        is_origin = parts.scheme in ("http", "https") and origin == f"{parts.scheme}://{parts.netloc}"
        if is_origin and _NAME.fullmatch(parts.hostname or "") and parts.port != 0 and "@" not in origin:
            return origin
    raise InputError(
        "expected --origin as scheme, name and port of a page that may ask, such as https://example.org:8443, got "
        f"{origin!r:.80}"
    )


def _seconds(name: str, value: float, least: float, most: float) -> float:
    if not least <= value <= most:  # refuses NaN, too
        raise InputError(f"expected {name} from {least:g} to {most:g}, got {value:g}")
    return value
