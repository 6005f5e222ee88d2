"""``finelip search``: finding pictures, in the terminal and on a page, in an index here or through a server."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click
from click.core import ParameterSource

from finelip_fast.cli.commands import (
    Command,
    ModelOptions,
    after_result,
    alpha_option,
    check_file,
    index_option,
    is_quiet,
    model_options,
    speaks_json,
    write_after_result,
)
from finelip_fast.cli.items import nothing, where_option
from finelip_fast.cli.values import DESCRIPTION, PICTURE, Number, OneOf
from finelip_fast.errors import FineLIPError, InputError, StoreError

if TYPE_CHECKING:
    from finelip_fast.hits import Hits
    from finelip_fast.retriever import Retriever

SERVER_VARIABLE = "FINELIP_SERVER"

_LOCAL_OPTIONS = ("index", "checkpoint", "engine", "precision", "device", "verify", "why")


@click.command(cls=Command)
@click.argument("text", required=False, type=DESCRIPTION)
@click.option("--image", type=PICTURE, metavar="FILE", help="Picture to search with, instead of a description.")
@click.option("-k", "k", type=int, default=10, help="Number of hits.")
@index_option
@where_option
@click.option(
    "--mode",
    type=OneOf("auto", "exact", "exact-int8", "two-stage", "sketch"),
    default="auto",
    help="Mode of the search: auto, exact, exact-int8, two-stage, sketch.",
)
@alpha_option
@click.option("--verify", is_flag=True, help="Verify the checksums of the whole index first.")
@click.option("--paths", is_flag=True, help="Print only the paths of the pictures.")
@click.option("--preview", is_flag=True, help="Show thumbnails in the terminal.")
@click.option(
    "--html", metavar="FILE.html", help="HTML page to write, with a thumbnail, the scores and the metadata of each hit."
)
@click.option("--open", "opens", is_flag=True, help="Open the page in the browser; without --html, a temporary one.")
@click.option(
    "--why",
    type=Number(0),
    default=0,
    metavar="N",
    help="With --html or --open: link pages that explain the first N hits.",
)
@click.option(
    "--server",
    envvar=SERVER_VARIABLE,
    metavar="URL",
    help=f"Server to ask, started by finelip serve, which takes no model here.  [default: {SERVER_VARIABLE}, or none]",
)
@model_options
def search(
    text: str | None,
    image: str | None,
    k: int,
    index: str,
    where: str | None,
    mode: str,
    alpha: float | None,
    verify: bool,
    paths: bool,
    preview: bool,
    html: str | None,
    opens: bool,
    why: int,
    server: str | None,
    model: ModelOptions,
) -> Any:
    """Search an index with a description (TEXT) or a picture.

    With 50 items or more, each hit says whether it stands out from the rest of the index; a line below the hits says when
    nothing seems to match.
    """
    if (text is None) == (image is None):
        raise InputError(
            "expected either a description or --image FILE, got " + ("neither" if text is None else "both")
        )
    if why and not (html is not None or opens):
        raise InputError(f"expected --why with --html FILE or --open, got --why {why} alone")
    if why and text is None:
        raise InputError("expected --why with a description, got --image: a picture's words are what is explained")
    if preview and (paths or speaks_json()):
        raise InputError("expected --preview alone, got --" + ("paths" if paths else "json") + " with it")
    check_file("--html", html)
    show = _open_preview() if preview else None  # a terminal that cannot show it is an error before a model is loaded
    retriever: Any
    if server is not None and _asks_server(server):
        retriever = _RemoteRetriever(server, alpha)
    else:
        from finelip_fast.index import remedies, stored_source

        if stored_source(index) is None:
            raise StoreError(f"there is no index at {index}: {remedies.make(index)}")
        retriever = model.open_retriever(index, alpha=alpha, verify=verify)
    hits = retriever.search(text, image=image, k=k, mode=mode, where=where)
    if hits and sys.stdout.isatty() and not (is_quiet() or paths or speaks_json()):
        after_result(lambda: _print_meanings(hits, retriever.alpha))
    if html is not None or opens:
        page = html if html is not None else str(Path(tempfile.mkdtemp(prefix="finelip-")) / "search.html")

        def write(path: str) -> None:
            pages = _write_explanations(retriever, hits, text, Path(path), why) if text is not None else {}
            hits.to_html(path, text=text, image=image, alpha=retriever.alpha, why=pages)

        write_after_result(page, write)
        if opens:
            after_result(lambda: _open_page(page))
    if not hits:
        return nothing(len(retriever), where, getattr(retriever, "index", None))
    if show is not None:
        return show(hits)
    return [hit.path or hit.id for hit in hits] if paths else hits


def _open_preview() -> Callable[[Hits], Iterator[str]]:
    from finelip_fast.cli.preview import open_preview

    return open_preview()


def _asks_server(server: str) -> bool:
    """Return whether a search goes to the server; options that need the local index override a server from the environment.

    Raises:
        InputError: The server and such an option are both on the command line.
    """
    context = click.get_current_context()
    typed = [
        f"--{name}" for name in _LOCAL_OPTIONS if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    ]
    if typed and context.get_parameter_source("server") == ParameterSource.COMMANDLINE:
        raise InputError(
            f"expected --server without {', '.join(typed)}, which the server was started with or which needs the index here, "
            f"got both with {server!r:.200}"
        )
    return not typed


class _RemoteRetriever:
    """The part of a retriever that a search needs, provided by a server."""

    def __init__(self, url: str, alpha: float | None) -> None:
        from finelip_fast.client import Client

        self._client, self._alpha = Client(url), alpha

    def search(self, text: str | None, **options: Any) -> Any:
        """Return the hits of one query."""
        return self._client.search(text, alpha=self._alpha, **options)  # type: ignore[arg-type]

    @property
    def alpha(self) -> float:
        """Weight of the global score."""
        return float(self._client.info()["alpha"]) if self._alpha is None else self._alpha

    def __len__(self) -> int:
        return int(self._client.info()["items"])


def _print_meanings(hits: Hits, alpha: float) -> None:
    from finelip_fast.hits import score_meanings

    print()
    for name, meaning in score_meanings(hits, alpha).items():
        print(f"{name:6}  {meaning}")


def _write_explanations(retriever: Retriever, hits: Hits, text: str, page: Path, count: int) -> dict[int, str]:
    """Write pages that explain the first hits that are pictures, beside the page that will link to them.

    Returns:
        Addresses of the pages, relative to that page, by the hits' ranks.
    """
    from finelip_fast.hits import picture_file

    addresses = {}
    pictures = [(rank, hit) for rank, hit in enumerate(hits, start=1) if picture_file(hit) is not None]
    for rank, hit in pictures[:count]:
        try:
            explanation = retriever.explain(hit, text)
        except FineLIPError as error:  # a damaged picture, or an engine without the model in PyTorch
            warnings.warn(f"hit {rank} is not explained: {error}", stacklevel=2)
            continue
        path = page.with_name(f"{page.stem}-why-{rank}.html")
        explanation.to_html(path)
        addresses[rank] = quote(os.fsencode(path.name))
    return addresses


def _open_page(path: str) -> None:
    if not webbrowser.open(Path(path).absolute().as_uri()):
        warnings.warn(f"no browser was found to open {path}", stacklevel=2)
