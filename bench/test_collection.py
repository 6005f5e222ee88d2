"""Updating the index of a folder of photographs: the cost of ``finelip add`` again, compared with embedding everything.

``FINELIP_BENCH_PHOTOS`` (2,000) JPEG files of 12 megapixels, about 2 MB each, in ten folders below
``FINELIP_BENCH_FOLDER`` (the system's temporary folder), embedded by the bundled model. Their pixels are those of twenty noisy
pictures, but the contents of all files differ. All files are in the page cache when they are read.
"""

from __future__ import annotations

import os
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contest import Result, clock
from photographs import photographs, scratch, write

from finelip_fast import FolderReport, Retriever

COUNT = int(os.environ.get("FINELIP_BENCH_PHOTOS", 2_000))
SHARE = 20  # one in twenty files is changed, moved, or deleted
ROUNDS = 3

EVERYTHING, UNCHANGED = "embed everything", "run again, nothing has changed"
CHANGED = f"run again, {COUNT // SHARE:,} each changed, moved and deleted"


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


@cache
def measured() -> dict[str, Result]:
    results = {name: Result() for name in (EVERYTHING, UNCHANGED, CHANGED)}
    with scratch() as folder:
        photographs(folder / "photos", COUNT)
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
