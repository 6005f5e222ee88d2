"""Bringing the items of an index in line with a collection of pictures in a folder.

The id of a picture is its path relative to the index's root, with ``/`` as separator on every system: one item per file,
however its path was typed. A picture's metadata about its file (:mod:`finelip_fast.picture_files`) shows whether the file has
been changed or moved since; a picture that was only moved or touched is not embedded again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from finelip_fast._files import file_hash
from finelip_fast.errors import InputError
from finelip_fast.folders import walk_folder
from finelip_fast.index import remedies
from finelip_fast.index.catalogue import Item
from finelip_fast.index.index import Index
from finelip_fast.picture_files import FIELDS, HASH, STAMP, read_sidecar, sidecar_names, stamp
from finelip_fast.picture_tables import read_rows

T = TypeVar("T")

_AT_ONCE = 1024  # items per change, and files examined ahead


@dataclass
class Listing:
    """Pictures that an index should hold.

    Attributes:
        paths: Absolute paths of the pictures, by id.
        fields: Metadata to add to that of their files, by id.
        folder: Folder whose pictures are all listed; None if there is none.
        skipped: ``(path, reason)`` for everything left out.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    folder: Path | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Plan:
    """Changes that bring an index in line with a :class:`Listing`.

    Attributes:
        new, changed: Ids of pictures to embed, with the metadata that does not come from their files.
        relabelled: ``(new id, metadata)`` by current id, for pictures whose content is already in the index.
        moved: Number of relabelled pictures whose id changes.
        gone: Ids of items whose file no longer exists.
        skipped: ``(path, reason)`` for pictures whose ids belong to other items.
        unchanged: Number of pictures that need no change.
    """

    new: dict[str, dict[str, Any]] = field(default_factory=dict)
    changed: dict[str, dict[str, Any]] = field(default_factory=dict)
    relabelled: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    moved: int = 0
    gone: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unchanged: int = 0


# Ids -----------------------------------------------------------------------------------------------------------------


def item_id(path: str | os.PathLike[str], root: Path) -> str:
    """Id of a picture relative to a resolved root; ``../`` leads out of it, and a path on another drive stays absolute."""
    folder, name = os.path.split(os.path.abspath(path))
    path = os.path.join(os.path.realpath(folder), name)
    with suppress(ValueError):  # there is no relative path between drives
        path = os.path.relpath(path, root)
    return path.replace(os.sep, "/")


def _below(path: Path, root: Path) -> str:
    """:func:`item_id` of a path whose folder is resolved."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return item_id(path, root)


def is_path_of(item: str, image: Any, root: Path | None) -> bool:
    """Whether an id is the path of a picture's file, as typed or, if there is a root, relative to it."""
    if not isinstance(image, (str, os.PathLike)):
        return False
    return (
        item == str(image)
        if root is None
        else item in (_below(Path(os.path.abspath(image)), root), item_id(image, root))
    )


def picture_path(item: str, metadata: Mapping[str, Any], root: Path | None) -> Path | None:
    """The file of an item; None if the item is not part of a collection."""
    return None if root is None or HASH not in metadata else Path(os.path.normpath(root / item))


def prepare_root(index: Index, folders: Sequence[str | os.PathLike[str]]) -> Path:
    """Return :func:`root_of` an index, which keeps it from now on.

    Pictures that were added before, whose ids are paths as typed, get ids relative to the root, one per file.

    Raises:
        InputError: As raised by :func:`root_of`.
        StoreError: The index cannot be read or written.
    """
    root = root_of(index, folders)
    if index.root is None:
        _take_over(index, root)
        index.root = root
    return root


def root_of(index: Index | None, folders: Sequence[str | os.PathLike[str]]) -> Path:
    """Return the root of an index; of one without a root, or that does not exist yet, the common root of the folders.

    Raises:
        InputError: The root no longer exists; with another one, every picture would be a new item.
    """
    if index is None or index.root is None:
        return _common_root(folders)
    if not index.root.is_dir():
        raise InputError(
            f"the pictures' folder {str(index.root)!r} no longer exists; if it was moved, run "
            f"{remedies.move_root(index.folder)}"
        )
    return index.root


def _common_root(folders: Sequence[str | os.PathLike[str]]) -> Path:
    """Return a folder, or the common parent of several, without links."""
    real = [os.path.realpath(folder) for folder in folders]
    try:
        root = Path(os.path.commonpath(real))
    except ValueError:  # on several drives
        root = Path(real[0])
    return Path(real[0]) if root == Path(root.anchor) else root


def _take_over(index: Index, root: Path) -> None:
    pictures = {item.id: item.metadata for item in index.items(where=f"{HASH} is not null")}
    names = {item: item_id(path, root) for item, metadata in pictures.items() if (path := _typed(item, metadata, root))}
    present = index.present(list(names.values()))
    while blocked := [item for item, name in names.items() if name in present and name not in names]:
        for item in blocked:  # another item, such as a text, has the id that this one would get
            del names[item]
    relabelled: dict[str, tuple[str, dict[str, Any]]] = {}
    repeated: list[str] = []
    new_ids: set[str] = set()
    for item, metadata in pictures.items():
        name = names.get(item)
        if name is None:  # without a hash, it is not taken for a picture of the root that is gone
            relabelled[item] = item, {field: value for field, value in metadata.items() if field != HASH}
        elif name in new_ids:
            repeated.append(item)
        elif name != item:
            relabelled[item] = name, metadata
        new_ids.add(item if name is None else name)
    index.delete(repeated)
    relabel(index, relabelled)


def _typed(item: str, metadata: Mapping[str, Any], root: Path) -> Path | None:
    """The file of a picture that was added before there was a root, by a path that may be relative to any folder."""
    if os.path.isfile(item):
        return Path(item)
    return path if _stamp(path := root / item) == tuple(metadata.get(name) for name in STAMP) else None


def relabel(index: Index, changes: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    """Change ids and metadata of items in batches; items that another process has removed meanwhile are skipped."""
    for batch in _batches(_freed_first(changes)):
        change_existing(
            index,
            batch,
            lambda ids: index.relabel(ids, [changes[item][0] for item in ids], [changes[item][1] for item in ids]),
        )


def change_existing(index: Index, ids: Sequence[str], change: Callable[[list[str]], object]) -> list[str]:
    """Change those of the items that exist, even if another process removes some meanwhile; return their ids.

    Args:
        index: Index of the items.
        ids: Ids of the items.
        change: Function that is called with the ids that exist; it changes nothing if one of them does not.

    Raises:
        InputError, StoreError: Whatever ``change`` raises for items that exist.
    """
    while True:
        present = index.present(ids)
        existing = [item for item in ids if item in present]
        try:
            change(existing)
            return existing
        except InputError:
            if index.present(existing) == present:
                raise


def _freed_first(changes: Mapping[str, tuple[str, dict[str, Any]]]) -> list[str]:
    """Order items so that the holder of an id gives it up before another item takes it."""
    ordered: dict[str, None] = {}
    for item in changes:
        chain: dict[str, None] = {}
        while item in changes and item not in ordered and item not in chain:
            chain[item] = None
            item = changes[item][0]
        ordered.update(dict.fromkeys(reversed(chain)))
    return list(ordered)


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
    """List the pictures in a folder and its subfolders.

    Args:
        folder: Folder to walk.
        root: Root of the index.
        exclude, include: Patterns as :func:`finelip_fast.folders.walk_folder` takes them.
        fields: Metadata by id, as :func:`read_fields` returns it.
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
    sidecars: set[Path] = set()  # one may belong to several pictures, such as a.jpg and a.png
    for item, path in listing.paths.items():
        sidecar = next((sidecar for sidecar in sidecar_names(path) if sidecar in notes), None)
        if sidecar is not None:
            sidecars.add(sidecar)
            _take_sidecar(listing, item, sidecar)
    listing.skipped += [note for path, note in notes.items() if path not in sidecars]
    for item, values in (fields or {}).items():
        if item in listing.paths:
            listing.fields[item] = {**listing.fields.get(item, {}), **values}
        else:
            listing.skipped.append((item, "has fields, and is no picture of the folder"))
    return listing


def _take_sidecar(listing: Listing, item: str, sidecar: Path) -> None:
    try:
        listing.fields[item] = read_sidecar(sidecar)
    except InputError as error:
        listing.skipped.append((str(sidecar), str(error)))


def list_files(files: Iterable[str | os.PathLike[str]], root: Path) -> Listing:
    """List picture files, with the metadata in the JSON files beside them.

    Args:
        files: Paths of pictures.
        root: Root of the index.
    """
    listing = Listing()
    for file in files:
        folder, name = os.path.split(os.path.abspath(file))
        path = Path(os.path.realpath(folder), name)
        listing.paths[_below(path, root)] = path
    for item, path in listing.paths.items():
        sidecar = next((sidecar for sidecar in sidecar_names(path) if sidecar.is_file()), None)
        if sidecar is not None:
            _take_sidecar(listing, item, sidecar)
    return listing


def list_table(
    table: str | os.PathLike[str],
    root: Path,
    *,
    base: str | os.PathLike[str] | None = None,
    image_field: str | None = None,
) -> Listing:
    """List the pictures in a table, with its other columns as metadata; the arguments are those of :func:`read_fields`."""
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
    """Read fields of pictures, by id; values that differ between a picture's rows, such as captions, become lists.

    Args:
        table: Table as :func:`finelip_fast.picture_tables.read_rows` takes it.
        root: Root of the index.
        base: Folder that the pictures' paths are relative to; None: the folder of the table.
        image_field: Name of the path column; None: the first that exists of ``image``, ``file``, ``path`` and the like.

    Raises:
        InputError: The table cannot be read, or a row names no picture; the message gives the line.
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
    """Add a value to those from the picture's other rows."""
    before = fields.setdefault(column, value)
    if isinstance(before, _Several):
        if value not in before:
            before.append(value)
    elif before != value:
        fields[column] = _Several([before, value])


# Planning ------------------------------------------------------------------------------------------------------------


def plan(index: Index, listing: Listing, root: Path) -> Plan:
    """Plan the changes that bring an index in line with a listing; only files whose size or time has changed are read.

    Args:
        index: Index, which is not changed.
        listing: Pictures that the index should hold.
        root: Root of the index.

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
        elif before.hash is None:
            result.skipped.append((str(path), _conflict(item, index.folder)))
        elif before[:2] != _stamp(path):
            differing[item] = before
        elif item in listing.fields:
            noted.append(item)
        else:
            result.unchanged += 1
    vanished = {item: before for item, before in stored.items() if before.hash and _is_gone(root / item)}
    with ThreadPoolExecutor() as pool:
        examined = dict(zip(differing, pool.map(_read_stamp, (listing.paths[item] for item in differing)), strict=True))
        unaltered = {item: (item, after) for item, after in examined.items() if after.hash == differing[item].hash}
        moved = _moved(unknown, vanished, listing, pool)
    renamed = {**unaltered, **moved}
    for old, metadata in _metadata(index, list(renamed)):
        new, current = renamed[old]
        # The content is the same, and so is what the camera recorded, unless a table has given other values.
        stamp_fields = dict(zip(STAMP, current, strict=False))
        result.relabelled[old] = new, {**metadata, **stamp_fields, **fields_of(listing, new)}
    for item, metadata in _metadata(index, noted):
        if (values := {**metadata, **fields_of(listing, item)}) == metadata:
            result.unchanged += 1
        else:
            result.relabelled[item] = item, values
    for item, metadata in _metadata(index, sorted(differing.keys() - unaltered.keys())):
        result.changed[item] = {**_given_fields(metadata), **fields_of(listing, item)}
    arrived = {new for new, _ in moved.values()}
    result.new = {item: fields_of(listing, item) for item in unknown if item not in arrived}
    result.moved, result.gone = len(moved), [item for item in vanished if item not in moved]
    return result


def _conflict(item: str, index: Path | None) -> str:
    remedy = remedies.remove(index, "id = '{}'".format(item.replace("'", "''")))
    return (
        f"its id {item!r} belongs to an item that was not added as this file, and that stays; to index the file, remove the "
        f"item and add the file again: {remedy}"
    )


class _Stamp(NamedTuple):
    """An item's metadata about its file; None if a value is missing."""

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
    """A filter for ids of pictures below a folder, which the catalogue evaluates fast; None if it cannot exclude any id."""
    prefix = _below(folder, root).replace("'", "''")
    if root.is_relative_to(folder) or not prefix.isprintable():
        return None
    return f"id >= '{prefix}/' and id < '{prefix}0'"  # "0" follows "/"


def _moved(
    unknown: Sequence[str], vanished: Mapping[str, _Stamp], listing: Listing, pool: Executor
) -> dict[str, tuple[str, _Stamp]]:
    """New ids and stamps of vanished items by old id, found by pictures with the same content."""
    sizes = {before.bytes for before in vanished.values()}
    candidates = [item for item in unknown if sizes and _stamp(listing.paths[item])[0] in sizes]
    homeless: dict[str | None, list[str]] = {}
    for item, before in vanished.items():
        homeless.setdefault(before.hash, []).append(item)
    moved: dict[str, tuple[str, _Stamp]] = {}
    stamps = pool.map(_read_stamp, (listing.paths[item] for item in candidates))
    for item, current in zip(candidates, stamps, strict=True):
        if homeless.get(current.hash):
            moved[homeless[current.hash].pop(0)] = item, current
    return moved


def _metadata(index: Index, ids: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for batch in _batches(ids):
        items = index.get(batch)
        yield from ((item, items[item].metadata) for item in batch if item in items)


def _given_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata given with a picture, without fields that its file may have."""
    return {name: value for name, value in metadata.items() if name not in FIELDS}


def fields_of(listing: Listing, item: str) -> dict[str, Any]:
    """Fields to add to a picture's metadata; size, time and hash always come from the file, or no change would be detected."""
    return {name: value for name, value in listing.fields.get(item, {}).items() if name not in (*STAMP, HASH)}


def _stamp(path: Path) -> tuple[Any, Any]:
    try:
        size, modified = stamp(path).values()
        return size, modified
    except (OSError, ValueError):
        return (None, None)


def _read_stamp(path: Path) -> _Stamp:
    """A file's size, time and hash; the time is read first, so that a file written meanwhile counts as changed later."""
    current = _stamp(path)
    try:
        return _Stamp(*current, file_hash(path))
    except OSError:
        return _Stamp(*current, "")


def _is_gone(path: Path) -> bool:
    """Return whether a file does not exist; one whose status cannot be read may exist."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    return (values[start : start + _AT_ONCE] for start in range(0, len(values), _AT_ONCE))
