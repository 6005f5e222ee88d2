"""Segments: append-only files of embeddings in safetensors' format, never changed once written.

What is in one, for ``n`` items, in the layout that the kernels read, so that loading is mapping:

- of dtype float16: ``tokens`` float16 ``[n, L, D]``.
- of dtype int8, half the size: ``values``, ``scales``, ``terms`` and ``anchors`` of
  :class:`finelip_fast.kernels.QuantizedItems`. Row 0 of an item is its anchor in float16, the others are their integers times
  their scales; ``terms`` are those of these rows.
- in either: ``globals`` int8 ``[n, D]`` and ``global_scales`` float32 ``[n]``, row 0 of each item once more, for
  the first stage of a two-stage search.

Files in NumPy's format, of older indexes, hold ``tokens`` alone.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finelip_fast._errors import StoreError
from finelip_fast.kernels import QuantizedItems, quantize, quantize_items
from finelip_fast.kernels._quantize import error_terms
from finelip_fast.kernels._rows import dequantize

DTYPES = ("float16", "int8")

# What makes an embedding; the rest of a segment follows from it.
_STORED = ("tokens", "values", "scales", "anchors")
_NAMES = {"F16": torch.float16, "F32": torch.float32, "I8": torch.int8}
_ALIGNMENT = 64  # bytes, a cache line
_ROWS_AT_ONCE = 1024


class Segment:
    """Embeddings of ``n`` items, in memory or mapped from a file.

    Attributes:
        name: Of the file; in memory, any.
        arrays: What is in it, by the names above.
        copies: On a GPU, by any names; they go with the segment.
    """

    def __init__(self, name: str, arrays: dict[str, Tensor], path: Path | None = None) -> None:
        self.name, self.arrays, self._path = name, arrays, path
        self.copies: dict[str, Tensor] = {}
        if "globals" not in arrays:
            arrays |= _derived(arrays)

    def __len__(self) -> int:
        return len(self.arrays["globals"])

    def embeddings(self, rows: Tensor | slice) -> Tensor:
        """Some embeddings ``[m, L, D]``, float16 or float32."""
        if "tokens" in self.arrays:
            return self.arrays["tokens"][rows]
        return dequantize(*(values[rows] for values in self._kept("values", "scales", "anchors")))

    def _kept(self, *names: str) -> list[Tensor]:
        return [self.arrays[name] for name in names]

    @property
    def bytes_per_item(self) -> int:
        return sum(values.nbytes for values in self.arrays.values()) // max(1, len(self))

    @property
    def is_current(self) -> bool:
        """Whether the file is as it would be written today."""
        return self._path is None or self._path.suffix != ".npy"

    def is_quantized(self, cache: Path | None) -> bool:
        """Whether what a search in int8 needs is there already."""
        return "values" in self.arrays or (
            cache is not None and (cache / f"{Path(self.name).stem}.safetensors").exists()
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of embeddings when they are taken out."""
        return torch.float16 if "tokens" in self.arrays else torch.float32

    def reading(self, rows: Tensor, target: Tensor, resources: ExitStack) -> Callable[[], object]:
        """Begin to fetch some embeddings from the file itself: what is not in memory is on its way, of all segments at once.

        Args:
            rows: ``[m]``.
            target: Where to, ``[m, L, D]`` of :attr:`dtype`, contiguous.
            resources: Holds the file open.

        Returns:
            What ends it: then they are there. May raise :class:`StoreError`: the file cannot be read.

        Raises:
            FileNotFoundError: The file is gone; what was mapped from it is not.
        """
        if self._path is None or not self.is_current:
            return lambda: target.copy_(self.embeddings(rows))
        if self.dtype == torch.float16:
            return self._reading_file(self._path, {"tokens": target}, rows.tolist(), resources)
        kept = {name: self.arrays[name] for name in ("values", "scales", "anchors")}
        parts = {name: torch.empty(len(rows), *one.shape[1:], dtype=one.dtype) for name, one in kept.items()}
        finish = self._reading_file(self._path, parts, rows.tolist(), resources)

        def finish_int8() -> None:
            finish()
            target.copy_(dequantize(*parts.values()))

        return finish_int8

    def _reading_file(
        self, path: Path, targets: dict[str, Tensor], rows: Sequence[int], resources: ExitStack
    ) -> Callable[[], None]:
        wanted = []
        for name, target in targets.items():
            size = target.nbytes // max(1, len(rows))
            memory = target.numpy().reshape(-1).view(np.uint8).data
            wanted += [
                (self._starts[name] + size * row, memory[size * at : size * (at + 1)]) for at, row in enumerate(rows)
            ]
        descriptor = os.open(path, os.O_RDONLY)
        resources.callback(os.close, descriptor)
        if hasattr(os, "posix_fadvise"):
            for offset, part in wanted:
                os.posix_fadvise(descriptor, offset, len(part), os.POSIX_FADV_WILLNEED)

        def finish() -> None:
            try:
                for offset, part in wanted:
                    if _read_into(part, descriptor, offset) != len(part):
                        raise StoreError(f"segment {path} has become shorter: restore it, or finelip index repair")
            except OSError as error:
                raise StoreError(
                    f"segment {path} cannot be read: {error.strerror}; restore it, or finelip index repair"
                ) from None

        return finish

    @cached_property
    def _starts(self) -> dict[str, int]:
        """Where in the file each array begins."""
        assert self._path is not None
        with self._path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        return {name: 8 + size + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}

    def damaged(self, crcs: Sequence[int | None]) -> list[int]:
        """Rows that are not what was written: by their checksums where there are any, and by what follows from them."""
        wrong: list[int] = []
        for start in range(0, len(self), _ROWS_AT_ONCE):
            some = {name: values[start : start + _ROWS_AT_ONCE] for name, values in self.arrays.items()}
            found = checksums(some)
            differs = torch.tensor([crc not in (None, own) for crc, own in zip(crcs[start:], found)])  # noqa: B905
            for name, expected in _derived(some).items():
                differs |= (expected != some[name]).reshape(len(expected), -1).any(dim=1)
            wrong += (differs.nonzero()[:, 0] + start).tolist()
        return wrong

    def quantized(self, cache: Path | None) -> QuantizedItems:
        """What a search in int8 needs; of float16 kept in the folder ``cache``, made where it is not there.

        Raises:
            StoreError: The disk refuses.
        """
        names = QuantizedItems._fields
        if "values" in self.arrays:
            return QuantizedItems(*self._kept(*names))
        if cache is None:
            return quantize_items(self.arrays["tokens"])
        name = Path(self.name).stem + ".safetensors"
        try:
            return QuantizedItems(*(_mapped(cache / name)[each] for each in names))
        except (OSError, SafetensorError, KeyError):  # not there, or of a process that was killed
            _write(cache, name, quantize_items(self.arrays["tokens"])._asdict())
        return QuantizedItems(*(_mapped(cache / name)[each] for each in names))


def _read_into(part: memoryview, descriptor: int, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [part], offset)
    content = os.pread(descriptor, len(part), offset)  # macOS
    part[: len(content)] = content
    return len(content)


def encode(embeddings: Tensor, dtype: str) -> dict[str, Tensor]:
    """What a segment of ``embeddings [n, L, D]`` holds."""
    embeddings = embeddings.cpu()
    if dtype == "float16":
        kept = {"tokens": embeddings.to(torch.float16).contiguous()}
    else:
        values, scales = quantize(embeddings)
        kept = {"values": values, "scales": scales, "anchors": embeddings[:, :1].to(torch.float16).contiguous()}
    return kept | _derived(kept)


def joined(parts: Sequence[tuple[Segment, Tensor]]) -> dict[str, Tensor]:
    """What a segment holds of the chosen rows of others; the embeddings stay what they are, to the bit."""
    names = [name for name in _STORED if name in parts[0][0].arrays]
    kept = {name: torch.cat([one.arrays[name][rows] for one, rows in parts]) for name in names}
    return kept | _derived(kept)


def _derived(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """What follows from embeddings as they are kept."""
    quantized = "values" in kept
    anchors, scales = quantize(kept["anchors"] if quantized else kept["tokens"][:, :1])
    derived = {"globals": anchors[:, 0].contiguous(), "global_scales": scales[:, 0].contiguous()}
    if quantized:
        parts = [kept[name].split(_ROWS_AT_ONCE) for name in ("values", "scales", "anchors")]
        terms = [error_terms(dequantize(*some), some[0], some[1]) for some in zip(*parts, strict=True)]
        derived["terms"] = torch.cat(terms) if terms else torch.empty(0, 6)
    return derived


def write_segment(folder: Path, arrays: dict[str, Tensor]) -> tuple[str, list[int]]:
    """Write a new file and wait until the disk has it.

    Args:
        folder: Where to.
        arrays: Of :func:`encode` or :func:`joined`.

    Returns:
        The file's name (until a catalogue names it too, it belongs to nobody), and the checksum of each embedding.

    Raises:
        StoreError: The disk refuses; nothing is left there.
    """
    name = f"{uuid.uuid4().hex}.safetensors"
    _write(folder, name, arrays)
    return name, checksums(arrays)


def checksums(kept: dict[str, Tensor]) -> list[int]:
    """CRC-32 of each embedding, as its bytes lie in the file."""
    result: list[int] = []
    for values in (kept[name].contiguous().numpy() for name in _STORED if name in kept):
        result = [zlib.crc32(row, crc) for row, crc in zip(values, result or [0] * len(values), strict=True)]
    return result


def _write(folder: Path, name: str, arrays: dict[str, Tensor]) -> None:
    """By hand, since the library's own writer neither waits for the disk nor tells a full one by an OSError."""
    header: dict[str, Any] = {}
    end = 0
    for each, values in arrays.items():
        (dtype,) = (short for short, one in _NAMES.items() if one == values.dtype)
        header[each] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    path, partial = folder / name, folder / f"{name}.part"
    try:
        folder.mkdir(exist_ok=True)
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for values in arrays.values():
                file.write(values.contiguous().numpy().reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(folder)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise StoreError(f"cannot write {path}: {error.strerror}") from None


def sync_folder(folder: Path) -> None:
    """Wait until the disk knows the files of a folder by their names."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def open_segment(folder: Path, name: str, *, rows: int, shape: tuple[int, int], dtype: str) -> Segment:
    """Map a segment.

    Args:
        folder, name: The file.
        rows, shape, dtype: What it must hold: ``n`` embeddings of ``(L, D)``.

    Raises:
        FileNotFoundError: There is none.
        StoreError: A short or foreign file; names it.
    """
    path = folder / name
    try:
        if path.suffix == ".npy":
            # A copy on write, because PyTorch warns of memory that it may not write to.
            arrays = {"tokens": torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))}
        else:
            arrays = _mapped(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error  # not all name it
    except (OSError, ValueError, EOFError, TypeError, SafetensorError) as error:
        raise StoreError(f"segment {path} cannot be read: {error}; restore it, or finelip index repair") from None
    for each, (kind, tail) in _expected(shape, dtype, derived=path.suffix != ".npy").items():
        values = arrays.get(each)
        if (
            values is None
            or values.dtype != kind
            or values.ndim == 0
            or tuple(values.shape[1:]) != tail
            or len(values) != rows
        ):
            got = "none" if values is None else f"{_short(values.dtype)} {list(values.shape)}"
            raise StoreError(f"segment {path}: expected {each} {_short(kind)} {[rows, *tail]}, got {got}")
    return Segment(name, arrays, path)


def _expected(shape: tuple[int, int], dtype: str, *, derived: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The arrays of a segment: dtype, and shape of an item."""
    tokens, width = shape
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"tokens": (torch.float16, shape)}
    if dtype == "int8":
        expected = {"values": (torch.int8, shape), "scales": (torch.float32, (tokens,))}
        expected |= {"anchors": (torch.float16, (1, width)), "terms": (torch.float32, (6,))}
    if derived:
        expected |= {"globals": (torch.int8, (width,)), "global_scales": (torch.float32, ())}
    return expected


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mapped(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
