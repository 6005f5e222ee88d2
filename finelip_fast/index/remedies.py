"""Commands that messages advise, for the folder that they are about."""

from __future__ import annotations

import shlex
from os import PathLike


def repair(folder: str | PathLike[str] | None) -> str:
    """What takes damaged items out of an index folder."""
    return f"finelip index repair --index {shlex.quote(str(folder))}"


def restore(folder: str | PathLike[str] | None) -> str:
    """What replaces a damaged catalogue."""
    return f"{repair(folder)} --restore makes it anew, or restore a snapshot"


def outdated(path: str, folder: str | PathLike[str] | None) -> str:
    """What is there of a picture that was read before and cannot be now."""
    note = "its item stays, with the embedding of its earlier content"
    if folder is None:
        return note
    return f"{note}, unless finelip remove {shlex.quote(path)} --index {shlex.quote(str(folder))} takes it out"
