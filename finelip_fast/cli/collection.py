"""``finelip add``, ``search``, ``list`` and ``remove``: pictures into an index, and out of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
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
    """An item as ``finelip list`` shows it."""

    id: str
    metadata: dict[str, Any]

    def __str__(self) -> str:
        return printable(f"{self.id}  {json.dumps(self.metadata)}" if self.metadata else self.id)


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
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
@index_option
@model_options
@batch_size_option
@dtype_option
def add(folders: tuple[str, ...], index: str, model: ModelOptions, batch_size: int, dtype: str | None) -> Any:
    """Add the pictures in folders and their subfolders to an index.

    Run again, the command adds what is new.
    """
    from finelip_fast.ingest import FolderReport, count_pictures, progress_bar

    total = sum(map(count_pictures, folders))  # a folder that is not there is an error before a model is loaded
    retriever = model.open_retriever(index, dtype=dtype)
    report = FolderReport()
    with progress_bar(shows_progress(), total, "image") as bar:
        for folder in folders:
            added = retriever.add_folder(folder, batch_size=batch_size, progress=bar)
            report.added += added.added
            report.skipped += added.skipped
    return report


@click.command(cls=Command)
@click.argument("text", required=False)
@click.option("--image", metavar="FILE", help="Picture to search with, instead of a description.")
@click.option("-k", "k", type=int, default=10, help="Number of hits.")
@index_option
@where_option
@click.option("--mode", default="auto", help="Mode of the search: auto, exact, exact-int8, two-stage.")
@alpha_option
@click.option("--verify", is_flag=True, help="Compare the whole index with its checksums first.")
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
    model: ModelOptions,
) -> Any:
    """Search an index with a description (TEXT) or a picture."""
    from finelip_fast.index import stored_source

    if (text is None) == (image is None):
        raise InputError(
            "expected either a description or --image FILE, got " + ("neither" if text is None else "both")
        )
    if stored_source(index) is None:
        raise StoreError(f"there is no index at {index}: make one with finelip add FOLDER --index {shlex.quote(index)}")
    retriever = model.open_retriever(index, alpha=alpha, verify=verify)
    hits = retriever.search(text, image=image, k=k, mode=mode, where=where)
    return hits or _nothing(len(retriever), where)


@click.command("list", cls=Command)
@index_option
@where_option
@click.option("--paths", is_flag=True, help="Show the ids alone, which are the paths of pictures.")
def list_(index: str, where: str | None, paths: bool) -> Any:
    """List the items of an index in the order in which they were added."""
    from finelip_fast.index import stored_index

    opened = stored_index(index)
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

    The ids are those that finelip list shows; the pictures themselves stay where they are.
    """
    from finelip_fast.index import stored_index

    if bool(ids) == (where is not None):
        raise InputError("expected either ids or --where FILTER, got " + ("both" if ids else "neither"))
    opened = stored_index(index)
    chosen = list(ids) or [item.id for item in _items(opened, where)]
    before = len(opened)
    opened.delete(chosen)
    return Removal(before - len(opened), len(opened), "" if chosen else str(_nothing(before, where)))


def _items(index: Index, where: str | None) -> Iterator[ListedItem]:
    for item in index.items(where=where):
        yield ListedItem(item.id, item.metadata)


def _listed(first: ListedItem, following: Iterator[ListedItem], paths: bool) -> Iterator[Any]:
    yield first.id if paths else first
    for item in following:
        yield item.id if paths else item


def _nothing(count: int, where: str | None) -> Nothing:
    if count == 0:
        return Nothing("the index is empty")
    return Nothing(f"the filter {where} matches none of the {count:,} items")
