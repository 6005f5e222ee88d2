"""A collection: pictures in a folder, and their items in an index, brought in line with each other.

The id of a picture is its path below the index's root, with ``/`` between names on every system: one item a file, however its
path was typed. What a picture's metadata says of its file (:mod:`finelip_fast.picture_files`) shows whether it was changed or
moved meanwhile; what was only moved or touched is not embedded again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from finelip_fast.errors import InputError
from finelip_fast.folders import walk_folder
from finelip_fast.index import remedies
from finelip_fast.index.catalogue import Item
from finelip_fast.index.index import Index
from finelip_fast.picture_files import FIELDS, HASH, STAMP, content_hash, describe, read_sidecar, sidecar_names, stamp
from finelip_fast.picture_tables import read_rows

T = TypeVar("T")

_AT_ONCE = 1024  # items of a change, and files that are looked at ahead


@dataclass
class Listing:
    """Pictures that an index is to hold.

    Attributes:
        paths: The pictures, absolute, by their ids.
        fields: Metadata to add to what their files say, by id.
        folder: Folder whose pictures are all listed; None: there is none.
        skipped: ``(path, reason)`` of what is left out.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    folder: Path | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Plan:
    """What brings an index in line with a :class:`Listing`.

    Attributes:
        new, changed: Ids of pictures to embed, and the metadata that their files do not say.
        relabelled: ``(new id, metadata)`` by the id of now: of pictures whose content is in the index already.
        moved: Number of those that have a new id.
        gone: Ids of items whose file is no more.
        unchanged: Number of pictures that need nothing.
    """

    new: dict[str, dict[str, Any]] = field(default_factory=dict)
    changed: dict[str, dict[str, Any]] = field(default_factory=dict)
    relabelled: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    moved: int = 0
    gone: list[str] = field(default_factory=list)
    unchanged: int = 0


# Ids -----------------------------------------------------------------------------------------------------------------


def item_id(path: str | os.PathLike[str], root: Path) -> str:
    """The id of a picture below a root, which is real; ``../`` leads out of it, and a path on another drive stays whole."""
    folder, name = os.path.split(os.path.abspath(path))
    path = os.path.join(os.path.realpath(folder), name)
    with suppress(ValueError):  # no way leads from one drive to another
        path = os.path.relpath(path, root)
    return path.replace(os.sep, "/")


def _below(path: Path, root: Path) -> str:
    """:func:`item_id` of a path whose folder is real."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return item_id(path, root)


def picture_path(item: str, metadata: Mapping[str, Any], root: Path | None) -> Path | None:
    """The file of an item; None: it is not one of a collection."""
    return None if root is None or HASH not in metadata else Path(os.path.normpath(root / item))


def prepare_root(index: Index, folders: Sequence[str | os.PathLike[str]]) -> Path:
    """The root of an index; one that has none gets the folder, or what several have in common.

    Items of a time when ids were paths as they had been typed get ids below the root, one a file.

    Raises:
        InputError: The root is no more: with another one, every picture would be a new item.
        StoreError: The index cannot be read or written.
    """
    if index.root is None:
        real = [os.path.realpath(folder) for folder in folders]
        try:
            root = Path(os.path.commonpath(real))
        except ValueError:  # on several drives
            root = Path(real[0])
        root = Path(real[0]) if root == Path(root.anchor) else root
        _take_over(index, root)
        index.root = root
    root_of_index = index.root
    assert root_of_index is not None
    if not root_of_index.is_dir():
        raise InputError(
            f"expected the pictures of the index in {str(root_of_index)!r}, where there is no folder now: if they were moved, "
            f"say where to with {remedies.move_root(index.folder)}"
        )
    return root_of_index


def _take_over(index: Index, root: Path) -> None:
    relabelled: dict[str, tuple[str, dict[str, Any]]] = {}
    repeated: list[str] = []
    new_ids: set[str] = set()
    for item in index.items():
        if os.path.isfile(item.id):
            name = item_id(item.id, root)
            if name in new_ids:
                repeated.append(item.id)
            elif name != item.id:
                relabelled[item.id] = name, item.metadata
            new_ids.add(name)
    index.delete(repeated)
    relabel(index, relabelled)


def relabel(index: Index, changes: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    """Give items other ids and metadata, some at a time; what another process has taken out meanwhile is passed over."""
    for batch in _batches(list(changes)):
        present = index.present(batch)
        ids = [item for item in batch if item in present]
        if not ids:
            continue
        names, metadata = zip(*(changes[item] for item in ids), strict=True)
        index.relabel(ids, names, metadata)


# Listings ------------------------------------------------------------------------------------------------------------


def list_folder(
    folder: str | os.PathLike[str],
    root: Path,
    *,
    exclude: Collection[str] = (),
    include: Collection[str] = (),
    fields: Mapping[str, dict[str, Any]] | None = None,
    index: Path | None = None,
) -> Listing:
    """The pictures of a folder and those below.

    Args:
        folder: Folder to walk.
        root: Root of the index.
        exclude, include: Patterns as :func:`finelip_fast.folders.walk_folder` takes them.
        fields: Metadata by id, as :func:`read_fields` gives it.
        index: Folder of the index, whose own files are not reported.

    Raises:
        InputError: There is no such folder.
    """
    base = Path(os.path.realpath(folder))
    listing = Listing(folder=base)
    index_folder = None if index is None else Path(os.path.realpath(index))
    notes: dict[Path, tuple[str, str]] = {}
    for path, kind in walk_folder(base if os.path.isdir(folder) else folder, exclude=exclude, include=include):
        if kind == "image":
            listing.paths[_below(path, root)] = path
        elif index_folder is not None and path.is_relative_to(index_folder):
            continue
        elif kind == "left out":
            reason = f"left out, as what other programs keep (--include {path.name!r} takes it)"
            listing.skipped.append((str(path), reason))
        elif kind == "other" and path.suffix.lower() == ".json":
            notes[path] = (str(path), "not a picture by its name, nor beside one")
        else:
            reason = "not a picture by its name" if kind == "other" else "a folder that cannot be listed"
            listing.skipped.append((str(path), reason))
    for item, path in listing.paths.items():
        for sidecar in sidecar_names(path):
            if notes.pop(sidecar, None) is not None:
                try:
                    listing.fields[item] = read_sidecar(sidecar)
                except InputError as error:
                    listing.skipped.append((str(sidecar), str(error)))
                break
    listing.skipped += notes.values()
    for item, values in (fields or {}).items():
        if item in listing.paths:
            listing.fields[item] = {**listing.fields.get(item, {}), **values}
        else:
            listing.skipped.append((item, "has fields, and is no picture of the folder"))
    return listing


def list_table(
    table: str | os.PathLike[str],
    root: Path,
    *,
    base: str | os.PathLike[str] | None = None,
    image_field: str | None = None,
) -> Listing:
    """The pictures that a table names, with its other columns as their metadata; arguments as for :func:`read_fields`."""
    listing = Listing(fields=read_fields(table, root, base=base, image_field=image_field))
    for item in listing.fields:
        listing.paths[item] = Path(os.path.normpath(root / item))
    return listing


def read_fields(
    table: str | os.PathLike[str],
    root: Path,
    *,
    base: str | os.PathLike[str] | None = None,
    image_field: str | None = None,
) -> dict[str, dict[str, Any]]:
    """The fields of pictures, by their ids; a picture of several rows has lists of what differs in them, such as captions.

    Args:
        table: Table as :func:`finelip_fast.picture_tables.read_rows` takes it.
        root: Root of the index.
        base: Folder that the pictures' paths are relative to; None: the folder of the table.
        image_field: Name of the column of paths; None: the first that is there of ``image``, ``file``, ``path`` and the like.

    Raises:
        InputError: The table cannot be read, or a row names no picture; names the line.
    """
    folder = Path(table).parent if base is None else Path(base)
    fields: dict[str, dict[str, Any]] = {}
    for path, row in read_rows(table, image_field=image_field):
        known = fields.setdefault(item_id(folder / path, root), {})
        for column, value in row.items():
            _put(known, column, value)
    return fields


class _Several(list[Any]):
    """Values of a column in the rows of one picture."""


def _put(fields: dict[str, Any], column: str, value: Any) -> None:
    """Put a value beside those that other rows of the picture have."""
    before = fields.setdefault(column, value)
    if isinstance(before, _Several):
        if value not in before:
            before.append(value)
    elif before != value:
        fields[column] = _Several([before, value])


# Planning ------------------------------------------------------------------------------------------------------------


def plan(index: Index, listing: Listing, root: Path) -> Plan:
    """What brings an index in line with a listing; only files whose size or time has changed are read.

    Args:
        index: Index, which stays as it is.
        listing: Pictures that it is to hold.
        root: Its root.

    Raises:
        StoreError: The index cannot be read.
    """
    result = Plan()
    stored = _stored_stamps(index, listing, root)
    unknown: list[str] = []
    differing: dict[str, _Stamp] = {}
    noted: list[str] = []
    for item, path in listing.paths.items():
        before = stored.pop(item, None)
        if before is None:
            unknown.append(item)
        elif before[:2] != _stamp(path):
            differing[item] = before
        elif item in listing.fields:
            noted.append(item)
        else:
            result.unchanged += 1
    vanished = {item: before for item, before in stored.items() if before.hash and _is_gone(root / item)}
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(differing, pool.map(_hash, (listing.paths[item] for item in differing)), strict=True))
        # What has no hash was added when there were none: it is taken for the same picture.
        unaltered = [item for item, before in differing.items() if before.hash in (None, hashes[item])]
        moved = _moved(unknown, vanished, listing, pool)
        renamed = {**{item: item for item in unaltered}, **moved}
        items = list(_metadata(index, list(renamed)))
        described = pool.map(_described, (listing.paths[renamed[old]] for old, _ in items))
        for (old, metadata), fields in zip(items, described, strict=True):
            new = renamed[old]
            result.relabelled[old] = new, {**_own_fields(metadata), **fields, **_fields(listing, new)}
    for item, metadata in _metadata(index, noted):
        if (values := {**metadata, **_fields(listing, item)}) == metadata:
            result.unchanged += 1
        else:
            result.relabelled[item] = item, values
    for item, metadata in _metadata(index, sorted(differing.keys() - set(unaltered))):
        result.changed[item] = {**_own_fields(metadata), **_fields(listing, item)}
    arrived = set(moved.values())
    result.new = {item: _fields(listing, item) for item in unknown if item not in arrived}
    result.moved, result.gone = len(moved), [item for item in vanished if item not in moved]
    return result


class _Stamp(NamedTuple):
    """What an item's metadata says of its file; None: it says nothing."""

    bytes: int | None
    modified: str | None
    hash: str | None


def _stored_stamps(index: Index, listing: Listing, root: Path) -> dict[str, _Stamp]:
    """Stamps of the items in a listing and of all others in its folder."""
    items: Iterator[Item]
    if listing.folder is None:
        items = (item for ids in _batches(list(listing.paths)) for item in index.get(ids).values())
    else:
        items = _items_below(index, listing.folder, root)
    return {item.id: _Stamp(*(item.metadata.get(name) for name in (*STAMP, HASH))) for item in items}


def _items_below(index: Index, folder: Path, root: Path) -> Iterator[Item]:
    items = index.items(where=filter_below(folder, root))
    return (item for item in items if Path(os.path.normpath(root / item.id)).is_relative_to(folder))


def filter_below(folder: Path, root: Path) -> str | None:
    """A filter on the ids of pictures below a folder, which the catalogue answers fast; None: all ids may be."""
    prefix = _below(folder, root).replace("'", "''")
    if root.is_relative_to(folder) or not prefix.isprintable():
        return None
    return f"id >= '{prefix}/' and id < '{prefix}0'"  # "0" follows "/"


def _moved(unknown: Sequence[str], vanished: Mapping[str, _Stamp], listing: Listing, pool: Executor) -> dict[str, str]:
    """New ids of vanished items, by their old ids: of pictures with the same content."""
    sizes = {before.bytes for before in vanished.values()}
    candidates = [item for item in unknown if sizes and _stamp(listing.paths[item])[0] in sizes]
    homeless: dict[str | None, list[str]] = {}
    for item, before in vanished.items():
        homeless.setdefault(before.hash, []).append(item)
    moved: dict[str, str] = {}
    for item, content in zip(candidates, pool.map(_hash, (listing.paths[item] for item in candidates)), strict=True):
        if homeless.get(content):
            moved[homeless[content].pop(0)] = item
    return moved


def _metadata(index: Index, ids: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for batch in _batches(ids):
        items = index.get(batch)
        yield from ((item, items[item].metadata) for item in batch if item in items)


def _own_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What was given with a picture, without what its file said."""
    return {name: value for name, value in metadata.items() if name not in FIELDS}


def _fields(listing: Listing, item: str) -> dict[str, Any]:
    """What is added to a picture's metadata; its size, time and hash are always the file's, or no change would be seen."""
    return {name: value for name, value in listing.fields.get(item, {}).items() if name not in (*STAMP, HASH)}


def _stamp(path: Path) -> tuple[Any, ...]:
    try:
        return tuple(stamp(path).values())
    except OSError:
        return (None, None)


def _hash(path: Path) -> str:
    try:
        return content_hash(path)
    except OSError:
        return ""


def _described(path: Path) -> dict[str, Any]:
    try:
        return describe(path)
    except OSError:
        return {}


def _is_gone(path: Path) -> bool:
    """Whether there is no such file; one that cannot be asked for may be there."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    return (values[start : start + _AT_ONCE] for start in range(0, len(values), _AT_ONCE))
