"""Listing folders of pictures, by file names alone."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from finelip_fast._arguments import folder_path, strings
from finelip_fast._decode import image_suffixes
from finelip_fast.errors import InputError

__all__ = ["LEFT_OUT", "FolderScan", "Kind", "list_images", "refuse_missing", "scan_folder", "walk_folder"]

Kind: TypeAlias = Literal["image", "other", "left out", "unreadable"]

# Entries that other programs keep beside pictures: previews of network drives and Lightroom, recycle bins, archive metadata.
LEFT_OUT = (
    *("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
    *("*.lrdata", "__MACOSX", "Thumbs.db"),
)
_HIDDEN = ".*"


class FolderScan(NamedTuple):
    """The contents of a folder: ``images`` by suffix, and all ``other_files``; both sorted, without hidden files."""

    images: list[Path]
    other_files: list[Path]


def list_images(folder: str | os.PathLike[str], recursive: bool = True) -> list[Path]:
    """List the image files of a folder, sorted; :func:`scan_folder` also lists the other files.

    Raises:
        InputError: There is no such folder, or a folder in it cannot be read.
    """
    return scan_folder(folder, recursive).images


def scan_folder(folder: str | os.PathLike[str], recursive: bool = True) -> FolderScan:
    """Sort a folder's files into images and others, by suffix alone; no file is opened.

    Args:
        folder: Folder to scan. The paths returned begin with it.
        recursive: Whether to scan subfolders, too, as :func:`walk_folder` does.

    Raises:
        InputError: There is no such folder, or a folder in it cannot be read.
    """
    scan = FolderScan([], [])
    for path, kind in walk_folder(folder, recursive):
        if kind == "unreadable":
            raise InputError(f"cannot list the folder {str(path)!r}; check its permissions")
        if kind != "left out":
            (scan.images if kind == "image" else scan.other_files).append(path)
    return scan


def refuse_missing(images: Any) -> None:
    """
    Raises:
        InputError: ``images`` is a single path, and nothing is there.
    """
    if isinstance(images, (str, os.PathLike)) and not os.path.lexists(images):
        raise InputError(f"expected a folder or a picture, got nothing there: {str(images)!r:.500}; check the path")


def walk_folder(
    folder: str | os.PathLike[str],
    recursive: bool = True,
    *,
    exclude: Collection[str] = (),
    include: Collection[str] = (),
) -> Iterator[tuple[Path, Kind]]:
    """Yield the files of a folder in the order of their paths, and the folders in it that are not entered.

    Each entry is judged by its name alone. Hidden ones (``.name``) are skipped. A link to a folder elsewhere, or to one that
    is hidden or left out here, is followed, and no folder is entered twice; the target of any other link to a folder within
    this one is listed under its own path.

    Args:
        folder: Folder to walk. The paths begin with it.
        recursive: Whether to walk subfolders, too.
        exclude: Patterns of names, or of paths below ``folder``, to skip: ``*`` matches any text, ``?`` one character, and
            case is ignored.
        include: Patterns of entries to include although they are hidden or in :data:`LEFT_OUT`.

    Raises:
        InputError: There is no such folder, or the patterns are not lists of texts.
    """
    folder = folder_path("folder", folder)
    exclude, include = strings("exclude", exclude), strings("include", include)
    if not folder.is_dir():
        place = repr(str(folder))
        raise InputError(f"expected a folder, got the file {place}" if folder.exists() else f"no such folder: {place}")
    return _Walk(folder, recursive, exclude, include).entries()


class _Walk:
    def __init__(self, folder: Path, recursive: bool, exclude: Collection[str], include: Collection[str]) -> None:
        self._folder, self._recursive, self._exclude, self._include = folder, recursive, exclude, include
        self._real, self._suffixes = Path(os.path.realpath(folder)), image_suffixes()
        self._entered: set[tuple[int, int]] = set()

    def entries(self) -> Iterator[tuple[Path, Kind]]:
        levels = [self._listed(self._folder)]  # no recursion: folders may be nested deeper than Python's stack
        while levels:
            path, kind = next(levels[-1], (None, None))
            if path is None:
                levels.pop()
            elif kind is None:
                levels.append(self._listed(path))
            else:
                yield path, kind

    def _listed(self, folder: Path) -> Iterator[tuple[Path, Kind | None]]:
        """Entries of a folder with their kinds; None marks a folder to enter."""
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in self._entered and status.st_ino:
                return
            self._entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            yield folder, "unreadable"
            return
        for entry in entries:
            path = folder / entry.name
            if self._is_skipped(path):
                continue
            if self._is_left_out(path):
                yield path, "left out"
            elif _answer(entry.is_dir):
                if self._recursive and not self._comes_anyway(entry):
                    yield path, None
            else:
                # Excludes broken links, pipes and devices.
                is_image = _answer(entry.is_file) and path.suffix.lower() in self._suffixes
                yield path, "image" if is_image else "other"

    def _is_skipped(self, path: Path) -> bool:
        is_hidden = fnmatchcase(path.name, _HIDDEN) and not self._is_named(path, self._include)
        return is_hidden or self._is_named(path, self._exclude)

    def _is_left_out(self, path: Path) -> bool:
        return self._is_named(path, LEFT_OUT) and not self._is_named(path, self._include)

    def _is_named(self, path: Path, patterns: Collection[str]) -> bool:
        texts = path.name.lower(), path.relative_to(self._folder).as_posix().lower()
        # A bracket is part of a name, not the start of a set of characters.
        literal = [pattern.rstrip("/").lower().replace("[", "[[]") for pattern in patterns]
        return any(fnmatchcase(text, pattern) for pattern in literal for text in texts)

    def _comes_anyway(self, entry: os.DirEntry[str]) -> bool:
        """Return whether an entry is a link to a folder that contains this one or is listed under its own path."""
        if not _answer(entry.is_symlink):
            return False
        target = Path(os.path.realpath(entry.path))
        if not target.is_relative_to(self._real):
            return self._real.is_relative_to(target)
        below = target.relative_to(self._real)
        entries = [self._folder / step for step in (below, *below.parents) if step.name]
        return not any(self._is_skipped(path) or self._is_left_out(path) for path in entries)


def _answer(question: object) -> bool:
    """Return an entry's answer about its kind; False if there is none, as for a link to itself."""
    try:
        return bool(question())  # type: ignore[operator]
    except OSError:
        return False
