"""The folder that keeps uploaded pictures, under names that their content gives.

A file is ``3f/3f9a…-beach.jpg``: 32 hexadecimal digits of its SHA-256, which make the same picture the same file however it
was sent, what is harmless of the name it came by, and the suffix of its format.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from finelip_fast._files import sync_folder, write_error, write_whole
from finelip_fast.picture_files import content_hash

_DIGITS = 32
_LONGEST_NAME = 80  # bytes of what is taken over from a sent name
_NAME = re.compile(rf"[0-9a-f]{{{_DIGITS}}}(?:-[\w.-]+)?\.[a-z0-9]+")


class Uploads:
    """Files of uploaded pictures; what several processes do to one folder, they do inside ``Index.undisturbed``.

    Args:
        folder: Folder, made if it is missing.

    Raises:
        WriteError: It cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.realpath(folder))
        self._make(self.folder)

    def _make(self, folder: Path) -> None:
        if folder.is_dir():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
        except OSError as error:
            raise write_error(folder, error) from error

    def path_for(self, digest: str, name: str, suffix: str) -> Path:
        """Where a picture of a SHA-256 lies, or is to lie if it was not uploaded before."""
        digits = digest[:_DIGITS]
        folder = self.folder / digits[:2]
        with suppress(OSError):
            known = [path for path in os.listdir(folder) if path.startswith(digits) and _NAME.fullmatch(path)]
            if known:
                return folder / min(known)
        return folder / f"{digits}{_harmless(name)}{suffix}"

    def keep(self, path: Path, content: bytes) -> bool:
        """Have the disk hold a picture; returns whether it did not.

        Raises:
            WriteError: The disk refuses.
        """
        with suppress(OSError):
            if path.stat().st_size == len(content) and content_hash(path).startswith(path.name[:_DIGITS]):
                return False
        self._make(path.parent)
        write_whole(path, lambda temporary: temporary.write_bytes(content), size=len(content))
        return True

    def find(self, item: str) -> Path | None:
        """The file of an uploaded picture by the id of its item, wherever the index's root lies now; None: there is none."""
        name = item.rpartition("/")[2]
        path = self.folder / name[:2] / name
        return path if _NAME.fullmatch(name) and path.is_file() else None

    def holds(self, path: Path) -> bool:
        """Whether a path is that of an uploaded picture."""
        return path == self.folder / path.name[:2] / path.name and bool(_NAME.fullmatch(path.name))

    def remove(self, path: Path) -> None:
        """
        Raises:
            WriteError: The disk refuses.
        """
        try:
            path.unlink(missing_ok=True)
            sync_folder(path.parent)
        except OSError as error:
            raise write_error(path, error) from error


def _harmless(name: str) -> str:
    """What may stand in any file's name of the last part of a path, without its suffix; empty where nothing may."""
    stem = re.split(r"[/\\]", name)[-1].rpartition(".")[0] or name
    plain = re.sub(r"[^\w-]+", "-", stem).encode()[:_LONGEST_NAME].decode("utf-8", "ignore").strip("-")
    return f"-{plain}" if plain else ""
