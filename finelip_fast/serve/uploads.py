"""The folder of uploaded pictures, which are named by their content.

A file is named ``3f/3f9a…-beach.jpg``: 32 hexadecimal digits of its SHA-256, so that the same picture is the same file however
it was sent, the harmless part of the name it was sent with, and the suffix of its format.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from finelip_fast._files import file_hash, sync_folder, write_error, write_whole

_DIGITS = 32
_LONGEST_NAME = 80  # bytes kept of the name that was sent
_NAME = re.compile(rf"[0-9a-f]{{{_DIGITS}}}(?:-[\w.-]+)?\.[a-z0-9]+")


class Uploads:
    """Files of uploaded pictures; processes that share a folder change it only inside ``Index.undisturbed``.

    Args:
        folder: Folder, created if missing.

    Raises:
        WriteError: The folder cannot be created.
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
        """Return the path of the picture with a SHA-256, or the path to use if it was not uploaded before."""
        digits = digest[:_DIGITS]
        folder = self.folder / digits[:2]
        with suppress(OSError):
            known = [path for path in os.listdir(folder) if path.startswith(digits) and _NAME.fullmatch(path)]
            if known:
                return folder / min(known)
        return folder / f"{digits}{_harmless(name)}{suffix}"

    def keep(self, path: Path, content: bytes) -> bool:
        """Write a picture unless it is there already; return whether it was written.

        Raises:
            WriteError: The picture cannot be written.
        """
        with suppress(OSError):
            if path.stat().st_size == len(content) and file_hash(path).startswith(path.name[:_DIGITS]):
                return False
        self._make(path.parent)
        write_whole(path, lambda temporary: temporary.write_bytes(content), size=len(content))
        return True

    def find(self, item: str) -> Path | None:
        """Return the file of an uploaded picture by its item's id, wherever the index and its root are now, or None."""
        name = item.rpartition("/")[2]
        path = self.folder / name[:2] / name
        return path if _NAME.fullmatch(name) and path.is_file() else None

    def pattern(self, path: Path) -> str:
        """Return the pattern, as ``like`` takes it, of the ids that an uploaded picture's item may have."""
        return f"%{path.parent.name}/{path.name[:_DIGITS]}%"

    def holds(self, path: Path) -> bool:
        """Return whether a path is that of an uploaded picture."""
        return path == self.folder / path.name[:2] / path.name and bool(_NAME.fullmatch(path.name))

    def remove(self, path: Path) -> None:
        """
        Raises:
            WriteError: The file cannot be removed.
        """
        try:
            path.unlink(missing_ok=True)
            sync_folder(path.parent)
        except OSError as error:
            raise write_error(path, error) from error


def _harmless(name: str) -> str:
    """Return the part of a path's last component, without suffix, that any file name may contain; may be empty."""
    stem = re.split(r"[/\\]", name)[-1].rpartition(".")[0] or name
    plain = re.sub(r"[^\w-]+", "-", stem).encode()[:_LONGEST_NAME].decode("utf-8", "ignore").strip("-")
    return f"-{plain}" if plain else ""
