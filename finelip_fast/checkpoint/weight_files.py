"""Weight files: recognised by their content, never executed."""

from __future__ import annotations

import io
import mmap
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from finelip_fast._files import kind_of, plain_name, utf8_path
from finelip_fast._json import read_json
from finelip_fast.checkpoint import tensor_pickle
from finelip_fast.checkpoint.foreign import shortened
from finelip_fast.checkpoint.tensor_pickle import Module, read_pickle
from finelip_fast.errors import CheckpointError

# Suffix that an index of shards adds to the weight file's name; the index says which shard contains each weight.
INDEX = ".index.json"
_MAX_INDEX = 1 << 24  # bytes
SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.\w+$)")

# Limits on what is read of a zip archive besides its tensors: the pickle and TorchScript's sources, and the directory.
_MAX_RECORDS = 1 << 26
_MAX_DIRECTORY = 1 << 22

# The magic number 0x1950a86a20f9469cfc6c, after the two bytes of the protocol: the start of torch.save's files before 1.6.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_BARE_PICKLE = "a pickle that torch.save did not write"

# The part of a TorchScript class's source that lists which of its attributes are weights.
_SCRIPT_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[([^\]]*)\]\n  __buffers__ = \[([^\]]*)\]", re.MULTILINE
)


def read_weights(path: Path) -> Mapping[str, Any]:
    """Read a file's state dict. The kind of file is determined by its content, because suffixes can be wrong.

    Args:
        path: A file written by ``torch.save`` or ``torch.jit.save``, a safetensors file, or the index of such files, called
            ``….index.json``. No code in it runs: it is read by :mod:`finelip_fast.checkpoint.tensor_pickle`.

    Returns:
        The saved state dict. Its tensors are memory-mapped from the file; writes to them stay in memory.

    Raises:
        CheckpointError: No such file, another kind of file, a damaged one, or one that contains more than tensors; a missing
            shard, or a weight that is not in the shard named by the index.
    """
    return _read_shards(path) if path.name.endswith(INDEX) else _read_file(path)


def shards(path: Path) -> list[Path]:
    """List the files that an index of shards names, in its folder; empty for a file that is not an index."""
    return sorted(set(_places(path).values())) if path.name.endswith(INDEX) else []


def _places(path: Path) -> dict[str, Path]:
    """Map each weight to its shard."""
    values = read_json(
        path, error=CheckpointError, expected="the index of a model's shards in JSON", kind=dict, max_bytes=_MAX_INDEX
    )
    places = values.get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(
            f"{path}: expected weight_map to be an object from weights to files, found {places!r:.40}"
        )
    return {name: path.parent / plain_name(file, path, error=CheckpointError) for name, file in places.items()}


def _read_shards(path: Path) -> dict[str, Any]:
    places = _places(path)
    if absent := sorted({file.name for file in places.values() if not file.is_file()}):
        raise CheckpointError(f"{path}: expected its shards beside it, missing {shortened(absent)}; get these, too")
    contents = {file: _read_file(file) for file in set(places.values())}
    if lost := [name for name, file in places.items() if name not in contents[file]]:
        raise CheckpointError(
            f"{path}: expected each weight in the shard that the index names, missing {shortened(lost)}; the shards belong to "
            "another index, get all of them again"
        )
    return {name: contents[file][name] for name, file in places.items()}


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        reason = f"expected a regular file, got {kind_of(path.stat().st_mode)}" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: {reason}")
    try:
        with _Reader(io.FileIO(path)) as file:
            head = file.read(9)
            is_zip = head[:4] == b"PK\x03\x04"
            if is_zip or head[:1] == b"\x80":
                # Copy-on-write; unmapped with the last tensor that uses it.
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                value = _read_zip(_Archive(file, data)) if is_zip else _read_legacy(data)
            elif head[8:] == b"{":
                value = read_safetensors(path)
            else:
                content = f"a file that starts with {head!r}" if head else "an empty file"
                raise CheckpointError(
                    f"{path}: expected a checkpoint (PyTorch, TorchScript or safetensors), found {content}"
                )
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        reader = "pickle.load" if str(error) == _BARE_PICKLE else "torch.load with weights_only=False"
        raise CheckpointError(
            f"{path}: expected a state dict of tensors, found other Python objects ({error}), which are never executed. If "
            f"you trust its author, load it once with {reader}, and save only the tensors: "
            "torch.save(saved.state_dict(), new) for a module, torch.save(saved['state_dict'], new) for a checkpoint of a "
            "training"
        ) from error
    except (ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: expected a PyTorch file, found another file, or a truncated or damaged one: {error}"
        ) from error
    if isinstance(value, Mapping):
        return value
    raise CheckpointError(f"{path}: expected a state dict, names to tensors, got a {type(value).__name__}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with utf8_path(path) as readable:
            return safetensors.torch.load_file(readable)
    except Exception as error:  # with a damaged header, PyTorch may raise any error
        raise CheckpointError(
            f"{path}: expected a safetensors file, found a truncated or damaged one: {error}"
        ) from error


def damaged_records(path: Path) -> list[str] | None:
    """List the records of a PyTorch file whose content does not match their checksum; None if it has no checksums."""
    with _Reader(io.FileIO(path)) as file:
        if not zipfile.is_zipfile(file):
            return None
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        records = _Archive(file, data).records
    # PyTorch writes zero when told to skip checksums to save time.
    checked = {name: record for name, record in records.items() if record.checksum and not record.is_compressed}
    return (
        [name for name, record in checked.items() if zlib.crc32(record.content(data)) != record.checksum]
        if checked
        else None
    )


# ---- Zip archives: torch.save since 1.6, and TorchScript


class _Record(NamedTuple):
    """Location of a record in the file."""

    start: int
    length: int
    is_compressed: bool
    checksum: int

    def content(self, data: mmap.mmap) -> memoryview:
        return memoryview(data)[self.start : self.start + self.length]


class _Reader(io.BufferedReader):
    """A file that limits how much zipfile reads: it reads the directory in one call, whatever size the file claims."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise ValueError(f"a directory of {size} bytes")
        return super().read(size)


class _Archive:
    """The records of a memory-mapped zip archive, by their names below its single folder."""

    def __init__(self, file: _Reader, data: mmap.mmap) -> None:
        self.data = data
        self._room = _MAX_RECORDS
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (NotImplementedError, UnicodeDecodeError, struct.error, OverflowError) as error:
            raise ValueError(f"a directory that makes no sense: {error}") from error
        self.records: dict[str, _Record] = {}
        for entry in entries:
            name = entry.filename.partition("/")[2]
            if name in self.records:
                raise ValueError(f"two records with the name {name!r:.80}")
            self.records[name] = self._place(entry)
        if sum(record.length for record in self.records.values()) > len(data):
            raise ValueError("records that overlap")

    def _place(self, entry: zipfile.ZipInfo) -> _Record:
        header = self.data[max(0, entry.header_offset) : max(0, entry.header_offset + 30)]
        known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if len(header) < 30 or header[:4] != b"PK\x03\x04" or entry.flag_bits & 1 or entry.compress_type not in known:
            raise ValueError(
                f"a record {entry.filename!r:.80} without its header, encrypted, or compressed in another way"
            )
        start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        if start + entry.compress_size > len(self.data):
            raise ValueError(f"a record {entry.filename!r:.80} beyond the end of the file")
        return _Record(start, entry.compress_size, entry.compress_type == zipfile.ZIP_DEFLATED, entry.CRC)

    def read(self, name: str) -> bytes:
        """Read a record into memory; the total size read this way, after decompression, is bounded."""
        record = self.records[name]
        content = record.content(self.data)
        if record.is_compressed:
            try:
                unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, self._room + 1)
            except zlib.error as error:
                raise ValueError(f"a record {name!r} that cannot be unpacked: {error}") from error
        else:
            unpacked = bytes(content[: self._room + 1])
        self._room -= len(unpacked)
        if self._room < 0:
            raise ValueError(f"a record {name!r} that is larger than all of the kind together should be")
        if record.checksum not in (0, zlib.crc32(unpacked)):
            raise ValueError(f"a record {name!r} with another checksum")
        return unpacked

    def storage(self, dtype: torch.dtype, key: str, count: int) -> Tensor:
        record = self.records.get(f"data/{key}")
        if record is None or record.is_compressed or count * dtype.itemsize > record.length:
            raise ValueError(f"no record 'data/{key:.40}' of {count} elements, uncompressed")
        return _flat(self.data, record.start, count, dtype)


def _read_zip(archive: _Archive) -> Any:
    names = archive.records
    if "data.pkl" not in names:
        raise ValueError(f"a zip archive with {shortened(names)}")
    order = archive.read("byteorder").decode("ascii", "replace") if "byteorder" in names else sys.byteorder
    if order != sys.byteorder:
        raise ValueError(f"numbers in the byte order {order!r:.40}, which this machine does not have")
    is_script = "constants.pkl" in names
    content = archive.read("data.pkl")
    if len(content) > tensor_pickle.MAX_BYTES:
        raise ValueError(f"a pickle of {len(content)} bytes, of at most {tensor_pickle.MAX_BYTES}")
    value = read_pickle(io.BytesIO(content), archive.storage, room=len(archive.data), modules=is_script)
    return dict(_script_weights(value, _Sources(archive), "")) if isinstance(value, Module) else value


class _Sources:
    """The weight attributes of TorchScript classes, found by reading their source without running it."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive
        self._known: dict[str, dict[str, set[str]]] = {}

    def weights(self, qualified: str) -> set[str] | None:
        """Names of the weights of a class; None if the archive does not say."""
        module, _, name = qualified.rpartition(".")
        if module not in self._known:
            record = f"code/{module.replace('.', '/')}.py"
            source = self._archive.read(record).decode("utf-8", "replace") if record in self._archive.records else ""
            self._known[module] = {
                match[1]: set(re.findall(r'"([^"]*)"', match[2] + match[3])) for match in _SCRIPT_CLASS.finditer(source)
            }
        return self._known[module].get(name)


def _script_weights(module: Module, sources: _Sources, prefix: str) -> Iterator[tuple[str, Tensor]]:
    weights = sources.weights(module.name)
    for name, value in module.attributes.items():
        if isinstance(value, Module):
            yield from _script_weights(value, sources, f"{prefix}{name}.")
        elif isinstance(value, Tensor) and (weights is None or name in weights):
            yield prefix + name, value


# ---- Files of torch.save before 1.6


def _read_legacy(data: mmap.mmap) -> Any:
    """Read a file of pickles (a magic number, a version, the system, the value, the storages' keys), then the storages."""
    stream = io.BytesIO(data[: tensor_pickle.MAX_BYTES])
    if stream.read(2 + len(_LEGACY_MAGIC))[2:] != _LEGACY_MAGIC:
        raise pickle.UnpicklingError(_BARE_PICKLE)
    read_pickle(stream)
    system = read_pickle(stream)
    if not isinstance(system, dict) or system.get("little_endian") != (sys.byteorder == "little"):
        raise ValueError("numbers in a byte order that this machine does not have")
    begin = stream.tell()
    declared: dict[str, tuple[torch.dtype, int]] = {}

    def declare(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if count * dtype.itemsize > len(data) or declared.setdefault(key, (dtype, count)) != (dtype, count):
            raise ValueError(f"a storage {key:.40} larger than the file, or of two kinds")
        return torch.empty(count, dtype=dtype, device="meta")

    # The storages follow the value that names them: it is read once to find the storages, and again to fill them.
    read_pickle(stream, declare, room=len(data))
    places: dict[str, int] = {}
    keys, position = read_pickle(stream), stream.tell()
    for key in keys if isinstance(keys, list) else ():
        if key not in declared or int.from_bytes(data[position : position + 8], "little") != declared[key][1]:
            raise ValueError("storages that are not those of the pickle")
        places[key] = position + 8
        position += 8 + declared[key][0].itemsize * declared[key][1]
    stream.seek(begin)
    return read_pickle(stream, lambda dtype, key, count: _flat(data, places[key], count, dtype), room=len(data))


def _flat(data: mmap.mmap, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return elements of a memory-mapped file as a one-dimensional tensor."""
    length = count * dtype.itemsize
    if start + length > len(data):
        raise ValueError("a storage beyond the end of the file")
    if not length:
        return torch.empty(0, dtype=dtype)
    elements = torch.frombuffer(data, dtype=torch.uint8, count=length, offset=start)
    return (elements if start % dtype.itemsize == 0 else elements.clone()).view(dtype)
