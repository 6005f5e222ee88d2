"""Shards of pictures and captions: tar archives from files, or from the network if that is allowed.

webdataset's own opener runs ``pipe:`` in a shell, and fetches other addresses with external programs. This module starts none:
files are opened as files, addresses with ``urllib`` and fsspec. The unpacked size of an archive is limited, and names in it
are never used as paths.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import logging
import os
import re
import stat
import tarfile
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from finelip_fast._files import open_without_waiting
from finelip_fast._terminal import printable
from finelip_fast.errors import ConfigError, FineLIPError, TrainingError

if TYPE_CHECKING:
    from typing_extensions import Self

_logger = logging.getLogger(__name__)

PICTURES, CAPTIONS = ("jpg", "jpeg", "png", "webp"), ("txt", "json")

_WEB, _STORES = ("http", "https"), ("s3", "gs", "gcs", "az", "abfs", "hf")

_MAX_SHARDS = 100_000
_MAX_PATTERN = 4096  # characters; also of a member's name

# Limits in bytes: a caption's member, a picture, a sample, and everything read from one member to the next, such as attributes
# and unused members.
_MAX_CAPTION = {"txt": 1 << 20, "json": 1 << 24}
_MAX_PICTURE, _MAX_SAMPLE, _MAX_BETWEEN = 1 << 28, 1 << 29, 1 << 30
_MAX_SAMPLE_MEMBERS = 100

# Pictures hardly compress; an archive that unpacks to more than this many times its size holds no real content.
_MAX_RATIO, _FREE_RATIO = 100, 1 << 26

_EXPECTED = "expected a whole tar archive, plain or packed by gzip or bzip2"

_TIMEOUT = 60.0  # seconds without receiving a byte


def shard_names(pattern: str, *, remote: bool = False) -> list[str]:
    """Expand a pattern into the names of its shards.

    Args:
        pattern: Path or address, or several separated by ``::``; ``{00..12}`` expands to a range, ``{a,b}`` to a list.
        remote: Whether addresses are allowed: ``http(s)``, and object stores (``s3``, ``gs``, ``az``, ``abfs``, ``hf``) if the
            fsspec package for them is installed.

    Raises:
        ConfigError: The pattern has another scheme, an address without ``remote``, nested braces, or over 100,000 shards.
    """
    if len(pattern) > _MAX_PATTERN or not pattern.isprintable():
        raise ConfigError(f"expected shards as at most {_MAX_PATTERN} printable characters, got {pattern!r:.80}")
    names: list[str] = []
    for part in pattern.split("::"):
        names += _expanded(part, _MAX_SHARDS - len(names))
    for name in names:
        _check_scheme(name, remote)
    return names


def _expanded(pattern: str, most: int) -> list[str]:
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    if any(brace in piece for piece in pieces[::2] for brace in "{}"):
        raise ConfigError(f"expected shards with braces that are closed and none within others, got {pattern!r:.80}")
    choices: list[Any] = [[piece] if at % 2 == 0 else _choices(piece) for at, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > most:
        raise ConfigError(f"expected at most {_MAX_SHARDS} shards, got {pattern!r:.80}")
    return ["".join(choice) for choice in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    """Expand a pair of braces, as a shell does."""
    counted = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside, re.ASCII)
    if not counted:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = int(counted[1]), int(counted[2])
    padded = any(len(digits) > 1 and digits[0] == "0" for digits in counted.groups())
    width = max(map(len, counted.groups())) if padded else 1
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    if len(numbers) > _MAX_SHARDS:
        raise ConfigError(f"expected at most {_MAX_SHARDS} shards, got {{{inside}}}")
    return [f"{number:0{width}}" for number in numbers]


def _scheme(name: str) -> str:
    """Scheme of an address, such as ``http``; empty for a path, even on Windows, whose drives have one letter."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", name)
    return match[1].lower() if match else ""


def _check_scheme(name: str, remote: bool) -> None:
    scheme = _scheme(name)
    if scheme in ("", "file"):
        return
    if scheme not in _WEB + _STORES:
        raise ConfigError(
            f"expected shards as files, or addresses of {', '.join(_WEB + _STORES)}, got {name!r:.80}; "
            "a file whose name has a colon is written ./NAME"
        )
    if not remote:
        raise ConfigError(
            f"expected shards as files, got the address {name!r:.80}; --remote-data on the command line, or "
            "TrainConfig(remote_data=True), lets a run read from the network"
        )


def shard_size(name: str) -> int | None:
    """Size in bytes of a shard that is a file; None for others.

    Raises:
        TrainingError: The file cannot be found.
    """
    if _scheme(name) in _WEB + _STORES:
        return None
    try:
        return os.stat(_path(name)).st_size
    except OSError as error:
        raise TrainingError(f"cannot read a webdataset shard: {printable(name)}: {error.strerror}") from None


def shard_samples(name: str, *, remote: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the samples of one shard in order: members by suffix, ``__key__`` and ``__url__``, as in webdataset.

    Members that are neither pictures nor captions appear as empty bytes.

    Args:
        name: Name of a shard, as returned by :func:`shard_names`.
        remote: Whether addresses are allowed, as in :func:`shard_names`.

    Raises:
        ConfigError: The name has another scheme, or is an address without ``remote``.
        TrainingError: The shard cannot be read or unpacks to too much; the message names it.
    """
    from webdataset.tariterators import group_by_keys

    _check_scheme(name, remote)
    try:
        with _opened(name) as file:
            yield from group_by_keys({**member, "__url__": name} for member in _members(file, name))
    except FineLIPError as error:
        raise TrainingError(f"cannot read a webdataset shard: {printable(name)}: {error}") from None
    except Exception as error:  # sockets, zlib, tarfile, fsspec's stores and webdataset raise many kinds
        reason = printable(str(error.args[0] if error.args else error) or type(error).__name__)
        raise TrainingError(f"cannot read a webdataset shard: {printable(name)}: {reason:.300}") from error


def _opened(name: str) -> Any:
    scheme = _scheme(name)
    if scheme in _WEB:
        return urllib.request.urlopen(name, timeout=_TIMEOUT)
    if scheme in _STORES:
        import fsspec

        store, path = fsspec.url_to_fs(name)
        return store.open(path, "rb")
    file = open(_path(name), "rb", opener=open_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise TrainingError("expected a file, found a pipe or a device")
    return file


def _path(name: str) -> str:
    return os.path.expanduser(re.sub(r"^file:(//)?", "", name, flags=re.IGNORECASE))


class _Counted:
    """A stream that counts the bytes read from it, in total and since the last member."""

    def __init__(self, file: Any, packed: _Counted | None = None) -> None:
        self._file, self._packed = file, packed
        self.total = self.between = 0

    def read(self, size: int = -1) -> bytes:
        content: bytes = self._file.read(size)
        self.total += len(content)
        self.between += len(content)
        if self._packed and self.total > _MAX_RATIO * self._packed.total + _FREE_RATIO:
            raise TrainingError(f"it unpacks to more than {_MAX_RATIO} times its size")
        if self.between > _MAX_BETWEEN:
            raise TrainingError(f"expected members of at most {_MAX_BETWEEN >> 20} MiB, found a larger one")
        return content


def _members(file: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield names and contents of an archive's regular files, without hidden ones, such as macOS adds beside others."""
    from webdataset.tariterators import base_plus_ext

    head = file.read(6)
    stream = packed = _Counted(_Joined(head, file))
    if head.startswith(b"\x1f\x8b"):
        stream = _Counted(gzip.GzipFile(fileobj=cast(Any, packed)), packed)
    elif head.startswith(b"BZh"):
        stream = _Counted(bz2.BZ2File(cast(Any, packed)), packed)
    sample, size, count, has_hidden = None, 0, 0, False
    with tarfile.open(fileobj=cast(Any, stream), mode="r|", tarinfo=_Header) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
            stream.between = packed.between = 0
            if not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):
                continue
            if len(member.name) > _MAX_PATTERN or member.issparse() or member.size < 0:
                raise TrainingError(f"expected plain files of short names, found {member.name!r:.80}")
            if member.name.rpartition("/")[2].startswith("."):
                if not has_hidden:
                    _logger.warning("%s: left out hidden files, first %s", printable(name), printable(member.name))
                has_hidden = True
                continue
            key, suffix = base_plus_ext(member.name)
            if key is None or suffix is None:
                continue
            if key != sample:
                sample, size, count = key, 0, 0
            content = b""
            if suffix.lower() in PICTURES + CAPTIONS:
                most = _MAX_CAPTION.get(suffix.lower(), _MAX_PICTURE)
                if member.size > most:
                    raise TrainingError(f"{member.name!r:.80}: expected at most {most} bytes, found {member.size}")
                reader = archive.extractfile(member)
                content = reader.read() if reader else b""
            size, count = size + len(content), count + 1
            if size > _MAX_SAMPLE or count > _MAX_SAMPLE_MEMBERS:
                raise TrainingError(
                    f"sample {key!r:.80}: expected at most {_MAX_SAMPLE_MEMBERS} members and {_MAX_SAMPLE >> 20} MiB"
                )
            yield {"fname": member.name, "data": content}


class _Header(tarfile.TarInfo):
    """A member's header; a missing one means that the archive is damaged, which tarfile takes for its end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read the header from a block.

        Raises:
            TrainingError: The block is cut or damaged; a block of zeros is neither, but marks the end.
        """
        if len(buf) != tarfile.BLOCKSIZE:
            raise TrainingError(f"{_EXPECTED}; its last header is truncated")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise TrainingError(f"{_EXPECTED}; a header is damaged: {error}") from None


class _Joined:
    """A stream's head, read to detect its kind, followed by the rest, since a network stream cannot seek back."""

    def __init__(self, head: bytes, file: Any) -> None:
        self._head, self._file = io.BytesIO(head), file

    def read(self, size: int = -1) -> bytes:
        return self._head.read(size) or self._file.read(size)
