"""``finelip add``, ``search``, ``list`` and ``remove``: pictures into an index, and out of it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from finelip_fast._terminal import printable
from finelip_fast.cli.commands import (
    Command,
    ModelOptions,
    alpha_option,
    batch_size_option,
    dtype_option,
    index_option,
    model_options,
    shows_progress,
)
from finelip_fast.errors import InputError, StoreError

if TYPE_CHECKING:
    from finelip_fast.index import Index

where_option = click.option(
    "--where", metavar="FILTER", help="Filter on the metadata of items, such as \"camera = 'front' and year >= 2024\"."
)


@dataclass
class Nothing:
    """No items, and why."""

    reason: str

    def to_dict(self) -> list[Any]:
        """An empty list for JSON."""
        return []

    def __str__(self) -> str:
        return self.reason


@dataclass
class ListedItem:
    """An item as ``finelip list`` shows it: in text without what its file says anyway."""

    id: str
    path: str | None
    metadata: dict[str, Any]

    def __str__(self) -> str:
        from finelip_fast.picture_files import FIELDS

        fields = {name: value for name, value in self.metadata.items() if name not in FIELDS}
        return printable(f"{self.id}  {json.dumps(fields)}" if fields else self.id)


@dataclass
class Removal:
    """What ``finelip remove`` did."""

    removed: int
    items: int

    reason: str = ""  # why nothing was removed

    def to_dict(self) -> dict[str, int]:
        """The counts for JSON."""
        return {"removed": self.removed, "items": self.items}

    def __str__(self) -> str:
        return self.reason or f"{self.removed} removed, {self.items} left"


@click.command(cls=Command)
@click.argument("sources", nargs=-1, required=True, metavar="FOLDER...")
@index_option
@click.option("--sync", is_flag=True, help="Remove from the index what is no longer in the folders.")
@click.option("--watch", is_flag=True, help="Go on, and follow what changes in the folders.")
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Name or path to leave out; may be given more than once."
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Name or path to take although it is hidden or kept by another program; may be given more than once.",
)
@click.option(
    "--metadata", metavar="FILE", help="Table of further metadata, JSON lines or CSV, with a column of paths."
)
@click.option(
    "--root", metavar="FOLDER", help="Folder that the paths in a table are relative to.  [default: the table's]"
)
@click.option("--image-field", metavar="NAME", help="Column of the paths in a table.  [default: image, file or path]")
@model_options
@batch_size_option
@dtype_option
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
) -> Any:
    """Add the pictures in folders and their subfolders to an index.

    Run again, the command adds what is new, embeds again what was changed, and follows what was moved. Instead of a folder, a
    table of pictures can be given, JSON lines or CSV; its other columns become their metadata.
    """
    from finelip_fast.collection import is_table, prepare_root
    from finelip_fast.folders import walk_folder
    from finelip_fast.ingest import FolderReport

    folders = [source for source in sources if not is_table(source)]
    for folder in folders:
        walk_folder(folder)  # one that is not there is an error before a model is loaded
    if watch:
        _watchfiles()
    retriever = model.open_retriever(index, dtype=dtype)
    prepare_root(retriever.index, folders or [root or os.path.dirname(os.path.abspath(sources[0]))])

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
        return report

    return _watched(run, sources, index) if watch else run()


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
@click.argument("text", required=False)
@click.option("--image", metavar="FILE", help="Picture to search with, instead of a description.")
@click.option("-k", "k", type=int, default=10, help="Number of hits.")
@index_option
@where_option
@click.option("--mode", default="auto", help="Mode of the search: auto, exact, exact-int8, two-stage.")
@alpha_option
@click.option("--verify", is_flag=True, help="Compare the whole index with its checksums first.")
@click.option("--paths", is_flag=True, help="Show the paths of the pictures alone.")
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
    model: ModelOptions,
) -> Any:
    """Search an index with a description (TEXT) or a picture.

    Beside each hit stands whether it stands out of the index, and below them whether nothing here matches.
    """
    from finelip_fast.index import stored_source

    if (text is None) == (image is None):
        raise InputError(
            "expected either a description or --image FILE, got " + ("neither" if text is None else "both")
        )
    if stored_source(index) is None:
        raise StoreError(f"there is no index at {index}: make one with finelip add FOLDER --index {shlex.quote(index)}")
    retriever = model.open_retriever(index, alpha=alpha, verify=verify)
    hits = retriever.search(text, image=image, k=k, mode=mode, where=where)
    if not hits:
        return _nothing(len(retriever), where)
    return [hit.path or hit.id for hit in hits] if paths else hits


@click.command("list", cls=Command)
@index_option
@where_option
@click.option("--paths", is_flag=True, help="Show the paths of the pictures alone.")
@click.option("--duplicates", is_flag=True, help="Show groups of pictures of the same content.")
@click.option(
    "--similarity",
    type=float,
    metavar="COSINE",
    help="With --duplicates: global embeddings so near count as the same, too; 0.98 or more finds copies and bursts.",
)
def list_(index: str, where: str | None, paths: bool, duplicates: bool, similarity: float | None) -> Any:
    """List the items of an index in the order in which they were added."""
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
        return _nothing(len(opened), where)
    return _listed(first, items, paths)


@click.command(cls=Command)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@index_option
@where_option
def remove(ids: tuple[str, ...], index: str, where: str | None) -> Removal:
    """Remove items from an index, by their ids or by a filter.

    The ids are those that finelip list shows, or paths of pictures; the pictures themselves stay where they are.
    """
    from finelip_fast.index import stored_index

    if bool(ids) == (where is not None):
        raise InputError("expected either ids or --where FILTER, got " + ("both" if ids else "neither"))
    opened = stored_index(index)
    chosen = list(_ids(opened, ids)) or [item.id for item in _items(opened, where)]
    before = len(opened)
    opened.delete(chosen)
    return Removal(before - len(opened), len(opened), "" if chosen else str(_nothing(before, where)))


def _ids(index: Index, names: Sequence[str]) -> Iterator[str]:
    """Ids that were typed, or those of the pictures whose paths were."""
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
    """Items that are alike."""

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


def _nothing(count: int, where: str | None) -> Nothing:
    if count == 0:
        return Nothing("the index is empty")
    return Nothing(f"the filter {where} matches none of the {count:,} items")
