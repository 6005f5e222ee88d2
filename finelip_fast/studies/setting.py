"""Common parts of all studies: pairs, their embeddings, their metrics, and the cost of encoding."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast.datasets import PairDataset, open_dataset
from finelip_fast.datasets.survey import survey
from finelip_fast.engines import Engine
from finelip_fast.errors import InputError
from finelip_fast.kernels import clim_scores
from finelip_fast.metrics import SCORES, WAYS, bootstrap_interval, pair_ranks, pair_summary
from finelip_fast.records import Series

_REPEATS = 20
_BATCH = 64  # pictures in memory at once


@dataclass(frozen=True)
class Setting:
    """Data and options of a study.

    Attributes:
        data: Pairs, as in :func:`finelip_fast.datasets.open_dataset`.
        validation: Pairs on which something is chosen.
        root: Folder that relative paths start from.
        progress: Whether to show progress bars.
        build: Whether to export the checkpoint first if a study compares engines and finds no files.
    """

    data: str
    validation: str = "scenes:val:200"
    root: str | None = None
    progress: bool = True
    build: bool = False

    def open(self, engine: Engine, data: str | None = None) -> PairDataset:
        """Open the pairs, or others, with pictures of the model's size."""
        pairs = open_dataset(data or self.data, image_size=engine.config.image_size, root=self.root)
        if not len(pairs):
            raise InputError(f"expected pairs to study, got none from {data or self.data}")
        return pairs

    def refuse_untrained(self, engine: Engine) -> None:
        """
        Raises:
            InputError: The checkpoint has no trained aggregators, which the study is about.
        """
        if not engine.config.trained_aggregators:
            raise InputError(
                "expected a checkpoint with trained aggregators, which this study is about, got one without: train them "
                "(finelip adapt), or give another --checkpoint"
            )

    def about(self, engine: Engine, **facts: Any) -> dict[str, Any]:
        """Settings for a record, such as the data and the weights."""
        checkpoint = {"checkpoint": Path(engine.source).name or "bundled", "fingerprint": engine.fingerprint[:12]}
        return {
            "data": self.data,
            **checkpoint,
            "engine": f"{engine.name} {engine.precision}",
            "alpha": engine.alpha,
            **facts,
        }

    def embed(self, engine: Engine, data: str | None = None) -> Pairs:
        """Embed the pairs' pictures, and return them with the captions."""
        pairs = self.open(engine, data)
        known, blocks = survey(pairs), []
        with tqdm(total=len(known.ids), unit="image", disable=not self.progress, mininterval=0.5) as bar:
            for start in range(0, len(known.ids), _BATCH):
                batch = [pairs[number].image for number in known.first[start : start + _BATCH]]
                blocks.append(engine.embed_images(batch))
                bar.update(len(batch))
        return Pairs(known.captions, torch.tensor(known.picture_of), torch.cat(blocks))


@dataclass(frozen=True)
class Pairs:
    """Captions, and embedded pictures ``[P, L, D]``; caption ``i`` belongs to picture ``owners[i]``."""

    captions: list[str]
    owners: Tensor
    images: Tensor

    def measure(self, texts: Tensor, alpha: float) -> Measured:
        """Rank the captions' embeddings ``[C, L, D]`` and the pictures by each score.

        With ``alpha`` 1, only the global cosine is used, since the aggregators of such a checkpoint are untrained.
        """
        weights = {"global": 1.0} if alpha == 1 else dict(zip(SCORES, (1.0, 0.0, alpha), strict=True))
        ranks = {
            name: pair_ranks(clim_scores(self.images, texts, alpha=weight).cpu(), self.owners)
            for name, weight in weights.items()
        }
        return Measured(ranks, self.owners)


@dataclass(frozen=True)
class Measured:
    """Ranks of searches by picture and by caption, for each score, and the captions' pictures."""

    ranks: dict[str, tuple[Tensor, Tensor]]
    owners: Tensor

    @property
    def main(self) -> str:
        """Name of the score that the checkpoint searches by."""
        return list(self.ranks)[-1]

    def row(self) -> dict[str, float]:
        """Recall in %: all cut-offs for the main score, only rank 1 for the others."""
        row = {}
        for score in reversed(self.ranks):
            values = pair_summary(self.ranks[score])
            for way in WAYS:
                for k in (1, 5, 10) if score == self.main else (1,):
                    row[f"{score} {way} R@{k} (%)"] = round(100 * values[f"{way}_recall@{k}"], 1)
        return row

    def recall(self, score: str | None = None) -> float:
        """Mean recall@1 of both directions by a score, or by the main one, in %."""
        values = pair_summary(self.ranks[score or self.main])
        return 50 * sum(values[f"{way}_recall@1"] for way in WAYS)


def text_to_image(names: Sequence[Any], measured: Sequence[Measured]) -> tuple[Series, ...]:
    """Recall@1 of searches by caption in %, with 95 % intervals, as one series per score."""
    series = []
    for score in measured[0].ranks:
        hits = [ranking.ranks[score][1] <= 1 for ranking in measured]
        bounds = [
            bootstrap_interval(hit_at_1, groups=ranking.owners)
            for hit_at_1, ranking in zip(hits, measured, strict=True)
        ]
        series.append(
            Series(
                score,
                list(names),
                [100 * hit_at_1.double().mean().item() for hit_at_1 in hits],
                [100 * low for low, _ in bounds],
                [100 * high for _, high in bounds],
            )
        )
    return tuple(series)


def median_ms(run: Callable[[], Any], repeats: int = _REPEATS) -> float:
    """Median time of a call in milliseconds, including the device's work, after two warm-up calls."""
    return medians_ms([run], repeats)[0]


def medians_ms(runs: Sequence[Callable[[], Any]], repeats: int = _REPEATS) -> list[float]:
    """Compare calls as :func:`median_ms` does, timed in turns so that none benefits from a better minute."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(repeats + 2):
        for seconds, run in zip(times, runs, strict=True):
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 2:
                seconds.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(seconds) for seconds in times]


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Measure a block's peak memory in MiB beyond what was in use before: of the GPU if there is one, else of the process.

    The list holds one number once the block has ended. A process is sampled every two milliseconds. Memory that an allocator
    retained from before is not seen: ONNX Runtime's own, and the C library's unless that is glibc.
    """
    peaks: list[float] = []
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peaks
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    _give_back()
    before, most, finished = _resident(), [_resident()], threading.Event()

    def look() -> None:
        while not finished.wait(0.002):
            most[0] = max(most[0], _resident())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        finished.set()
        thread.join()
        peaks.append(max(0, max(most[0], _resident()) - before) / 2**20)


def _give_back() -> None:
    """Return memory retained by glibc's allocator to the system, so that a block's use of it is seen."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident() -> int:
    """Resident memory of the process in bytes."""
    return int(psutil.Process().memory_info().rss)
