"""``finelip list`` and ``remove``, and how commands show items and changes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from finelip_fast._terminal import printable
from finelip_fast.cli.commands import Command, Nothing, index_option, shows_progress
from finelip_fast.cli.usage import nearest
from finelip_fast.errors import InputError

if TYPE_CHECKING:
    from finelip_fast.index import Index

_MOST_FIELDS = 12  # that a message names

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
        return nothing(len(opened), where, opened)
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
        return Removal(0, before, str(nothing(before, where, opened)))
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


def nothing(count: int, where: str | None, index: Index | None = None) -> Nothing:
    """Return why a search or a list is empty.

    Args:
        count: Number of items in the index.
        where: Filter that no item satisfies.
        index: Index whose fields the reason names; None: it names none.
    """
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
