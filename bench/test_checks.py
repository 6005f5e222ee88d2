"""The cost of verification: each operation is timed in turns, as the library does it and with its check removed.

``FINELIP_BENCH_CHECKED`` (5000) items of ViT-B/16's size, 40 KiB each; a checkpoint and an ONNX export of that size with
random weights. All files are in the page cache when they are read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from contest import Result, clock
from inputs import TOKENS, WIDTH, unit_rows
from torch import Tensor

from finelip_fast import FineLIPConfig, checkpoint
from finelip_fast.engines import open_engine
from finelip_fast.export.to_onnx import export_onnx
from finelip_fast.index import Index, IndexSpec
from finelip_fast.index.view import View
from finelip_fast.model import FineLIP
from finelip_fast.runtimes.onnx import OnnxGraph

COUNT = int(os.environ.get("FINELIP_BENCH_CHECKED", 5_000))
SPEC = IndexSpec("bench", TOKENS, WIDTH)
ROUNDS = 9

VERIFIED, UNVERIFIED = "verified", "not verified"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Index with embeddings and their int8 copies."""
    folder = tmp_path_factory.mktemp("index")
    rows = unit_rows(COUNT, dtype=torch.float16, seed=0).cpu()
    with closing(Index(SPEC, folder, device="cpu")) as index:
        index.add([f"pictures/{number:09}.jpg" for number in range(COUNT)], rows, [{}] * COUNT)
        index.search(rows[:1], 10, mode="exact-int8")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(FineLIP(FineLIPConfig.preset("ViT-B-16")), folder)
    return folder


def in_turns(ways: dict[str, Callable[[], object]]) -> dict[str, Result]:
    results = {name: Result() for name in ways}
    for turn in range(-1, ROUNDS):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn >= 0:  # the first turn loads files into the page cache
                results[name].seconds.append(time.perf_counter() - start)
    for result in results.values():
        result.info |= dict(
            zip(("p20", "p50", "p80"), np.quantile(result.seconds, [0.2, 0.5, 0.8]).tolist(), strict=True)
        )
    return results


def touch(pieces: Iterable[Tensor]) -> None:
    """Read from every page: a page of a mapped file is loaded on first access."""
    for piece in pieces:
        piece.view(-1).view(torch.int32)[:: 4096 // 4].sum()


# Operations, with and without their checks ----------------------------------------------------------------------------


def hits(index: Path, weights: Path) -> dict[str, Callable[[], object]]:
    opened = Index(SPEC, index, device="cpu")
    query = unit_rows(1, dtype=torch.float16, seed=1).cpu()

    def search() -> None:
        opened.search(query, 10, mode="two-stage", candidates=100)

    def unverified() -> None:
        with patch.object(View, "refuse_damaged"):
            search()

    return {VERIFIED: search, UNVERIFIED: unverified}


def embeddings(index: Path, weights: Path) -> dict[str, Callable[[], object]]:
    def read(verify: bool) -> None:
        with closing(Index(SPEC, index, device="cpu", verify=verify)) as opened:
            touch(opened._store.view().tokens or [])

    return {VERIFIED: lambda: read(True), UNVERIFIED: lambda: read(False)}


def copies(index: Path, weights: Path) -> dict[str, Callable[[], object]]:
    def read() -> None:
        with closing(Index(SPEC, index, device="cpu")) as opened:
            touch(opened._store.view().quantized.values)

    def unverified() -> None:
        with patch("finelip_fast.index.copies.file_checksums", lambda _, contents: _recorded(contents)):
            read()

    return {VERIFIED: read, UNVERIFIED: unverified}


def _recorded(contents: Any) -> dict[str, str]:
    return {name: contents.notes[name] for name in contents.places}


def loading(index: Path, weights: Path) -> dict[str, Callable[[], object]]:
    return {VERIFIED: lambda: checkpoint.verify(weights), UNVERIFIED: lambda: checkpoint.load(weights)}


def graphs(index: Path, weights: Path) -> dict[str, Callable[[], object]]:
    folder = export_onnx(weights, data="scenes:test:8", progress=False)
    engine: Any = open_engine("onnx", weights, "cpu")
    files = [folder / f"{name}.onnx" for name in ("image", "text")]
    return {
        VERIFIED: engine._open_graphs,
        UNVERIFIED: lambda: [OnnxGraph(path, engine.device) for path in files],
    }


DONE = {
    f"search the best 10 of {COUNT:,} items in two stages": hits,
    f"read the embeddings of {COUNT:,} items": embeddings,
    f"read the int8 copies of {COUNT:,} items": copies,
    "load a checkpoint of ViT-B/16's size": loading,
    "open its ONNX export": graphs,
}


@cache
def measured(name: str, index: Path, weights: Path) -> dict[str, Result]:
    return in_turns(DONE[name](index, weights))


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", DONE)
@pytest.mark.parametrize("contender", [VERIFIED, UNVERIFIED])
def test_checks(benchmark: Any, index: Path, weights: Path, name: str, contender: str) -> None:
    clock.into(benchmark, measured(name, index, weights), contender, group=name, baseline=UNVERIFIED)
