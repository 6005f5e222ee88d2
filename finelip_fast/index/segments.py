"""Segments: append-only files of embeddings, ``[n, L, D]`` float16 in NumPy's format, never changed once written."""

from __future__ import annotations

import os
import uuid
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finelip_fast._errors import StoreError


def write_segment(folder: Path, embeddings: Tensor) -> tuple[str, list[int]]:
    """Write ``[n, L, D]`` to a new file and wait until the disk has it.

    Returns:
        The file's name (until a catalogue names it too, it belongs to nobody), and the checksum of each row.

    Raises:
        StoreError: The disk refuses.
    """
    name = f"{uuid.uuid4().hex}.npy"
    values = embeddings.to("cpu", torch.float16).contiguous()
    try:
        with (folder / name).open("xb") as file:
            np.save(file, values.numpy())
            file.flush()
            os.fsync(file.fileno())
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise StoreError(f"cannot write {folder / name}: {error.strerror}") from None
    return name, checksums(values)


def checksums(values: Tensor) -> list[int]:
    """CRC-32 of each row of float16 ``[n, L, D]``, as its bytes lie in a file."""
    return [zlib.crc32(row) for row in values.contiguous().numpy()]


def read_segment(folder: Path, name: str, *, rows: int, shape: tuple[int, int]) -> Tensor:
    """Read a segment back.

    Args:
        folder, name: The file.
        rows, shape: What it must hold: at least ``n`` rows of ``(L, D)``.

    Returns:
        float16 ``[n, L, D]``.

    Raises:
        StoreError: A missing, short or foreign file; names it.
    """
    try:
        values = np.load(folder / name, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"segment {folder / name} cannot be read: {error}; restore it or index again") from None
    if values.dtype != np.float16 or values.ndim != 3 or values.shape[1:] != shape or len(values) < rows:
        raise StoreError(
            f"segment {folder / name}: expected float16 {[rows, *shape]} or more, got {values.dtype} {list(values.shape)}"
        )
    return torch.from_numpy(values)
