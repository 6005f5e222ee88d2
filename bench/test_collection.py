"""A folder of photographs that is followed: what running ``finelip add`` again costs, beside embedding everything.

``FINELIP_BENCH_PHOTOS`` (2,000) JPEG files of 12 megapixels, about 2 MB each, in ten folders below
``FINELIP_BENCH_FOLDER`` (the system's folder of temporary files); embedded by the bundled model. Their pixels are those of
twenty noisy pictures, their contents all differ. All files are in the system's memory when they are read.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contest import Result, clock
from PIL import Image

from finelip_fast import FolderReport, Retriever

COUNT = int(os.environ.get("FINELIP_BENCH_PHOTOS", 2_000))
SIZE = 4_000, 3_000
SHARE = 20  # a twentieth is changed, moved, or deleted
ROUNDS = 3

EVERYTHING, UNCHANGED = "embed everything", "run again, nothing has changed"
CHANGED = f"run again, {COUNT // SHARE:,} each changed, moved and deleted"


def photographs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(20):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
        noise = rng.normal(0, 6, (SIZE[1], SIZE[0], 1)).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        contents.append(file.getvalue())
    for number in range(COUNT):
        path = folder / f"{number % 10}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, contents[number % 20], number)


def write(path: Path, content: bytes, number: int) -> None:
    """The file with a comment of its own, right behind its first marker."""
    comment = f"number {number:12}".encode()
    path.write_bytes(content[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + content[2:])


def disturb(folder: Path, turn: int) -> None:
    paths = sorted(folder.rglob("*.jpg"))
    part = COUNT // SHARE
    changed, moved, deleted = (paths[start * part : (start + 1) * part] for start in range(3))
    for number, path in enumerate(changed):
        write(path, path.read_bytes(), 1_000_000 * (turn + 1) + number)
    target = folder / f"moved {turn}"
    target.mkdir()
    for path in moved:
        path.rename(target / path.name)
    for path in deleted:
        path.unlink()


@contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("FINELIP_BENCH_FOLDER")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@cache
def measured() -> dict[str, Result]:
    results = {name: Result() for name in (EVERYTHING, UNCHANGED, CHANGED)}
    with scratch() as folder:
        photographs(folder / "photos")
        for turn in range(ROUNDS):
            shutil.rmtree(folder / "index", ignore_errors=True)
            with Retriever(engine="torch", device="cpu", index=folder / "index") as retriever:

                def add(name: str, retriever: Retriever = retriever) -> FolderReport:
                    start = time.perf_counter()
                    report = retriever.add_folder(folder / "photos", sync=True, progress=False)
                    results[name].seconds.append(time.perf_counter() - start)
                    return report

                assert add(EVERYTHING).added > 0
                assert add(UNCHANGED) == FolderReport()
                disturb(folder / "photos", turn)
                report, part = add(CHANGED), COUNT // SHARE
                assert (report.added, report.changed, report.moved, report.removed) == (0, part, part, part)
    for result in results.values():
        quantiles = np.quantile(result.seconds, [0.2, 0.5, 0.8]).tolist()
        result.info |= dict(zip(("p20", "p50", "p80"), quantiles, strict=True))
    return results


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", [EVERYTHING, UNCHANGED, CHANGED])
def test_collection(benchmark: Any, contender: str) -> None:
    clock.into(benchmark, measured(), contender, group=f"add a folder of {COUNT:,} photographs", baseline=EVERYTHING)
