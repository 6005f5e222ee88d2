"""Segments: append-only files of embeddings, ``[n, L, D]`` float16 in NumPy's format, never changed once written."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finelip_fast._errors import StoreError


def write_segment(folder: Path, embeddings: Tensor) -> str:
    """Write ``[n, L, D]`` to a new file and wait until the disk has it.

    Returns:
        The file's name. Until a catalogue names it too, it belongs to nobody.

    Raises:
        StoreError: The disk refuses.
    """
    name = f"{uuid.uuid4().hex}.npy"
    try:
        with (folder / name).open("xb") as file:
            np.save(file, embeddings.to("cpu", torch.float16).numpy())
            file.flush()
            os.fsync(file.fileno())
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise StoreError(f"cannot write {folder / name}: {error.strerror}") from None
    return name


def read_segment(folder: Path, name: str, *, rows: int, shape: tuple[int, int]) -> Tensor:
    """Read a segment back.

    Args:
        folder, name: The file.
        rows, shape: What it must hold: ``n`` and ``(L, D)``.

    Returns:
        float16 ``[n, L, D]``.

    Raises:
        StoreError: A missing, short or foreign file; names it.
    """
    try:
        values = np.load(folder / name, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"segment {folder / name} cannot be read: {error}; restore it or index again") from None
    if values.dtype != np.float16 or values.shape != (rows, *shape):
        raise StoreError(
            f"segment {folder / name}: expected float16 {[rows, *shape]}, got {values.dtype} {list(values.shape)}"
        )
    return torch.from_numpy(values)
