"""Commands that error messages recommend, for the folder concerned."""

from __future__ import annotations

import shlex
from os import PathLike
from typing import TypeAlias

Folder: TypeAlias = str | PathLike[str] | None


def _quoted(folder: Folder) -> str:
    return shlex.quote(str(folder))


def repair(folder: Folder) -> str:
    """Command that removes damaged items from an index folder."""
    return f"finelip index repair --index {_quoted(folder)}"


def restore(folder: Folder) -> str:
    """Ways to replace a damaged catalogue."""
    return f"run {repair(folder)} --restore to rebuild it, or restore a snapshot"


def maintain(folder: Folder) -> str:
    """Command that merges many segments into few."""
    return f"finelip index maintain --index {_quoted(folder)}"


def make(folder: Folder) -> str:
    """Command that creates an index where there is none."""
    return f"make one with finelip add FOLDER --index {_quoted(folder)}"


def move_root(folder: Folder) -> str:
    """Way to set where the pictures are."""
    if folder is None:
        return "index.root = FOLDER"
    return f"finelip index move-root FOLDER --index {_quoted(folder)}"


def remove(folder: Folder, where: str) -> str:
    """Way to remove the items that match a filter."""
    if folder is None:
        return f"index.delete([item.id for item in index.items(where={where!r})])"
    return f"finelip remove --where {shlex.quote(where)} --index {_quoted(folder)}"


def tune(folder: Folder) -> str:
    """Command that measures again how many candidates a search needs."""
    return f"finelip index tune --index {_quoted(folder)}"


def sketch(folder: Folder) -> str:
    """Command that builds the sketches of an index."""
    return f"finelip index sketch --index {_quoted(folder)}"


def outdated(path: str, folder: Folder) -> str:
    """Note on the item of a picture that was read before and can no longer be read."""
    note = "its item stays, with the embedding of its earlier content"
    if folder is None:
        return note
    return f"{note}, unless finelip remove {shlex.quote(path)} --index {_quoted(folder)} takes it out"
