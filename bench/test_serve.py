"""``finelip serve`` under load: batched searches against one at a time, and embeddings against infinity-emb.

It serves a model of ViT-B/16's size with random weights as ONNX int8 (exported anew, which takes five minutes, unless
``FINELIP_BENCH_MODEL`` names a folder that has it), and ``FINELIP_BENCH_ITEMS`` (20,000) random items. Clients run in
another process on the same machine, and send distinct descriptions of 4 to 40 words. ``FINELIP_BENCH_MODES``
(exact,two-stage), ``FINELIP_BENCH_CLIENTS`` (1,8,32,128) and ``FINELIP_BENCH_REQUESTS`` (96, or three per client) set the
load and the search modes.

``FINELIP_BENCH_INFINITY`` is a command that serves a CLIP of the same size and context by infinity-emb, which needs an
environment of its own: ``infinity_emb v2 --model-id FOLDER --engine torch --device cpu --host 127.0.0.1``.
"""

from __future__ import annotations

import os
import random
import shlex
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contest import Result, clock
from served import export_model, load, query, served, started

from finelip_fast import Retriever

ITEMS = int(os.environ.get("FINELIP_BENCH_ITEMS", 20_000))
MODES = tuple(os.environ.get("FINELIP_BENCH_MODES", "exact,two-stage").split(","))
CLIENTS = tuple(map(int, os.environ.get("FINELIP_BENCH_CLIENTS", "1,8,32,128").split(",")))
REQUESTS = int(os.environ.get("FINELIP_BENCH_REQUESTS", 96))
ROUNDS = 3
ITEMS_AT_ONCE = 1_000

BATCHES, SINGLY, LIBRARY = "finelip serve", "finelip serve --max-batch 1", "Retriever.search"
INT8, FULL, INFINITY = "finelip serve, ONNX int8", "finelip serve, torch", "infinity-emb, torch"
# Refusals are not measured, so the limits are generous.
BOUNDS = ("--timeout", "600", "--queue", "1024")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnxruntime", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason="not installed")
    return tmp_path_factory.mktemp("serve")


@cache
def filled(folder: Path) -> Retriever:
    """Return a retriever with an index of random items."""
    retriever = Retriever(export_model(folder / "model"), index=folder / "index", engine="onnx", precision="int8")
    generator, spec = torch.Generator().manual_seed(1), retriever.index.spec
    for first in range(0, ITEMS, ITEMS_AT_ONCE):
        ids = [f"item {number}" for number in range(first, min(first + ITEMS_AT_ONCE, ITEMS))]
        values = torch.randn(len(ids), spec.tokens, spec.width, generator=generator)
        retriever.index.add(ids, F.normalize(values, dim=-1), [{}] * len(ids))
    return retriever


class Target(NamedTuple):
    """A server as a contender addresses it: the URL, the key of the description in a request, and the rest of the body."""

    url: str
    name: str
    body: dict[str, Any]


@cache
def searches(folder: Path) -> dict[tuple[str, int], dict[str, Result]]:
    """Return search results by mode and number of clients."""
    retriever = filled(folder)
    model = ["--checkpoint", retriever.engine.source, "--engine", "onnx", "--precision", "int8"]
    results = {}
    with (
        served(folder / "index", [*model, *BOUNDS]) as batches,
        served(folder / "index", [*model, *BOUNDS, "--max-batch", "1"]) as singly,
    ):
        for mode in MODES:
            body = {"k": 10, "mode": mode}
            targets = {
                BATCHES: Target(f"{batches.address}/v1/search", "text", body),
                SINGLY: Target(f"{singly.address}/v1/search", "text", body),
            }
            results |= {(mode, count): raced(targets, count) for count in CLIENTS}
    for mode in MODES if 1 in CLIENTS else ():
        results[mode, 1][LIBRARY] = in_process(retriever, max(REQUESTS, 3), mode)
    return results


@cache
def embeddings(folder: Path) -> dict[int, dict[str, Result]]:
    """Return results of embedding texts, by number of clients."""
    if "FINELIP_BENCH_INFINITY" not in os.environ:
        pytest.skip("FINELIP_BENCH_INFINITY names no server to race")
    command = shlex.split(os.environ["FINELIP_BENCH_INFINITY"])
    model = ["--checkpoint", filled(folder).engine.source, *BOUNDS, "--engine"]
    with (
        served(folder / "index", [*model, "onnx", "--precision", "int8"]) as int8,
        served(folder / "index", [*model, "torch"]) as full,
        started(command, ready="/health") as infinity,
    ):
        name = Path(command[command.index("--model-id") + 1]).name
        targets = {
            INT8: Target(f"{int8.address}/v1/embeddings", "input", {}),
            FULL: Target(f"{full.address}/v1/embeddings", "input", {}),
            INFINITY: Target(f"{infinity.address}/embeddings", "input", {"model": name}),
        }
        return {count: raced(targets, count) for count in CLIENTS}


def raced(targets: dict[str, Target], count: int) -> dict[str, Result]:
    """Query servers in turns and return their results; the first round only warms them up."""
    n_requests, seconds = max(REQUESTS, 3 * count), dict.fromkeys(targets, 0.0)
    results = {contender: Result() for contender in targets}
    for number in range(ROUNDS + 1):
        for contender, (url, name, body) in targets.items():
            answer = load(url, count, n_requests // ROUNDS, 1000 * count + number, name, body)
            if number:
                results[contender].seconds += answer["latencies"]
                seconds[contender] += answer["seconds"]
    for contender, result in results.items():
        tell(result, seconds[contender])
    return results


def tell(result: Result, seconds: float) -> None:
    """Add latency quantiles and requests per second to a result."""
    names = ("p20", "p50", "p80", "p95", "p99")
    result.info |= dict(zip(names, np.quantile(result.seconds, [0.2, 0.5, 0.8, 0.95, 0.99]).tolist(), strict=True))
    result.info["requests_per_second"] = len(result.seconds) / seconds


def in_process(retriever: Retriever, count: int, mode: Any) -> Result:
    rng, result = random.Random(0), Result()
    for _ in range(count):
        text = query(rng)
        start = time.perf_counter()
        retriever.search(text, k=10, mode=mode)
        result.seconds.append(time.perf_counter() - start)
    tell(result, sum(result.seconds))
    return result


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", [BATCHES, SINGLY, LIBRARY])
@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.parametrize("mode", MODES)
def test_search(benchmark: Any, folder: Path, mode: str, clients: int, contender: str) -> None:
    benchmark.extra_info.update(items=ITEMS, mode=mode, clients=clients)
    group = f"searches of {clients} client{'s' * (clients > 1)} among {ITEMS:,} items, {mode}, ViT-B/16"
    clock.into(benchmark, searches(folder)[mode, clients], contender, group=group, baseline=SINGLY)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", [INT8, FULL, INFINITY])
@pytest.mark.parametrize("clients", CLIENTS)
def test_embeddings(benchmark: Any, folder: Path, clients: int, contender: str) -> None:
    benchmark.extra_info.update(clients=clients)
    group = f"texts embedded for {clients} client{'s' * (clients > 1)}, ViT-B/16"
    clock.into(benchmark, embeddings(folder)[clients], contender, group=group, baseline=INFINITY)
