"""Checkpoints that this user has opened, and that an index may therefore load.

An index names the checkpoint that made it. If that were simply loaded, whoever made the index would decide what is loaded: a
file that came with it, or anything on a hub. So, as ssh does for hosts, each user has a list of known checkpoints by their
fingerprints: one is recorded in this user's cache when it is opened by name together with an index, and an index is opened
with the one recorded under the index's fingerprint. The index checks that this checkpoint still has that fingerprint.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from contextlib import suppress
from os import PathLike
from pathlib import Path

from finelip_fast._files import cache_folder, read_bytes, write_whole
from finelip_fast.errors import StoreError
from finelip_fast.index.catalogue import read_spec
from finelip_fast.index.spec import CATALOGUE

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def checkpoint_of(folder: str | PathLike[str]) -> str | None:
    """Return the checkpoint for an index folder, as this user named it; None for the bundled one, or if there is no index.

    Raises:
        StoreError: The index names a checkpoint that this user has not opened or that came with the index, or cannot be read.
    """
    spec = read_spec(Path(folder) / CATALOGUE)
    if spec is None or not spec["source"]:
        return None
    known = _noted(str(spec["checkpoint"]))
    if known is None or Path(folder).resolve() in Path(known).resolve().parents:
        source = str(spec["source"])
        raise StoreError(
            f"the index at {folder} names the checkpoint {source!r:.500}, which this user has not opened on this machine: "
            f"if you trust it, pass --checkpoint {shlex.quote(source):.500}, or its current location (in Python: "
            "Retriever(checkpoint, index=...)); the choice is remembered"
        )
    return known


def note(source: str, fingerprint: str) -> None:
    """Remember that this user has opened a checkpoint by name; does nothing if the cache cannot be written."""
    # One file each, so that concurrent processes cannot lose each other's records.
    with suppress(OSError):
        if _noted(fingerprint) != source:
            path = _file(fingerprint)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: temporary.write_bytes(os.fsencode(source)), mode=0o600)


def _noted(fingerprint: str) -> str | None:
    """The checkpoint recorded under a fingerprint, in a file that only this user can have written."""
    if not _FINGERPRINT.fullmatch(fingerprint):
        return None
    try:
        path = _file(fingerprint)
        status = path.lstat()
        owner = os.geteuid() if hasattr(os, "geteuid") else status.st_uid
        if not stat.S_ISREG(status.st_mode) or status.st_uid != owner or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        return os.fsdecode(read_bytes(path, error=StoreError, max_bytes=1 << 16)) or None
    except (OSError, StoreError):
        return None


def _file(fingerprint: str) -> Path:
    return cache_folder() / "known_checkpoints" / f"{fingerprint}.txt"
