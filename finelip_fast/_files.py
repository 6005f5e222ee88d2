"""Files: read when they are ones, written whole or not at all, and named by plain names; caches; installed packages."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError

from finelip_fast.errors import FineLIPError, WriteError

TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")  # names of files that :func:`write_whole` has not finished
_MAX_NAME = 255  # bytes, of every file system in use


def cache_folder() -> Path:
    """Folder of this user's cached files: ``FINELIP_CACHE``, or the system's place; everything in it can be made again."""
    if folder := os.environ.get("FINELIP_CACHE"):
        return Path(folder)
    try:
        Path.home()
    except RuntimeError:  # a user without a home, as in a container: a folder that is none and cannot be made
        return Path(os.devnull) / "finelip_fast"
    import platformdirs  # not needed where the folder is given

    return platformdirs.user_cache_path("finelip_fast", appauthor=False)


def installed(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    from importlib import metadata  # slow for a command that only helps

    versions = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def read_bytes(path: str | PathLike[str], *, error: type[FineLIPError], max_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        error: There is none, it is larger than ``max_bytes``, or it is a pipe, a device or a folder: none is waited for.
    """
    try:
        # Without O_NONBLOCK the opening of a pipe waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(descriptor)
            is_file = stat.S_ISREG(status.st_mode)
            with open(descriptor, "rb", closefd=False) if is_file else io.BytesIO() as file:
                # As large as it was when it was opened: reading "up to max_bytes" would ask for so much memory first.
                content = file.read(status.st_size) if status.st_size <= max_bytes else b""
        finally:
            os.close(descriptor)
    except OSError as fault:
        raise error(f"cannot read {path}: {fault.strerror}") from None
    except ValueError as fault:  # a name with NUL
        raise error(f"cannot read {os.fspath(path)!r}: {fault}") from None
    if not is_file:
        raise error(f"{path}: expected a file, found a folder, a pipe or a device")
    if status.st_size > max_bytes:
        raise error(f"{path}: expected at most {max_bytes} bytes, found {status.st_size}")
    return content


def plain_name(name: object, where: object, *, error: type[FineLIPError]) -> str:
    """A name that one file of a folder can have, and that leads nowhere else.

    Args:
        name: Name from a catalogue, a manifest, an archive or a configuration.
        where: Place that has the name, for the message.
        error: Class of the error to raise.

    Returns:
        The name.

    Raises:
        error: No text; empty; ``.`` or ``..``; with a separator of any system, a drive's colon or a control character; or
            longer than a file system takes.
    """
    plain = (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in "/\\:" or not character.isprintable() for character in name)
        and len(name.encode("utf-8")) <= _MAX_NAME
    )
    if not plain:
        raise error(f"{where}: expected the plain name of a file in its folder, found {name!r:.80}")
    assert isinstance(name, str)
    return name


def write_whole(path: Path, write: Callable[[Path], object], *, mode: int = 0o666, size: int = 0) -> None:
    """Write a file whole or not at all, and wait until the disk has it.

    Args:
        path: The file; its folder must be there.
        write: Writes the content to the path that it is given.
        mode: Permissions of the file, less what the process's mask takes away.
        size: Bytes that it will write, where they are known: a full disk's error then says how many are missing.

    Raises:
        WriteError: The disk refuses, and what is missing; or something else than a file is there. A file that was there
            before is what it was.
    """
    # Of its own, since several processes may write one file; short, since the name may be as long as names can be.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        if path.exists() and not path.is_file():  # renaming would put a file in a device's place
            raise FileExistsError(errno.EEXIST, "expected a file, found a folder, a pipe or a device")
        try:
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
            permissions = os.fstat(descriptor).st_mode
            os.close(descriptor)
            write(temporary)
            temporary.chmod(permissions)  # safetensors makes its files private, whatever the umask says
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is no OSError to all of them
        raise write_error(path, error, size=size) from error


def write_text_whole(path: Path, text: str) -> None:
    """:func:`write_whole` of a text in UTF-8."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed :func:`write_whole` left. Only where no other process writes to the folder."""
    for path in folder.glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_error(path: str | PathLike[str], error: Exception, *, size: int = 0) -> WriteError:
    """The error for a file or folder that cannot be written, with the room that is left where it may be a lack of room.

    Args:
        path: What could not be written.
        error: What its writer raised.
        size: Bytes that were to be written; 0 where they are not known.
    """
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    folder = Path(path).absolute().parent
    with suppress(OSError):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if not isinstance(error, OSError) or free < max(size, 1 << 26):
            needed = f"{size / (1 << 20):.1f} MiB are needed, " if size else ""
            reason += f"; {needed}{free / (1 << 20):.1f} MiB are free at {folder}"
    number = error.errno if isinstance(error, OSError) else None
    return WriteError(number, f"cannot write {path}: {reason}")


def sync_folder(folder: Path) -> None:
    """Wait until the disk knows the files of a folder by their names."""
    if os.name == "nt":  # where a folder cannot be opened; a rename there is written through
        return
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
