"""``finelip add``, ``search``, ``list`` and ``remove``: adding pictures to an index, finding and removing them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click
from click.core import ParameterSource

from finelip_fast._terminal import printable
from finelip_fast.cli.commands import (
    Command,
    ModelOptions,
    Nothing,
    after_result,
    alpha_option,
    batch_size_option,
    check_file,
    decode_memory_option,
    dtype_option,
    index_option,
    is_quiet,
    model_options,
    shows_progress,
    speaks_json,
    write_after_result,
)
from finelip_fast.cli.usage import nearest
from finelip_fast.cli.values import DESCRIPTION, FILE, PICTURE, Number, OneOf
from finelip_fast.errors import FineLIPError, InputError, StoreError

if TYPE_CHECKING:
    from finelip_fast.hits import Hits
    from finelip_fast.index import Index
    from finelip_fast.retriever import Retriever

SERVER_VARIABLE = "FINELIP_SERVER"

_MOST_FIELDS = 12  # that a message names

_LOCAL_OPTIONS = ("index", "checkpoint", "engine", "precision", "device", "verify", "why")

where_option = click.option(
    "--where", metavar="FILTER", help="Filter on the metadata of items, such as \"camera = 'front' and year >= 2024\"."
)


@dataclass
class ListedItem:
    """An item as ``finelip list`` shows it; the text leaves out metadata that comes from its file."""

    id: str
    path: str | None
    metadata: dict[str, Any]

    def __str__(self) -> str:
        from finelip_fast.picture_files import FIELDS

        fields = {name: value for name, value in self.metadata.items() if name not in FIELDS}
        return printable(f"{self.id}  {json.dumps(fields)}" if fields else self.id)


@dataclass
class Removal:
    """Result of ``finelip remove``."""

    removed: int
    items: int

    reason: str = ""  # why nothing was removed

    def to_dict(self) -> dict[str, int]:
        """The counts for JSON."""
        return {"removed": self.removed, "items": self.items}

    def __str__(self) -> str:
        return self.reason or f"{self.removed} removed, {self.items} left"


@dataclass
class Forecast:
    """Changes that a command would make: ids of items, by what would be done with them."""

    changes: dict[str, list[str]]

    def to_dict(self) -> dict[str, list[str]]:
        """The ids for JSON."""
        return self.changes

    def __str__(self) -> str:
        lines = [f"{change}  {printable(item)}" for change, ids in self.changes.items() for item in ids]
        counts = ", ".join(f"{len(ids)} {change}" for change, ids in self.changes.items())
        return "\n".join([*lines, f"dry run: {counts}; the index is unchanged"])


dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would change, and change nothing.")


@click.command(cls=Command)
@click.argument("sources", nargs=-1, required=True, type=FILE, metavar="FOLDER...")
@index_option
@click.option("--sync", is_flag=True, help="Also remove items whose pictures are no longer in the folders.")
@click.option("--watch", is_flag=True, help="Keep running, and follow changes in the folders.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Name or path to leave out; can be repeated.")
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Name or path to include although it is hidden or kept by another program; can be repeated.",
)
@click.option(
    "--metadata", metavar="FILE", help="Table of additional metadata, JSON Lines or CSV, with a column of paths."
)
@click.option(
    "--root", metavar="FOLDER", help="Folder that the paths in a table are relative to.  [default: the table's]"
)
@click.option("--image-field", metavar="NAME", help="Column of the paths in a table.  [default: image, file or path]")
@model_options
@batch_size_option
@decode_memory_option
@dtype_option
@dry_run_option
def add(
    sources: tuple[str, ...],
    index: str,
    sync: bool,
    watch: bool,
    exclude: tuple[str, ...],
    include: tuple[str, ...],
    metadata: str | None,
    root: str | None,
    image_field: str | None,
    model: ModelOptions,
    batch_size: int,
    dtype: str | None,
    dry_run: bool,
) -> Any:
    """Add the pictures in folders and their subfolders to an index.

    Run it again to add new pictures, embed changed ones again and follow moved ones. Instead of a folder you can give a
    table of pictures, JSON Lines or CSV; its other columns become metadata.
    """
    from finelip_fast.collection import prepare_root
    from finelip_fast.picture_tables import is_table
    from finelip_fast.reports import FolderReport

    folders = [source for source in sources if not is_table(source)]
    for folder in folders:
        _require_folder(folder)  # before a model is loaded
    bases = folders or [root or os.path.dirname(os.path.abspath(sources[0]))]
    if dry_run:
        if watch:
            raise InputError("expected --watch or --dry-run, got both")
        return _forecast(sources, folders, bases, index, sync, exclude, include, root, image_field)
    if watch:
        _watchfiles()
    retriever = model.open_retriever(index, dtype=dtype)
    if not retriever.engine.source:
        warnings.warn(
            "the bundled model knows drawn street scenes only; for photographs get published weights, such as finelip convert "
            "BeichenZhang/LongCLIP-B my-model, and add the pictures to another index with --checkpoint my-model",
            stacklevel=2,
        )
    if retriever.engine.faster:
        warnings.warn(retriever.engine.faster, stacklevel=2)
    prepare_root(retriever.index, bases)

    def run() -> FolderReport:
        report = FolderReport()
        for source in sources:
            common = {"batch_size": batch_size, "progress": shows_progress()}
            if source in folders:
                report += retriever.add_folder(
                    source, sync=sync, exclude=exclude, include=include, metadata=metadata, **common
                )
            else:
                report += retriever.add_table(source, folder=root, image_field=image_field, **common)
        if watch:
            retriever.index.compact_recent()
        return report

    return _watched(run, sources, index) if watch else run()


def _forecast(
    sources: Sequence[str],
    folders: Sequence[str],
    bases: Sequence[str],
    index: str,
    sync: bool,
    exclude: Sequence[str],
    include: Sequence[str],
    root: str | None,
    image_field: str | None,
) -> Forecast:
    """Return what ``finelip add`` would do; pictures are not read, except changed ones."""
    from finelip_fast.collection import common_root, list_folder, list_table, plan
    from finelip_fast.index import stored_index, stored_source
    from finelip_fast.ingest import refuse_emptied

    opened = stored_index(index) if stored_source(index) is not None else None
    base = (opened.root if opened is not None else None) or common_root(bases)
    changes: dict[str, list[str]] = {"added": [], "changed": [], "moved": [], **({"removed": []} if sync else {})}
    for source in sources:
        listing = (
            list_folder(source, base, exclude=exclude, include=include, index=Path(index))
            if source in folders
            else list_table(source, base, base=root or Path(source).parent, image_field=image_field)
        )
        if opened is None:
            changes["added"] += listing.paths
            continue
        planned = plan(opened, listing, base)
        if sync:
            refuse_emptied(opened, listing, base, planned)
        changes["added"] += planned.new
        changes["changed"] += planned.changed
        changes["moved"] += [new for old, (new, _) in planned.relabelled.items() if new != old]
        if sync:
            changes["removed"] += planned.gone
    return Forecast(changes)


def _require_folder(source: str) -> None:
    """
    Raises:
        InputError: The source is neither a folder nor a table.
    """
    if os.path.isdir(source):
        return
    from finelip_fast._decode import image_suffixes

    expected = "expected a folder, or a table (.jsonl, .csv, .tsv), got"
    if not os.path.exists(source):
        raise InputError(f"{expected} nothing there: {source!r:.200}; check the path")
    if Path(source).suffix.lower() in image_suffixes():
        raise InputError(f"{expected} the picture {source!r:.200}; add its folder")
    raise InputError(f"{expected} a file: {source!r:.200}")


def _watched(run: Callable[[], Any], sources: Sequence[str], index: str) -> Iterator[Any]:
    yield run()
    index_folder = os.path.realpath(index)

    def is_outside(_: Any, path: str) -> bool:
        return not os.path.realpath(path).startswith(index_folder + os.sep)

    for _ in _watchfiles().watch(*sources, watch_filter=is_outside):
        yield run()


def _watchfiles() -> Any:
    try:
        import watchfiles
    except ImportError:
        raise InputError("--watch needs the package watchfiles: pip install 'finelip-fast[watch]'") from None
    return watchfiles


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
        return _nothing(len(retriever), where, getattr(retriever, "index", None))
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


@click.command("list", cls=Command)
@index_option
@where_option
@click.option("--paths", is_flag=True, help="Print only the paths of the pictures.")
@click.option("--duplicates", is_flag=True, help="Show groups of pictures with the same content.")
@click.option(
    "--similarity",
    type=float,
    metavar="COSINE",
    help="With --duplicates: also group pictures whose global embeddings are at least this similar; 0.98 or "
    "more finds copies and bursts.",
)
def list_(index: str, where: str | None, paths: bool, duplicates: bool, similarity: float | None) -> Any:
    """List the items of an index in the order they were added."""
    from finelip_fast.index import stored_index

    opened = stored_index(index)
    if duplicates:
        if where is not None:
            raise InputError("expected --where or --duplicates, got both: groups are of the whole index")
        return _groups(opened, similarity, paths)
    if similarity is not None:
        raise InputError("expected --similarity with --duplicates, got it alone")
    items = _items(opened, where)
    first = next(items, None)
    if first is None:
        return _nothing(len(opened), where, opened)
    return _listed(first, items, paths)


@click.command(cls=Command)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@index_option
@where_option
@dry_run_option
def remove(ids: tuple[str, ...], index: str, where: str | None, dry_run: bool) -> Any:
    """Remove items from an index, by id or by a filter.

    Ids are those that finelip list shows, or paths of pictures. The picture files themselves are not deleted.
    """
    from finelip_fast.index import stored_index

    if bool(ids) == (where is not None):
        raise InputError("expected either ids or --where FILTER, got " + ("both" if ids else "neither"))
    opened = stored_index(index)
    chosen = list(_ids(opened, ids)) or [item.id for item in _items(opened, where)]
    before = len(opened)
    if not chosen:
        return Removal(0, before, str(_nothing(before, where, opened)))
    if dry_run:
        from finelip_fast.index.checks import missing

        present = opened.present(chosen)
        if absent := [item for item in chosen if item not in present]:
            raise missing(absent)
        return Forecast({"removed": list(dict.fromkeys(chosen))})
    opened.delete(chosen)
    return Removal(before - len(opened), len(opened))


def _ids(index: Index, names: Sequence[str]) -> Iterator[str]:
    """Yield the ids that were typed, or those of pictures whose paths were typed."""
    from finelip_fast.collection import item_id

    by_path = {} if index.root is None else {name: item_id(name, index.root) for name in names}
    present = index.present([*names, *by_path.values()])
    for name in names:
        yield by_path[name] if name not in present and by_path.get(name) in present else name


def _items(index: Index, where: str | None) -> Iterator[ListedItem]:
    from finelip_fast.collection import picture_path

    root = index.root
    for item in index.items(where=where):
        path = picture_path(item.id, item.metadata, root)
        yield ListedItem(item.id, None if path is None else str(path), item.metadata)


def _listed(first: ListedItem, following: Iterator[ListedItem], paths: bool) -> Iterator[Any]:
    yield (first.path or first.id) if paths else first
    for item in following:
        yield (item.path or item.id) if paths else item


@dataclass
class Group:
    """A group of similar items."""

    ids: list[str]

    def to_dict(self) -> list[str]:
        """The ids for JSON."""
        return self.ids

    def __str__(self) -> str:
        return "\n".join([*map(printable, self.ids), ""])


def _groups(index: Index, similarity: float | None, paths: bool) -> Any:
    from finelip_fast.collection import picture_path
    from finelip_fast.index.duplicates import duplicates

    groups = duplicates(index, similarity=similarity, progress=shows_progress())
    if not groups:
        return Nothing(f"none of the {len(index):,} items is there twice")
    if paths:
        root = index.root
        items = index.get([item for group in groups for item in group])
        files = {name: picture_path(name, item.metadata, root) for name, item in items.items()}
        groups = [[str(files[item] or item) for item in group] for group in groups]
    return iter(Group(group) for group in groups)


def _nothing(count: int, where: str | None, index: Index | None = None) -> Nothing:
    if count == 0:
        return Nothing("the index is empty")
    reason = f"the filter {where} matches none of the {count:,} items"
    if index is not None and where is not None:
        from finelip_fast.index.filters import compared_fields

        reason += "".join(f"; {note}" for note in map(partial(absent_field, index), compared_fields(where)[:3]) if note)
    return Nothing(reason)


def absent_field(index: Index, field: str) -> str:
    """Return a note if no item of an index has a metadata field, with the fields that there are; else nothing.

    Args:
        index: Index to look in.
        field: Field as filters spell it.
    """
    if next(index.items(where=f"{field} is not null"), None) is not None:
        return ""
    first = next(index.items(), None)
    known = [*(entry.name for entry in index.fields()), *(first.metadata if first is not None else ())]
    near = nearest(field, known) or list(dict.fromkeys(known))[:_MOST_FIELDS]
    return f"no item has the field {field}" + (f", but some have {', '.join(near)}" if near else "")
