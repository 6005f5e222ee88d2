"""Segments: append-only files of embeddings in safetensors' format, never changed once written.

A segment holds these arrays for ``n`` items, in the layout that the kernels read, so that loading is mapping:

- with dtype float16: ``tokens`` float16 ``[n, L, D]``.
- with dtype int8, at half the size: ``values``, ``scales``, ``terms`` and ``anchors`` of
  :class:`finelip_fast.kernels.QuantizedItems`. Row 0 of an item is its anchor in float16, the others are their integers times
  their scales; ``terms`` are those of these rows.
- with either: ``globals`` int8 ``[n, D]`` and ``global_scales`` float32 ``[n]``, row 0 of each item once more, for
  the first stage of a two-stage search.

Files in NumPy's format, from older indexes, hold only ``tokens``.
"""

from __future__ import annotations

import errno
import os
import uuid
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finelip_fast._files import plain_name
from finelip_fast.errors import StoreError, WriteError
from finelip_fast.index import remedies
from finelip_fast.index.arrays import (
    DIGEST,
    STORED,
    Contents,
    Place,
    UnavailableError,
    checksums,
    digest,
    in_parallel,
    is_shorter,
    map_arrays,
    memory_of,
    opened,
    read_at,
    read_contents,
    refuse_link,
    write_arrays,
)
from finelip_fast.index.copies import Copies, Kind, drop_foreign, int8_kind
from finelip_fast.kernels import QuantizedItems, quantize, quantize_items
from finelip_fast.kernels.clim.quantize import error_terms
from finelip_fast.kernels.clim.rows import dequantize
from finelip_fast.kernels.threads import side_by_side

DTYPES = ("float16", "int8")

_ROWS_AT_ONCE = 1024
# Rows of which one each is looked for in memory before more are read, and rows that one thread copies at once.
_PROBED, _COPIED_AT_ONCE = 32, 256
_EXPONENT = 0x7C00  # exponent of a float16: all its bits are set in infinity and NaN


class Segment:
    """Embeddings of ``n`` items, in memory or mapped from a file.

    Attributes:
        name: Name of the file; in memory, any name.
        arrays: Arrays by the names above.
        copies: Copies on a GPU, by any names, which are freed with the segment.
    """

    def __init__(
        self, name: str, arrays: dict[str, Tensor], path: Path | None = None, contents: Contents | None = None
    ) -> None:
        self.name, self.arrays, self._path, self._contents = name, arrays, path, contents
        self.copies: dict[str, Tensor] = {}
        self._int8 = self.copies_of(int8_kind(name, *arrays["tokens"].shape)) if "tokens" in arrays else None
        self.sketch: tuple[Copies, Tensor] | None = None  # see :mod:`finelip_fast.index.sketches`
        if "globals" not in arrays:
            arrays |= _derived(arrays)

    def __len__(self) -> int:
        return len(self.arrays["globals"])

    def embeddings(self, rows: Tensor | slice) -> Tensor:
        """Embeddings ``[m, L, D]`` of the given rows, float16 or float32."""
        if "tokens" in self.arrays:
            return self.arrays["tokens"][rows]
        return dequantize(*(values[rows] for values in self._named_arrays("values", "scales", "anchors")))

    @property
    def anchors(self) -> Tensor:
        """Row 0 of all embeddings, float16 ``[n, 1, D]``."""
        return self.arrays["tokens"][:, :1] if "tokens" in self.arrays else self.arrays["anchors"]

    @property
    def shape(self) -> tuple[int, int]:
        """``(L, D)`` of an embedding."""
        tokens, width = self.arrays["tokens" if "tokens" in self.arrays else "values"].shape[1:]
        return tokens, width

    @property
    def _stored(self) -> dict[str, Tensor]:
        """The arrays that make up the embeddings; the others are derived from them."""
        return {name: self.arrays[name] for name in STORED if name in self.arrays}

    def _named_arrays(self, *names: str) -> list[Tensor]:
        return [self.arrays[name] for name in names]

    @property
    def folder(self) -> Path | None:
        """The index folder that contains it; None: in memory."""
        return self._path and self._path.parent.parent

    @property
    def bytes_per_item(self) -> int:
        return sum(values.nbytes for values in self.arrays.values()) // max(1, len(self))

    @property
    def is_current(self) -> bool:
        """Whether the file is as it would be written today."""
        return self._path is None or self._path.suffix != ".npy"

    def copies_of(self, kind: Kind) -> Copies:
        """Copies of the embeddings, of the given kind."""
        digest = None if self._contents is None else self._contents.notes.get(DIGEST)
        return Copies(kind, self._stored, digest)

    def is_quantized(self, cache: Path | None) -> bool:
        """Whether the arrays that an int8 search needs exist already."""
        return self._int8 is None or (cache is not None and self._int8.contents(cache) is not None)

    def refuse_shortened(self) -> None:
        """Check that the mapped file has not become shorter: the system kills a process that reads past its end.

        Raises:
            StoreError: The file has become shorter.
        """
        if self._path and self._contents and is_shorter(self._path, self._contents.size):
            raise _shortened(self._path)

    @property
    def has_lost_copies(self) -> bool:
        """Whether the int8 copies are mapped from a file that has become shorter, so that they must not be read."""
        return self._int8 is not None and self._int8.is_lost

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of embeddings as they are read."""
        return torch.float16 if "tokens" in self.arrays else torch.float32

    def reading(self, rows: Tensor, target: Tensor, resources: ExitStack) -> Callable[[], object]:
        """Start reading embeddings from the file itself, so that all segments load what is not in memory at the same time.

        Args:
            rows: ``[m]``.
            target: Target ``[m, L, D]`` of :attr:`dtype`, contiguous.
            resources: Stack that holds the file open.

        Returns:
            Function that finishes reading. It may raise :class:`StoreError`: the file cannot be read.

        Raises:
            FileNotFoundError: The file is gone; what was mapped from it is not.
        """
        if self._path is None or self._contents is None:
            return lambda: target.copy_(self.embeddings(rows))
        if self.dtype == torch.float16:
            return self._reading_file(self._path, self._contents, {"tokens": target}, rows, resources)
        stored = {name: self.arrays[name] for name in ("values", "scales", "anchors")}
        parts = {name: torch.empty(len(rows), *array.shape[1:], dtype=array.dtype) for name, array in stored.items()}
        finish = self._reading_file(self._path, self._contents, parts, rows, resources)

        def finish_int8() -> None:
            finish()
            target.copy_(dequantize(*parts.values()))

        return finish_int8

    def _reading_file(
        self, path: Path, contents: Contents, targets: dict[str, Tensor], rows: Tensor, resources: ExitStack
    ) -> Callable[[], None]:
        try:
            descriptor = resources.enter_context(opened(path))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            # No more files can be opened, but this one is mapped.
            self.refuse_shortened()
            return lambda: _copy_rows(self.arrays, rows, targets)
        if os.fstat(descriptor).st_size != contents.size:
            raise _shortened(path)
        if len(rows) > _PROBED and _are_cached(descriptor, [contents.places[name] for name in targets], rows):
            return lambda: _copy_rows(self.arrays, rows, targets)
        ranges = []
        for name, target in targets.items():
            size = target.nbytes // max(1, len(rows))
            memory, start = memory_of(target), contents.places[name].start
            ranges += [
                (start + size * row, memory[size * at : size * (at + 1)]) for at, row in enumerate(rows.tolist())
            ]
        if hasattr(os, "posix_fadvise"):
            for offset, part in ranges:
                os.posix_fadvise(descriptor, offset, len(part), os.POSIX_FADV_WILLNEED)

        def finish() -> None:
            try:
                for offset, part in ranges:
                    if _read_into(part, descriptor, offset) != len(part):
                        raise _shortened(path)
            except OSError as error:
                raise StoreError(f"segment {path} cannot be read: {error.strerror}; {_remedy(path)}") from None

        return finish

    def checksum(self, row: int) -> int:
        """CRC-32 of an embedding, as it is in memory."""
        crc = 0
        for name in STORED:
            if name in self.arrays:
                crc = zlib.crc32(memory_of(self.arrays[name][row]), crc)
        return crc

    def damaged(self, crcs: Sequence[int | None]) -> dict[int, str]:
        """Damaged rows, and what is wrong with each: they differ from their checksums, if any, or from the arrays derived from
        them, or no search can compare them. All rows are checked, on all cores.
        """
        self.refuse_shortened()
        stored = self._stored

        def look(start: int) -> list[tuple[bool, bool]]:
            chunk = {name: values[start : start + _ROWS_AT_ONCE] for name, values in stored.items()}
            differ = (crc not in (None, computed) for crc, computed in zip(crcs[start:], checksums(chunk)))  # noqa: B905
            return list(zip(differ, _are_finite(chunk), strict=True))

        rows = [row for part in in_parallel(look, range(0, len(self), _ROWS_AT_ONCE)) for row in part]
        differs = torch.tensor([differ for differ, _ in rows], dtype=torch.bool)
        for name, expected in _derived(stored).items():
            differs |= (expected != self.arrays[name]).reshape(len(expected), -1).any(dim=1)
        infinite = [row for row, (_, is_finite) in enumerate(rows) if not is_finite]
        reasons = dict.fromkeys(differs.nonzero()[:, 0].tolist(), "is not what was written")
        return reasons | dict.fromkeys(infinite, "holds numbers that are not finite")

    def quantized(self, cache: Path | None) -> QuantizedItems:
        """Arrays that an int8 search needs; for float16 kept in the folder ``cache``, made if missing or damaged."""
        if self._int8 is None:
            return QuantizedItems(*self._named_arrays(*QuantizedItems._fields))
        tokens = self.arrays["tokens"]
        if cache is None:
            return quantize_items(tokens)
        arrays = self._int8.read(cache)
        if arrays is None:
            self.refuse_shortened()
            arrays = self._int8.keep(cache, quantize_items(tokens)._asdict())
        return QuantizedItems(*(arrays[name] for name in QuantizedItems._fields))

    def drop_foreign_copies(self, cache: Path) -> None:
        """Remove copies in ``cache`` that were made from other embeddings, such as damaged ones that have been restored since.

        Raises:
            OSError: They cannot be removed.
        """
        drop_foreign(cache, self.name, self._stored)


def _remedy(path: Path) -> str:
    return f"restore it, or run {remedies.repair(path.parent.parent)}"


def _shortened(path: Path) -> StoreError:
    return StoreError(f"segment {path} has changed in size since it was opened; {_remedy(path)}")


def _copy_rows(arrays: dict[str, Tensor], rows: Tensor, targets: dict[str, Tensor]) -> None:
    for name, target in targets.items():

        def copy(first: int, array: Tensor = arrays[name], target: Tensor = target) -> None:
            part = slice(first, first + _COPIED_AT_ONCE)
            torch.index_select(array, 0, rows[part], out=target[part])

        side_by_side(copy, range(0, len(rows), _COPIED_AT_ONCE))


def _are_cached(descriptor: int, places: Sequence[Place], rows: Tensor) -> bool:
    """Whether the system has these rows in memory, judged by some of them; False if it does not say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    byte = bytearray(1)
    with suppress(OSError):  # among them BlockingIOError: not in memory
        for place in places:
            size = (place.stop - place.start) // place.shape[0]
            for row in rows[:: len(rows) // _PROBED].tolist():
                os.preadv(descriptor, [byte], place.start + size * row, os.RWF_NOWAIT)
        return True
    return False


def _are_finite(stored: dict[str, Tensor]) -> list[bool]:
    """Whether each embedding consists of numbers that a search can compare."""
    finite = np.ones(len(next(iter(stored.values()))), bool)
    for values in stored.values():
        if values.dtype == torch.float16:  # by their bits, five times as fast as with PyTorch
            bits = values.numpy().reshape(len(values), -1).view(np.uint16) & _EXPONENT
            finite &= bits.max(axis=1, initial=0) < _EXPONENT
        elif values.is_floating_point():
            finite &= values.isfinite().flatten(1).all(dim=1).numpy()
    return finite.tolist()  # type: ignore[no-any-return]


def _read_into(part: memoryview, descriptor: int, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [part], offset)
    content = read_at(descriptor, len(part), offset)  # macOS, Windows
    part[: len(content)] = content
    return len(content)


def encode(embeddings: Tensor, dtype: str) -> dict[str, Tensor]:
    """The arrays of a segment of ``embeddings [n, L, D]``."""
    embeddings = embeddings.detach().cpu()
    if dtype == "float16":
        stored = {"tokens": embeddings.to(torch.float16).contiguous()}
    else:
        values, scales = quantize(embeddings)
        stored = {"values": values, "scales": scales, "anchors": embeddings[:, :1].to(torch.float16).contiguous()}
    return stored | _derived(stored)


def joined(parts: Sequence[tuple[Segment, Tensor]]) -> dict[str, Tensor]:
    """The arrays of a segment with chosen rows of others; the embeddings stay identical to the bit."""
    names = [name for name in STORED if name in parts[0][0].arrays]
    stored = {name: torch.cat([segment.arrays[name][rows] for segment, rows in parts]) for name in names}
    return stored | _derived(stored)


def _derived(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The arrays derived from embeddings as they are stored."""
    quantized = "values" in stored
    anchors, scales = quantize(stored["anchors"] if quantized else stored["tokens"][:, :1])
    derived = {"globals": anchors[:, 0].contiguous(), "global_scales": scales[:, 0].contiguous()}
    if quantized:
        parts = [stored[name].split(_ROWS_AT_ONCE) for name in ("values", "scales", "anchors")]
        terms = [error_terms(dequantize(*chunk), chunk[0], chunk[1]) for chunk in zip(*parts, strict=True)]
        derived["terms"] = torch.cat(terms) if terms else torch.empty(0, 6)
    return derived


def write_segment(folder: Path, arrays: dict[str, Tensor], *, prefix: str = "") -> tuple[str, list[int]]:
    """Write a new file and wait until it is on disk.

    Args:
        folder: Target folder.
        arrays: Arrays from :func:`encode` or :func:`joined`.
        prefix: Prefix of the file's name.

    Returns:
        The file's name (until a catalogue names it too, it belongs to nobody), and the checksum of each embedding.

    Raises:
        StoreError: Writing fails; nothing is left behind.
    """
    name = f"{prefix}{uuid.uuid4().hex}.safetensors"
    crcs = checksums(arrays)
    try:
        write_arrays(folder / name, arrays, {DIGEST: digest(crcs)})
    except WriteError as error:
        raise StoreError(str(error)) from error
    return name, crcs


def open_segment(folder: Path, name: str, *, rows: int, shape: tuple[int, int], dtype: str) -> Segment:
    """Map a segment.

    Args:
        folder, name: Folder and name of the file.
        rows, shape, dtype: Expected contents: ``n`` embeddings of ``(L, D)``.

    Raises:
        FileNotFoundError: There is no such file.
        UnavailableError: It cannot be read now, for lack of memory, open files or permission.
        StoreError: The name is not a file name, or the file is a link, truncated or of another format; the message names it.
    """
    path = folder / plain_name(name, f"segments of {folder.parent}", error=StoreError)
    try:
        refuse_link(folder)
        contents = read_contents(path)
        expected = _expected(shape, dtype, derived=path.suffix != ".npy")
        arrays = map_arrays(
            path,
            contents._replace(places={array: contents.places[array] for array in expected if array in contents.places}),
        )
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.EIO:
            raise StoreError(f"segment {path} cannot be read: {error.strerror}; {_remedy(path)}") from None
        raise UnavailableError(
            f"segment {path} cannot be read: {error.strerror}; allow the process more open files (ulimit -n), more "
            "memory, or access to the file"
        ) from None
    except UnavailableError:
        raise
    except StoreError as error:
        raise StoreError(f"segment {path} cannot be read: {error}; {_remedy(path)}") from None
    for array, (kind, tail) in expected.items():
        values = arrays.get(array)
        if (
            values is None
            or values.dtype != kind
            or values.ndim == 0
            or tuple(values.shape[1:]) != tail
            or len(values) != rows
        ):
            got = "none" if values is None else f"{_short(values.dtype)} {list(values.shape)}"
            raise StoreError(f"segment {path}: expected {array} {_short(kind)} {[rows, *tail]}, got {got}")
    return Segment(name, arrays, path, contents)


def _expected(shape: tuple[int, int], dtype: str, *, derived: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Expected arrays of a segment: dtype, and shape of an item."""
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
