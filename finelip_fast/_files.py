"""File helpers: reading regular files only, hashes, atomic writing, plain names; the cache folder."""

from __future__ import annotations

import codecs
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError

from finelip_fast.errors import FineLIPError, WriteError

TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")  # names of files that :func:`write_whole` has not finished
_MAX_NAME = 255  # bytes, the limit of all common file systems
SCARCE = 1 << 26  # bytes of free space below which a full disk may be the cause of an error
_PIECE = 1 << 20  # bytes that are hashed at a time


def cache_folder() -> Path:
    """Folder of this user's cached files: ``FINELIP_CACHE``, or the system's default. All of it can be recreated."""
    if folder := os.environ.get("FINELIP_CACHE"):
        return Path(folder)
    try:
        Path.home()
    except RuntimeError:  # a user without a home, as in a container: a path that cannot become a folder
        return Path(os.devnull) / "finelip_fast"
    import platformdirs  # not needed if the folder is given

    return platformdirs.user_cache_path("finelip_fast", appauthor=False)


def expand_home(path: str | PathLike[str]) -> Path:
    """Replace a leading ``~`` by the user's folder, as a shell does only at the start of a word; unknown users are kept."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises if there is no such user


def kind_of(mode: int) -> str:
    """What a path is that is not a regular file, from its ``st_mode``, with an article."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_bytes(path: str | PathLike[str], *, error: type[FineLIPError], max_bytes: int) -> bytes:
    """Read a regular file.

    Raises:
        error: The file cannot be read, is larger than ``max_bytes``, or is a pipe, a device or a folder; none is waited for.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(descriptor)
            is_file = stat.S_ISREG(status.st_mode)
            with open(descriptor, "rb", closefd=False) if is_file else io.BytesIO() as file:
                # Reads the size that it had when it was opened: "up to max_bytes" would first allocate that much memory.
                content = file.read(status.st_size) if status.st_size <= max_bytes else b""
        finally:
            os.close(descriptor)
    except OSError as fault:
        raise error(f"cannot read {path}: {fault.strerror}") from None
    except ValueError as fault:  # a name that contains NUL
        raise error(f"cannot read {os.fspath(path)!r}: {fault}") from None
    if not is_file:
        raise error(f"{path}: expected a regular file, got {kind_of(status.st_mode)}")
    if status.st_size > max_bytes:
        raise error(f"{path}: expected at most {max_bytes} bytes, found {status.st_size}")
    return content


def read_text(path: str | PathLike[str], *, error: type[FineLIPError], max_bytes: int) -> str:
    """Read a UTF-8 file, with line endings as ``\\n`` and without a byte order mark.

    Raises:
        error: The text is not UTF-8, or :func:`read_bytes` raises it.
    """
    content = read_bytes(path, error=error, max_bytes=max_bytes)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        kind = "UTF-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else str(fault)
        raise error(f"{path}: expected UTF-8 text: {kind}; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def open_without_waiting(path: str, flags: int) -> int:
    """An ``opener`` that does not wait for a writer if the path is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def utf8_path(path: str | PathLike[str]) -> Iterator[Path]:
    """Path of an existing file for libraries that take only UTF-8 ones, as safetensors does: Linux has one for an open file.

    Raises:
        OSError: The file cannot be opened.
    """
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        descriptor = open_without_waiting(os.fspath(path), os.O_RDONLY)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        yield Path(path)


def file_hash(path: str | PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    digest, piece = hashlib.sha256(), bytearray(_PIECE)
    with open(path, "rb", buffering=0, opener=open_without_waiting) as file:
        while count := file.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return digest.hexdigest()


def plain_name(name: object, where: object, *, error: type[FineLIPError]) -> str:
    """Check that a name can be that of a file in a folder, and leads nowhere else.

    Args:
        name: Name from a catalogue, a manifest, an archive or a configuration.
        where: Place where the name was found, for the message.
        error: Class of the error to raise.

    Returns:
        The name.

    Raises:
        error: The name is not a string; is empty, ``.`` or ``..``; contains a separator of any system, a drive's colon or a
            control character; or is longer than file systems allow.
    """
    plain = (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in "/\\:" or not character.isprintable() for character in name)
        and len(name.encode("utf-8")) <= _MAX_NAME
    )
    if not plain:
        raise error(f"{where}: expected a file name without a folder, found {name!r:.80}")
    assert isinstance(name, str)
    return name


def write_whole(path: Path, write: Callable[[Path], object], *, mode: int = 0o666, size: int = 0) -> None:
    """Write a file atomically, and wait until it is on the disk.

    Args:
        path: Path of the file; its folder must exist.
        write: Function that writes the content to the path it is given.
        mode: Permissions of the file, before the process's umask is applied.
        size: Number of bytes to be written, if known; the error for a full disk then says how many are needed.

    Raises:
        WriteError: The file cannot be written (the message says if space is lacking), or the path is not a file. An existing
            file stays unchanged.
    """
    with _unfinished(path, write, mode, size) as temporary:
        temporary.replace(path)
        sync_folder(path.parent)


def write_set(files: Sequence[tuple[Path, Callable[[Path], object], int]]) -> None:
    """Write files of a folder that belong together, and wait until they are on the disk.

    Whoever reads the last one finds the others as they were written with it: it is absent while they are replaced.

    Args:
        files: Path, function and number of bytes of each, as for :func:`write_whole`, in the order of writing.

    Raises:
        WriteError: Under the same conditions as for :func:`write_whole`. Existing files stay unchanged.
    """
    with ExitStack() as stack:
        temporaries = [stack.enter_context(_unfinished(path, write, 0o666, size)) for path, write, size in files]
        paths = [path for path, *_ in files]
        paths[-1].unlink(missing_ok=True)
        sync_folder(paths[-1].parent)
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
        sync_folder(paths[-1].parent)


@contextmanager
def _unfinished(path: Path, write: Callable[[Path], object], mode: int, size: int) -> Iterator[Path]:
    """Write a file's content under a temporary name, for a block that renames it."""
    # Unique, since several processes may write one file; short, since the file's own name may have the maximum length.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        if path.exists() and not path.is_file():  # renaming would replace a device by a file
            raise FileExistsError(errno.EEXIST, f"expected a regular file, got {kind_of(path.stat().st_mode)}")
        try:
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
            permissions = os.fstat(descriptor).st_mode
            os.close(descriptor)
            write(temporary)
            temporary.chmod(permissions)  # safetensors makes its files private, whatever the umask says
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except WriteError:  # of another file of a set
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # not all report a full disk by OSError
        raise write_error(path, error, size=size) from error


def write_text_whole(path: Path, text: str) -> None:
    """Write a string in UTF-8 by :func:`write_whole`."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove_unfinished(folder: Path) -> None:
    """Remove files left by a killed :func:`write_whole`. No other process may be writing to the folder."""
    for path in folder.glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_error(path: str | PathLike[str], error: Exception, *, size: int = 0) -> WriteError:
    """Create the error for a file or folder that cannot be written, with the free space if lack of space may be the cause.

    Args:
        path: Path that could not be written.
        error: Error that the writer raised.
        size: Number of bytes that were to be written; 0 if unknown.
    """
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    with suppress(OSError):
        free, folder = free_space(path)
        if not isinstance(error, OSError) or free < max(size, SCARCE):
            needed = f"{size / (1 << 20):.1f} MiB are needed, " if size else ""
            reason += f"; {needed}{free / (1 << 20):.1f} MiB are free at {folder}"
    number = error.errno if isinstance(error, OSError) else None
    return WriteError(number, f"cannot write {path}: {reason}")


def free_space(path: str | PathLike[str]) -> tuple[int, Path]:
    """Free space for a file, in bytes, and the folder that it was measured at.

    Raises:
        OSError: It cannot be measured.
    """
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free, folder


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk."""
    if os.name == "nt":  # folders cannot be opened there, and renames are written through
        return
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
