"""Shards of pictures and captions: tar archives from files, or from the network where that was asked for.

webdataset's own opener runs ``pipe:`` in a shell, and other addresses through programs. Nothing here starts one: files are
opened as files, addresses by ``urllib`` and fsspec. What an archive may unpack to is bounded, and no name in it is a path.
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

from finelip_fast._decode import open_without_waiting
from finelip_fast._terminal import printable
from finelip_fast.errors import ConfigError, FineLIPError, TrainingError

if TYPE_CHECKING:
    from typing_extensions import Self

_logger = logging.getLogger(__name__)

PICTURES, CAPTIONS = ("jpg", "jpeg", "png", "webp"), ("txt", "json")

_WEB, _STORES = ("http", "https"), ("s3", "gs", "gcs", "az", "abfs", "hf")

_MAX_SHARDS = 100_000
_MAX_PATTERN = 4096  # characters; also of a member's name

# Bytes of a caption's member, of a picture, of a sample, and of all that is read from one member to the next: attributes, and
# members of no use.
_MAX_CAPTION = {"txt": 1 << 20, "json": 1 << 24}
_MAX_PICTURE, _MAX_SAMPLE, _MAX_BETWEEN = 1 << 28, 1 << 29, 1 << 30
_MAX_SAMPLE_MEMBERS = 100

# Pictures hardly compress; an archive that unpacks to more than this many times itself is made of nothing.
_MAX_RATIO, _FREE_RATIO = 100, 1 << 26

_EXPECTED = "expected a whole tar archive, plain or packed by gzip or bzip2"

_TIMEOUT = 60.0  # seconds without a byte


def shard_names(pattern: str, *, remote: bool = False) -> list[str]:
    """The shards that a pattern stands for.

    Args:
        pattern: A path or an address, or several with ``::`` between; ``{00..12}`` counts, ``{a,b}`` lists.
        remote: Whether addresses may be among them: ``http(s)``, and object stores (``s3``, ``gs``, ``az``, ``abfs``, ``hf``)
            where fsspec's package for one is installed.

    Raises:
        ConfigError: Another scheme, an address without ``remote``, braces within braces, or more shards than 100,000.
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
    """What a pair of braces stands for, as in a shell."""
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
    """``http`` of an address; nothing of a path, also on Windows, whose drives have one letter."""
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
    """Bytes of a shard that is a file; None of others.

    Raises:
        TrainingError: A file that cannot be found.
    """
    if _scheme(name) in _WEB + _STORES:
        return None
    try:
        return os.stat(_path(name)).st_size
    except OSError as error:
        raise TrainingError(f"cannot read a webdataset shard: {printable(name)}: {error.strerror}") from None


def shard_samples(name: str, *, remote: bool = False) -> Iterator[dict[str, Any]]:
    """The samples of one shard, in order: members by suffix, ``__key__`` and ``__url__``, as webdataset has them.

    Members that are neither pictures nor captions are there as empty bytes.

    Args:
        name: A shard, as :func:`shard_names` gives it.
        remote: Whether addresses are allowed, as there.

    Raises:
        ConfigError: As there.
        TrainingError: The shard cannot be read, or unpacks to too much; names it.
    """
    from webdataset.tariterators import group_by_keys

    _check_scheme(name, remote)
    try:
        with _opened(name) as file:
            yield from group_by_keys({**member, "__url__": name} for member in _members(file, name))
    except FineLIPError as error:
        raise TrainingError(f"cannot read a webdataset shard: {printable(name)}: {error}") from None
    except Exception as error:  # of sockets, zlib, tarfile, fsspec's stores and webdataset: many kinds
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
    return re.sub(r"^file:(//)?", "", name, flags=re.IGNORECASE)


class _Counted:
    """A stream that counts what is read of it, all told and since the last member."""

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
    """Names and contents of the regular files of an archive; hidden ones, which macOS puts beside others, are left out."""
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
    """A member's header; where one should be and none is, the archive is damaged, which tarfile takes for its end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """The header in a block.

        Raises:
            TrainingError: A cut block or a damaged one; no block of zeros, which is the end.
        """
        if len(buf) != tarfile.BLOCKSIZE:
            raise TrainingError(f"{_EXPECTED}; its last header is cut")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise TrainingError(f"{_EXPECTED}; a header is damaged: {error}") from None


class _Joined:
    """What was read of a stream to see its kind, and the rest: a network's cannot go back."""

    def __init__(self, head: bytes, file: Any) -> None:
        self._head, self._file = io.BytesIO(head), file

    def read(self, size: int = -1) -> bytes:
        return self._head.read(size) or self._file.read(size)
