"""``finelip serve`` under load: batches over requests beside one at a time, and one client beside the library in the process.

A model of ViT-B/16's size with random weights, ONNX int8 (made anew, five minutes, unless ``FINELIP_BENCH_MODEL`` names a
folder that has it), and ``FINELIP_BENCH_ITEMS`` (20,000) random items. Clients are in another process on the same machine, and
send descriptions of 4 to 40 words that are all different. ``FINELIP_BENCH_MODE`` (``auto``) is how the index is searched;
``FINELIP_BENCH_CLIENTS`` (1,8,32,128) and ``FINELIP_BENCH_REQUESTS`` (96, or three a client) say how much is asked.
"""

from __future__ import annotations

import os
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contest import Result, clock
from served import export_model, load, query, served

from finelip_fast import Retriever

ITEMS = int(os.environ.get("FINELIP_BENCH_ITEMS", 20_000))
MODE: Any = os.environ.get("FINELIP_BENCH_MODE", "auto")
CLIENTS = tuple(map(int, os.environ.get("FINELIP_BENCH_CLIENTS", "1,8,32,128").split(",")))
REQUESTS = int(os.environ.get("FINELIP_BENCH_REQUESTS", 96))
ROUNDS = 3
ITEMS_AT_ONCE = 1_000

BATCHES, SINGLY, LIBRARY = "finelip serve", "finelip serve --max-batch 1", "Retriever.search"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnxruntime", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason="not installed")
    return tmp_path_factory.mktemp("serve")


def filled(folder: Path) -> Retriever:
    """A retriever over an index of random items."""
    retriever = Retriever(export_model(folder / "model"), index=folder / "index", engine="onnx", precision="int8")
    generator, spec = torch.Generator().manual_seed(1), retriever.index.spec
    for first in range(0, ITEMS, ITEMS_AT_ONCE):
        ids = [f"item {number}" for number in range(first, min(first + ITEMS_AT_ONCE, ITEMS))]
        values = torch.randn(len(ids), spec.tokens, spec.width, generator=generator)
        retriever.index.add(ids, F.normalize(values, dim=-1), [{}] * len(ids))
    return retriever


@cache
def measured(folder: Path) -> dict[int, dict[str, Result]]:
    """Results of the contenders, by the number of clients."""
    retriever = filled(folder)
    model = ["--checkpoint", retriever.engine.source, "--engine", "onnx", "--precision", "int8"]
    bounds = ["--timeout", "600", "--queue", "1024"]
    results: dict[int, dict[str, Result]] = {count: {} for count in CLIENTS}
    with (
        served(folder / "index", [*model, *bounds]) as batches,
        served(folder / "index", [*model, *bounds, "--max-batch", "1"]) as singly,
    ):
        for count in CLIENTS:
            servers = {BATCHES: batches, SINGLY: singly}
            seconds, n_requests = dict.fromkeys(servers, 0.0), max(REQUESTS, 3 * count)
            results[count] = {name: Result() for name in servers}
            for number in range(ROUNDS + 1):
                for name, server in servers.items():
                    answer = load(server.address, count, n_requests // ROUNDS, 1000 * count + number, MODE)
                    if number:  # the first only warms up
                        results[count][name].seconds += answer["latencies"]
                        seconds[name] += answer["seconds"]
            if count == 1:
                results[count][LIBRARY] = in_process(retriever, n_requests)
                seconds[LIBRARY] = sum(results[count][LIBRARY].seconds)
            for name, result in results[count].items():
                names = ("p20", "p50", "p80", "p95", "p99")
                quantiles = np.quantile(result.seconds, [0.2, 0.5, 0.8, 0.95, 0.99]).tolist()
                result.info |= dict(zip(names, quantiles, strict=True))
                result.info["requests_per_second"] = len(result.seconds) / seconds[name]
    retriever.close()
    return results


def in_process(retriever: Retriever, count: int) -> Result:
    rng, result = random.Random(0), Result()
    for _ in range(count):
        text = query(rng)
        start = time.perf_counter()
        retriever.search(text, k=10, mode=MODE)
        result.seconds.append(time.perf_counter() - start)
    return result


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", [BATCHES, SINGLY, LIBRARY])
@pytest.mark.parametrize("clients", CLIENTS)
def test_serve(benchmark: Any, folder: Path, clients: int, contender: str) -> None:
    benchmark.extra_info.update(items=ITEMS, mode=MODE, clients=clients)
    group = f"searches of {clients} client{'s' * (clients > 1)} among {ITEMS:,} items, {MODE}, ViT-B/16"
    clock.into(benchmark, measured(folder)[clients], contender, group=group, baseline=SINGLY)
