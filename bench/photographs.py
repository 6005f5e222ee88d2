"""Generate JPEG files of 12 megapixels, about 2 MB each, like those of a camera."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 4_000, 3_000


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder in ``FINELIP_BENCH_FOLDER``, or in the system's temporary folder; it is removed afterwards."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("FINELIP_BENCH_FOLDER")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def photographs(folder: Path, count: int) -> None:
    """Write files into ten folders, with the pixels of twenty noisy pictures and unique contents."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(20):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
        noise = rng.normal(0, 6, (SIZE[1], SIZE[0], 1)).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        contents.append(file.getvalue())
    for number in range(count):
        path = folder / f"{number % 10}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, contents[number % 20], number)


def write(path: Path, content: bytes, number: int) -> None:
    """Write the file with a unique comment right after its first marker."""
    comment = f"number {number:12}".encode()
    path.write_bytes(content[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + content[2:])
