"""Array files in safetensors' format: written atomically, and read within the bounds of the actual file.

A header is checked against the length of its file before anything is mapped, so that no header can point outside it. Links are
not followed: a file of another folder, or of another owner, does not belong to the index.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from finelip_fast._files import TEMPORARY, kind_of, utf8_path, write_whole
from finelip_fast._json import parse_json
from finelip_fast.errors import StoreError

_DTYPES = {"F16": torch.float16, "F32": torch.float32, "I8": torch.int8, "U8": torch.uint8, "I64": torch.int64}
STORED = ("tokens", "values", "scales", "anchors")  # the parts of an embedding; the rest of a segment is derived
DIGEST = "rows"  # key of a file's note with the checksum of its embeddings' checksums
_ALIGNMENT = 64  # bytes, a cache line
_MOST_HEADER = 1 << 20  # bytes
_NUMPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f([24])', 'fortran_order': False, 'shape': "
    rb"\((\d{1,12}), (\d{1,12}), (\d{1,12})\), \} *\n",
    re.DOTALL,
)
_PIECE = 1 << 24  # bytes per piece of a checksum
# Windows has only the last of these, and no locks of this kind: nothing is considered abandoned there.
_OPEN = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))

_T = TypeVar("_T")
_R = TypeVar("_R")


class UnavailableError(StoreError):
    """Data cannot be read now, for lack of memory, open files or permission, and is not known to be damaged."""


# Messages of PyTorch and Python if memory or threads run out; the last two if there was no memory for the error itself.
_NO_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "not enough memory", "can't start new thread"),
    *("unable to mmap", "error return without exception set", "without setting an exception"),
)


@contextmanager
def within_memory() -> Iterator[None]:
    """
    Raises:
        UnavailableError: Memory or threads could not be allocated.
    """
    try:
        yield
    except (MemoryError, RuntimeError, SystemError) as error:
        if not isinstance(error, MemoryError) and not any(reason in str(error) for reason in _NO_MEMORY):
            raise
        raise UnavailableError(
            f"not enough memory ({str(error) or type(error).__name__:.200}); raise the limits of the process (ulimit -v, -u)"
        ) from None


class Place(NamedTuple):
    """Location of an array in a file; ``start`` is in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape) * self.dtype.itemsize


class Contents(NamedTuple):
    """Contents of a file according to its header: arrays and notes by name; and its length in bytes."""

    places: dict[str, Place]
    notes: dict[str, str]
    size: int


def refuse_link(folder: Path) -> None:
    """
    Raises:
        StoreError: A folder of an index is a link, which may lead to someone else's files.
    """
    if folder.is_symlink():
        raise StoreError(f"{folder} is a symbolic link; replace it with the folder that it points to")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a regular file and yield its descriptor; links are not followed, and pipes are not waited for.

    Raises:
        StoreError: The path is a link, or not a file.
        OSError: It cannot be opened.
    """
    try:
        descriptor = os.open(path, _OPEN)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StoreError(f"{path} is a symbolic link, which is not followed; replace it with the file") from None
        raise
    try:
        if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
            raise StoreError(f"{path}: expected a regular file, got {kind_of(mode)}")
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read up to ``size`` bytes from ``offset``, using a descriptor that nothing else reads from."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows
    return os.read(descriptor, size)


def read_contents(path: Path) -> Contents:
    """Read the header of a file and check it against its length; an array in NumPy's format is ``tokens``.

    Raises:
        StoreError: The file is truncated or of another format.
        OSError: It cannot be opened.
    """
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if path.suffix == ".npy":
            return _numpy_contents(read_at(descriptor, 256, 0), size)
        length = int.from_bytes(read_at(descriptor, 8, 0), "little")
        if not 0 < length <= min(_MOST_HEADER, size - 8):
            raise StoreError(
                f"expected a header of at most {min(_MOST_HEADER, max(0, size - 8))} bytes, found {length}"
            )
        text = read_at(descriptor, length, 8)
    header = parse_json(text, "header", error=StoreError, expected="names of arrays", kind=dict)
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise StoreError(f"header: expected notes of text, found {notes!r:.80}")
    places = {name: _place(name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, place in sorted(places.items(), key=lambda item: item[1].start):
        if place.start != end:
            raise StoreError(f"header: expected {name} at byte {end}, found it at {place.start}")
        end = place.stop
    if end != size:
        raise StoreError(f"expected {end} bytes, found {size}")
    return Contents(places, notes, size)


def _place(name: str, entry: Any, base: int) -> Place:
    if isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}:
        dtype, shape, span = _DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
        if dtype and _are_counts(shape) and _are_counts(span) and len(shape) <= 8 and len(span) == 2:
            place = Place(dtype, tuple(shape), base + span[0])
            if place.stop == base + span[1] and place.start % dtype.itemsize == 0:
                return place
    raise StoreError(f"header: expected dtype, shape and offsets of {name!r:.40} that fit, found {entry!r:.200}")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _numpy_contents(start: bytes, size: int) -> Contents:
    match = _NUMPY.match(start)
    if match is None:
        raise StoreError("expected an array [n, L, D] of numbers in NumPy's format")
    dtype = torch.float16 if match[1] == b"2" else torch.float32
    place = Place(dtype, tuple(map(int, match.group(2, 3, 4))), match.end())
    if place.stop != size:
        raise StoreError(f"expected {place.stop} bytes, found {size}")
    return Contents({"tokens": place}, {}, size)


def map_arrays(path: Path, contents: Contents) -> dict[str, Tensor]:
    """Map a file, which is read on access. It must not become shorter: the system kills a process that reads past its end.

    Raises:
        UnavailableError: There is too little memory to map it.
        FileNotFoundError: It is gone.
    """
    try:
        with utf8_path(path) as readable:
            content = torch.from_file(os.fspath(readable), shared=False, size=contents.size, dtype=torch.uint8)
    except RuntimeError as error:
        path.stat()
        raise UnavailableError(f"{path} cannot be mapped to memory: {error!s:.300}") from None
    return {
        name: content[place.start : place.stop].view(place.dtype).reshape(place.shape)
        for name, place in contents.places.items()
    }


def write_arrays(path: Path, arrays: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write a file as :func:`write_locked` does; its folder is created if missing.

    Raises:
        WriteError: Writing fails.
        StoreError: The folder is a link.
    """
    header: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    end = 0
    for name, values in arrays.items():
        (dtype,) = (short for short, kind in _DTYPES.items() if kind == values.dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    refuse_link(path.parent)
    with suppress(OSError):  # writing will report it
        path.parent.mkdir(exist_ok=True)
    write_locked(path, itertools.chain([len(text).to_bytes(8, "little") + text], map(memory_of, arrays.values())))


def write_locked(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file atomically, and wait until it is on disk.

    Meanwhile its temporary file is locked, so that :func:`remove_abandoned` leaves it alone.

    Raises:
        WriteError: Writing fails.
    """
    with ExitStack() as resources:

        def write(temporary: Path) -> None:
            file = resources.enter_context(locked(temporary))
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]

        write_whole(path, write)


@contextmanager
def locked(path: Path) -> Iterator[FileIO]:
    """Open a file for writing and lock it; create it again if it was removed as abandoned before it was locked.

    It has no buffer: after an error on a full disk, closing it would write the rest of one and raise again. Like
    :func:`os.write`, its ``write`` may write fewer bytes than it is given.

    Raises:
        OSError: The file cannot be created.
    """
    while True:
        with path.open("ab", buffering=0) as file:
            with suppress(OSError):  # a file system without locks, where nothing is considered abandoned either
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                yield file
                return


def remove_abandoned(folder: Path) -> int:
    """Remove temporary files that nobody is writing, which are not locked; return how many there were.

    Raises:
        StoreError: The folder is a link, or cannot be read.
    """
    count = 0
    for path in files_in(folder):
        if TEMPORARY.fullmatch(path.name):
            count += remove_unlocked(path)
    return count


def remove_unlocked(path: Path, before: Callable[[], object] = lambda: None) -> bool:
    """Call ``before`` and remove a file, unless another process holds its lock; return whether it was removed."""
    if fcntl is None:
        return False
    with suppress(OSError, StoreError), opened(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            before()
            path.unlink()
            return True
    return False


def files_in(folder: Path) -> list[Path]:
    """Paths in a folder of an index, sorted by name; empty if there is no folder.

    Raises:
        StoreError: The folder is a link, or cannot be read.
    """
    refuse_link(folder)
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error.strerror}") from None


# Checksums ---------------------------------------------------------------------------------------------------------------


def memory_of(values: Tensor) -> memoryview:
    """The bytes of an array in memory."""
    return values.detach().contiguous().numpy().reshape(-1).view(np.uint8).data


def array_checksums(arrays: Mapping[str, Tensor]) -> dict[str, str]:
    """Checksums of arrays in memory, by name."""
    memories = {name: memory_of(values) for name, values in arrays.items()}
    return {name: _checksum(len(memory), memory.__getitem__) for name, memory in memories.items()}


def file_checksums(path: Path, contents: Contents) -> dict[str, str]:
    """Checksums of a file's arrays. The file is read, not mapped: one that becomes shorter meanwhile only differs.

    Raises:
        StoreError: The path is a link, or not a file.
        OSError: It cannot be read.
    """
    with opened(path) as descriptor:

        def read(place: Place) -> Callable[[slice], bytes]:
            return lambda part: read_at(descriptor, part.stop - part.start, place.start + part.start)

        return {name: _checksum(place.stop - place.start, read(place)) for name, place in contents.places.items()}


def _checksum(length: int, read_bytes: Callable[[slice], bytes | memoryview]) -> str:
    """CRC-32 of the CRC-32 of pieces, computed on all cores."""
    pieces = [slice(start, min(start + _PIECE, length)) for start in range(0, length, _PIECE)]
    return digest(in_parallel(lambda piece: zlib.crc32(read_bytes(piece)), pieces))


def digest(crcs: Sequence[int]) -> str:
    """Combine several checksums into one."""
    return f"{zlib.crc32(b''.join(crc.to_bytes(4, 'little') for crc in crcs)):08x}"


def in_parallel(function: Callable[[_T], _R], values: Sequence[_T]) -> list[_R]:
    """Apply a function to each value, with as many threads as there are cores."""
    if len(values) < 2:
        return list(map(function, values))
    with ThreadPoolExecutor(min(len(values), os.cpu_count() or 1)) as pool:
        return list(pool.map(function, values))


def checksums(arrays: dict[str, Tensor]) -> list[int]:
    """CRC-32 of each embedding, from its bytes as stored in the file."""
    result: list[int] = []
    for values in (arrays[name].contiguous().numpy() for name in STORED if name in arrays):
        result = [zlib.crc32(row, crc) for row, crc in zip(values, result or [0] * len(values), strict=True)]
    return result


def is_shorter(path: Path, size: int) -> bool:
    """Whether a file is now shorter than ``size`` bytes; a deleted one is not, and its mapping can still be read."""
    with suppress(OSError):
        return os.stat(path).st_size < size
    return False
