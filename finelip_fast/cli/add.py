"""``finelip add``: adding pictures to an index, and following changes in their folders."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from finelip_fast.cli.commands import (
    Command,
    ModelOptions,
    batch_size_option,
    decode_memory_option,
    dtype_option,
    index_option,
    model_options,
    shows_progress,
)
from finelip_fast.cli.items import Forecast, dry_run_option
from finelip_fast.cli.values import FILE
from finelip_fast.errors import InputError

_WATCH_MILLISECONDS = 500  # between looks for changes


@click.command(cls=Command)
@click.argument("sources", nargs=-1, required=True, type=FILE, metavar="SOURCE...")
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
    """Add pictures to an index: files, or all those in folders and their subfolders.

    Run it again to add new pictures, embed changed ones again and follow moved ones. A table of pictures, JSON Lines or CSV,
    is a source, too; its other columns become metadata.
    """
    from finelip_fast.collection import prepare_root, root_of
    from finelip_fast.reports import FolderReport

    chosen = _sort(sources)  # before a model is loaded
    of_folders = {"--sync": sync, "--exclude": exclude, "--include": include, "--metadata": metadata}
    of_tables = {"--root": root, "--image-field": image_field}
    for kind, paths, options in (("folder", chosen.folders, of_folders), ("table", chosen.tables, of_tables)):
        if not paths and (useless := [option for option, value in options.items() if value]):
            raise InputError(f"expected {', '.join(useless)} with a {kind}, got none: {sources[0]!r:.200}")
    if dry_run:
        if watch:
            raise InputError("expected --watch or --dry-run, got both")
        return _forecast(chosen, index, sync, exclude, include, metadata, root, image_field)
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
    _check_tables(chosen, root_of(retriever.index, chosen.bases(root)), metadata, root, image_field)
    prepare_root(retriever.index, chosen.bases(root))

    def run() -> FolderReport:
        report = FolderReport()
        common: dict[str, Any] = {"batch_size": batch_size, "progress": shows_progress()}
        for folder in chosen.folders:
            report += retriever.add_folder(
                folder, sync=sync, exclude=exclude, include=include, metadata=metadata, **common
            )
        if chosen.pictures:
            report += retriever.add_files(chosen.pictures, **common)
        for table in chosen.tables:
            report += retriever.add_table(table, root=root, image_field=image_field, **common)
        if watch:
            retriever.index.compact_recent()
        return report

    return _watched(run, chosen, index) if watch else run()


@dataclass
class _Sources:
    """Paths of folders, picture files and tables."""

    folders: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    def bases(self, root: str | None) -> list[str]:
        """Folders among which a new index finds its root; ``root`` is that of the tables, if it was typed."""
        parents = [os.path.dirname(os.path.abspath(picture)) for picture in self.pictures]
        return [*self.folders, *parents] or [root or os.path.dirname(os.path.abspath(self.tables[0]))]


def _sort(sources: Sequence[str]) -> _Sources:
    """
    Raises:
        InputError: A source is neither a folder, a picture nor a table.
    """
    from finelip_fast._decode import image_suffixes
    from finelip_fast.picture_tables import is_table

    expected = "expected a folder, a picture, or a table (.jsonl, .csv, .tsv), got"
    result = _Sources()
    for source in sources:
        if is_table(source):
            result.tables.append(source)
        elif os.path.isdir(source):
            result.folders.append(source)
        elif not os.path.exists(source):
            raise InputError(f"{expected} nothing there: {source!r:.200}; check the path")
        elif Path(source).suffix.lower() in image_suffixes():
            result.pictures.append(source)
        else:
            raise InputError(f"{expected} a file: {source!r:.200}")
    return result


def _check_tables(
    sources: _Sources, root: Path, metadata: str | None, base: str | None, image_field: str | None
) -> None:
    """Read all tables, so that an error in one comes before anything is embedded."""
    from finelip_fast.collection import read_fields

    if metadata is not None:
        for folder in sources.folders:
            read_fields(metadata, root, base=folder)
    for table in sources.tables:
        read_fields(table, root, base=base, image_field=image_field)


def _forecast(
    sources: _Sources,
    index: str,
    sync: bool,
    exclude: Sequence[str],
    include: Sequence[str],
    metadata: str | None,
    root: str | None,
    image_field: str | None,
) -> Forecast:
    """Return what ``finelip add`` would do; pictures are not read, except changed ones."""
    from finelip_fast.collection import list_files, list_folder, list_table, plan, read_fields, root_of
    from finelip_fast.index import stored_index, stored_source
    from finelip_fast.ingest import refuse_emptied

    opened = stored_index(index) if stored_source(index) is not None else None
    base = root_of(opened, sources.bases(root))
    listings = [
        *(
            list_folder(
                folder,
                base,
                exclude=exclude,
                include=include,
                fields=None if metadata is None else read_fields(metadata, base, base=folder),
                index=Path(index),
            )
            for folder in sources.folders
        ),
        *([list_files(sources.pictures, base)] if sources.pictures else []),
        *(list_table(name, base, base=root, image_field=image_field) for name in sources.tables),
    ]
    changes: dict[str, list[str]] = {"added": [], "changed": [], "moved": [], **({"removed": []} if sync else {})}
    listed: set[str] = set()  # a picture may be in several listings
    for listing in listings:
        listing.paths = {item: path for item, path in listing.paths.items() if item not in listed}
        listed.update(listing.paths)
        if opened is None:
            changes["added"] += listing.paths
            continue
        planned = plan(opened, listing, base)
        changes["added"] += planned.new
        changes["changed"] += planned.changed
        changes["moved"] += [new for old, (new, _) in planned.relabelled.items() if new != old]
        if sync and listing.folder is not None:
            refuse_emptied(opened, listing, base, planned)
            changes["removed"] += planned.gone
    return Forecast(changes)


def _watched(run: Callable[[], Any], sources: _Sources, index: str) -> Iterator[Any]:
    index_folder = Path(os.path.realpath(index))
    folders = [Path(os.path.realpath(folder)) for folder in sources.folders]
    # A file is followed in its folder, since many programs save by giving a new file the name of the old one.
    files = [_in_real_folder(file) for file in (*sources.pictures, *sources.tables)]

    def is_followed(name: str) -> bool:
        path = _in_real_folder(name)
        return not path.is_relative_to(index_folder) and (path in files or any(map(path.is_relative_to, folders)))

    changes = _watchfiles().watch(
        *folders,
        *{file.parent for file in files},
        watch_filter=None,
        recursive=bool(folders),
        yield_on_timeout=True,
        rust_timeout=_WATCH_MILLISECONDS,
    )
    next(changes)  # begins to watch, so that nothing is missed that changes during the first run
    yield run()
    for changed in changes:
        if any(is_followed(name) for _, name in changed):
            yield run()


def _in_real_folder(path: str) -> Path:
    """Absolute path of a file or a link, with the links to its folder resolved."""
    folder, name = os.path.split(os.path.abspath(path))
    return Path(os.path.realpath(folder), name)


def _watchfiles() -> Any:
    try:
        import watchfiles
    except ImportError:
        raise InputError("--watch needs the package watchfiles: pip install 'finelip-fast[watch]'") from None
    return watchfiles
