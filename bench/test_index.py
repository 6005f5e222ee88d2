"""The index: writing, loading, fetching and searching, compared with Lance on the same data.

``FINELIP_BENCH_INDEX`` (20000; several separated by commas) random items of ViT-B/16's size, 40 KiB each, are written in
batches of 64 MiB to ``FINELIP_BENCH_FOLDER`` (the system's temporary folder), which needs three times their size free.
*Cold* means after the system was told to drop the files from its cache. Lance stores an embedding as fixed-size binary, and
does not wait for the disk when it writes. To *load* is to have every embedding in memory, where a search finds it.

The loss of a two-stage search is measured on ``FINELIP_BENCH_INDEX_SCENES`` (20,000) pictures of Scenes, searched by the
descriptions of some of them. Their index is kept in ``FINELIP_BENCH_FOLDER`` for later runs. First stages are compared at an
alpha of ``FINELIP_BENCH_ALPHA`` (0.25), where tokens matter, on these pictures and on random items.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contest import Result, clock
from inputs import DEVICE, TOKENS, WIDTH, unit_rows
from torch import Tensor

import finelip_fast
from finelip_fast.datasets import Scenes
from finelip_fast.index import Index, IndexSpec
from finelip_fast.index.tune import tune
from finelip_fast.kernels import clim_topk

COUNTS = [int(count) for count in os.environ.get("FINELIP_BENCH_INDEX", "20000").split(",")]
SCENES = int(os.environ.get("FINELIP_BENCH_INDEX_SCENES", 20_000))
SPEC = IndexSpec("bench", TOKENS, WIDTH)
BATCH, FETCHED, BEST, CANDIDATES = 1_600, 200, 10, 200
ITEM_BYTES = 2 * TOKENS * WIDTH

ALPHA = float(os.environ.get("FINELIP_BENCH_ALPHA", "0.25"))
EXACT = "exact-int8"
FIRST_STAGES: dict[str, tuple[Any, int | None]] = {
    "global rows": ("two-stage", None),
    "sketch, 1 bit": ("sketch", 1),
    "sketch, 2 bits": ("sketch", 2),
}
CANDIDATES_TRIED = (25, 50, 100, 200, 400, 800, 1600, 3200, 6400, 12800)

ALL = "all items"
# Of pictures/000000000.jpg and so on; what they let through lies scattered.
FILTERS = {"9 in 10": "not number like '%7.jpg'", "1 in 100": "number like '%07.jpg'"}

OURS, LANCE = "finelip_fast", "Lance"
GLOBAL, WHOLE = "global rows alone", "whole embeddings"


# The stores -----------------------------------------------------------------------------------------------------------


class Ours:
    """The library's own index in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, ids: list[str], rows: Tensor) -> None:
        if not hasattr(self, "index"):
            self.index = Index(SPEC, self.folder, device=DEVICE)
        self.index.add(ids, rows, [{"number": item} for item in ids])

    def load(self) -> Tensor:
        index = Index(SPEC, self.folder, device=DEVICE)
        for piece in index._store.view().tokens or []:
            piece.view(-1).view(torch.int32)[:: 4096 // 4].sum()  # a page of a mapped file is loaded on first access
        first = index._store.view().read(torch.arange(5))
        index.close()
        return first

    def fetch(self, rows: Tensor) -> Tensor:
        return self.index._store.view().read(rows)


class Lance:
    """A Lance dataset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, ids: list[str], rows: Tensor) -> None:
        import lance
        import pyarrow as pa

        values = pa.py_buffer(rows.to(torch.float16).contiguous().numpy())
        tokens = pa.FixedSizeBinaryArray.from_buffers(pa.binary(ITEM_BYTES), len(ids), [None, values])
        metadata = [f'{{"number": "{item}"}}' for item in ids]
        table = pa.table({"id": ids, "metadata": metadata, "tokens": tokens})
        lance.write_dataset(table, str(self.folder), mode="append" if self.folder.exists() else "create")
        self.dataset = lance.dataset(str(self.folder))

    def batches(self) -> list[Tensor]:
        import lance

        dataset = lance.dataset(str(self.folder))
        return [_as_rows(batch.column(0)) for batch in dataset.to_batches(columns=["tokens"])]

    def load(self) -> Tensor:
        return torch.cat(self.batches()[:1])[:5]

    def fetch(self, rows: Tensor) -> Tensor:
        column = self.dataset.take(rows.tolist(), columns=["tokens"]).combine_chunks().column(0).chunk(0)
        return _as_rows(column)


def _as_rows(column: Any) -> Tensor:
    """Return a view of the same memory, ``[n, L, D]``."""
    values = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * ITEM_BYTES :][: len(column) * ITEM_BYTES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is read-only, and nothing writes to it
        return torch.from_numpy(values.view(np.float16).reshape(-1, TOKENS, WIDTH))


STORES: dict[str, type[Any]] = {OURS: Ours, LANCE: Lance}


@cache
def available() -> list[str]:
    try:
        import lance  # noqa: F401
    except ImportError:
        return [OURS]
    return [OURS, LANCE]


@cache
def workplace() -> Path:
    return Path(tempfile.mkdtemp(dir=os.environ.get("FINELIP_BENCH_FOLDER")))


@pytest.fixture(scope="module", autouse=True)
def cleaned_up() -> Iterator[None]:
    yield
    shutil.rmtree(workplace(), ignore_errors=True)


def items(count: int) -> Iterator[tuple[int, Tensor]]:
    """Yield batches of float16 and their offsets; all batches differ, but derive from the same few random rows."""
    drawn = unit_rows(BATCH, dtype=torch.float16, seed=0).cpu()
    generator = torch.Generator().manual_seed(1)
    for first in range(0, count, BATCH):
        signs = torch.randint(0, 2, (WIDTH,), generator=generator).half() * 2 - 1
        yield first, (drawn * signs)[: count - first]


def forget(folder: Path) -> None:
    """Tell the system to drop a folder's files from its cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # pages not yet written cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@contextmanager
def watched(info: dict[str, Any]) -> Iterator[None]:
    """Record the peak increase of the process's anonymous memory; mapped files are not counted."""
    before, most, finished = _own_memory(), [0], threading.Event()

    def watch() -> None:
        while not finished.wait(0.01):
            most[0] = max(most[0], _own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        info["peak_mib"] = max(0, most[0] - before) / 2**20


def _own_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


# Measurements ---------------------------------------------------------------------------------------------------------


@cache
def stores(count: int) -> tuple[dict[str, Any], dict[str, Result]]:
    """Fill all stores and time the writing, including syncing to disk where the store waits for it."""
    opened = {name: STORES[name](workplace() / f"{name}-{count}") for name in available()}
    results = {name: Result(info={"items_per_second": 0.0}) for name in opened}
    for name, store in opened.items():
        seconds = 0.0
        with watched(results[name].info):
            for first, rows in items(count):
                ids = [f"pictures/{number:09}.jpg" for number in range(first, first + len(rows))]
                start = time.perf_counter()
                store.write(ids, rows)
                seconds += time.perf_counter() - start
        results[name].seconds.append(seconds)
        results[name].info["items_per_second"] = count / seconds
    return opened, results


def rounds(prepare: Callable[[], object], run: Callable[[], Tensor], expected: Tensor, count: int) -> Result:
    result = Result()
    for _ in range(count):
        prepare()
        start = time.perf_counter()
        answer = run()
        result.seconds.append(time.perf_counter() - start)
        if not torch.equal(answer, expected):
            return Result(refusal="a wrong answer")
    low, middle, high = np.quantile(result.seconds, [0.2, 0.5, 0.8]).tolist()
    result.info |= {"p20": low, "p50": middle, "p80": high}
    return result


@cache
def loaded(count: int, cold: bool) -> dict[str, Result]:
    opened, _ = stores(count)
    os.sync()  # flush what other tests have written
    expected = next(items(count))[1][:5]
    return {
        name: rounds(lambda store=store: cold and forget(store.folder), store.load, expected, 3 if cold else 5)
        for name, store in opened.items()
    }


@cache
def fetched(count: int, cold: bool) -> dict[str, Result]:
    opened, _ = stores(count)
    os.sync()
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(2))[:FETCHED].sort().values
    expected = opened[OURS].fetch(rows)
    return {
        name: rounds(
            lambda store=store: cold and forget(store.folder),
            lambda store=store: store.fetch(rows),
            expected,
            7 if cold else 21,
        )
        for name, store in opened.items()
    }


@cache
def searched(count: int) -> dict[str, Result]:
    opened, _ = stores(count)
    for store in opened.values():
        forget(store.folder)  # memory may not hold all stores
    index = opened[OURS].index
    index.maintain()
    queries = unit_rows(8, dtype=torch.float16, seed=3).cpu()
    index.search(queries[:1], BEST, mode="exact-int8")  # creates the int8 copies
    expected = index.search(queries, BEST, mode="exact")
    results = {}
    for mode in ("two-stage", "exact-int8", "exact"):
        options = {"mode": mode, "candidates": CANDIDATES}
        index.search(queries[:1], BEST, **options)
        result = Result(info={})
        numbers = []
        with watched(result.info):
            for query in queries.split(1) * (5 if mode == "two-stage" else 1):
                start = time.perf_counter()
                numbers.append(index.search(query, BEST, **options).numbers)
                result.seconds.append(time.perf_counter() - start)
        agreement = (
            (torch.cat(numbers[: len(queries)])[:, :, None] == expected.numbers[:, None])
            .any(dim=2)
            .float()
            .mean()
            .item()
        )
        result.info |= dict(zip(("p20", "p80"), np.quantile(result.seconds, [0.2, 0.8]).tolist(), strict=True))
        if mode == "two-stage":
            result.info["candidates"] = CANDIDATES
        elif agreement < 1:
            result = Result(refusal=f"only {agreement:.1%} of the exact best")
        results[mode] = result
    if LANCE in opened:
        store = opened[LANCE]
        results["Lance, all read for every query"] = rounds(
            lambda: None,
            lambda: clim_topk(queries[:1], store.batches(), BEST, alpha=SPEC.alpha)[1],
            expected.numbers[:1],
            3,
        )
    return results


@cache
def filtered(count: int) -> dict[str, Result]:
    """Search with filters, each when it is new and when it was used just before."""
    index = stores(count)[0][OURS].index
    index.maintain()
    queries = unit_rows(8, dtype=torch.float16, seed=3).cpu()
    runs: dict[str, tuple[str | None, bool]] = {ALL: (None, False)}
    for name, where in FILTERS.items():
        runs |= {f"{name}, a new filter": (where, True), f"{name}, the same filter again": (where, False)}
    results = {}
    for name, (where, is_new) in runs.items():
        index.search(queries[:1], BEST, mode="exact", where=where)
        result = Result(info={})
        for query in queries.split(1):
            if is_new:
                index._store.view().filtered.clear()
            start = time.perf_counter()
            index.search(query, BEST, mode="exact", where=where)
            result.seconds.append(time.perf_counter() - start)
        result.info |= dict(zip(("p20", "p80"), np.quantile(result.seconds, [0.2, 0.8]).tolist(), strict=True))
        results[name] = result
    return results


@cache
def searched_globally(count: int) -> dict[str, Result]:
    """Search with ``alpha=1``: an index of whole embeddings, and one of global rows only."""
    opened, _ = stores(count)
    queries = unit_rows(8, dtype=torch.float16, seed=3).cpu()
    index = opened[OURS].index
    single = Index(replace(SPEC, tokens=1, alpha=1.0), workplace() / f"global-{count}", device=DEVICE)
    for first, rows in items(count):
        ids = [f"pictures/{number:09}.jpg" for number in range(first, first + len(rows))]
        single.add(ids, rows[:, :1], [{"number": item} for item in ids])
    _, numbers = clim_topk(queries, index._store.view().tokens or [], BEST, alpha=1.0)
    results = {}
    for name, searched_index in ((GLOBAL, single), (WHOLE, index)):
        result, answers = Result(info={}), []
        searched_index.search(queries[:1], BEST, alpha=1.0, mode="exact")
        for query in queries.split(1):
            start = time.perf_counter()
            answers.append(searched_index.search(query, BEST, alpha=1.0, mode="exact"))
            result.seconds.append(time.perf_counter() - start)
        is_right = torch.equal(torch.cat([answer.numbers for answer in answers]), numbers)
        segments = searched_index._store.segments_folder
        result.info["mib"] = sum(path.stat().st_size for path in segments.iterdir()) / 2**20
        result.info |= dict(zip(("p20", "p80"), np.quantile(result.seconds, [0.2, 0.8]).tolist(), strict=True))
        results[name] = result if is_right else Result(refusal="other hits than among all rows")
    return results


@cache
def described() -> tuple[Index, Tensor, list[str]]:
    """Return an index of pictures of Scenes, embeddings of the descriptions of 200 of them, and their ids."""
    folder = Path(os.environ.get("FINELIP_BENCH_FOLDER", workplace()))
    retriever = finelip_fast.Retriever(index=folder / f"scenes-{SCENES}", engine="torch")
    world = Scenes("train", SCENES, image_size=retriever.engine.config.image_size)
    missing = [world[number] for number in range(len(retriever), SCENES)]
    retriever.add_images((scene.draw() for scene in missing), ids=[scene.id for scene in missing], batch_size=256)
    sample = [world[number] for number in range(0, SCENES, max(1, SCENES // 200))][:200]
    queries = retriever.engine.embed_texts([scene.caption for scene in sample])
    retriever.index.search(queries[:1], BEST, mode="exact-int8")
    return retriever.index, queries, [scene.id for scene in sample]


@cache
def scenes() -> dict[str, Result]:
    """Search pictures of Scenes by the descriptions of 200 of them."""
    index, queries, answers = described()
    tuning, _ = tune(index, queries, answers=answers, modes=["two-stage"], progress=False)
    measured = {"agreement": tuning.agreement, "candidates": tuning.candidates, "recall_change": tuning.recall_change}
    return {
        "exact-int8": Result([tuning.seconds["exact"]]),
        "two-stage": Result([tuning.seconds["two-stage"]], measured),
    }


@cache
def staged() -> dict[str, Result]:
    """Compare first stages on pictures of Scenes, with 100 candidates each and with as many as 99.9 % agreement needs."""
    index, queries, answers = described()
    options = {"answers": answers, "alpha": ALPHA, "agreement": 0.999, "progress": False}
    return _first_stages(index, queries, options)


@cache
def staged_at_random(count: int) -> dict[str, Result]:
    """Compare them on random items, each query being a perturbed item: rows in all directions alike."""
    index = stores(count)[0][OURS].index
    noise = unit_rows(20, dtype=torch.float32, seed=4).cpu()
    rows = index._store.view().read(torch.arange(20) * (count // 20)).float()
    queries = torch.nn.functional.normalize(rows + noise, dim=-1)
    index.search(queries[:1], BEST, mode="exact-int8")
    return _first_stages(index, queries, {"alpha": ALPHA, "agreement": 0.999, "progress": False})


def _first_stages(index: Index, queries: Tensor, options: dict[str, Any]) -> dict[str, Result]:
    results: dict[str, Result] = {}
    global_bytes = index.spec.width + 4
    for name, (mode, bits) in FIRST_STAGES.items():
        size = global_bytes + (index.build_sketches(bits=bits) // len(index) if bits else 0)
        for candidates, label in (([100], "100 candidates"), (CANDIDATES_TRIED, "99.9 %")):
            tuning, _ = tune(index, queries, modes=[mode], candidates=candidates, **options)
            info = {"agreement": tuning.agreement, "candidates": tuning.candidates, "item_bytes": size}
            results[f"{name}, {label}"] = Result([tuning.seconds[mode]], info)
            results[EXACT] = Result([tuning.seconds["exact"]])
    return results


# The benchmarks -------------------------------------------------------------------------------------------------------

every_count = pytest.mark.parametrize("count", COUNTS)
every_store = pytest.mark.parametrize("contender", [OURS, LANCE])
cold_and_warm = pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])


@pytest.mark.benchmark(timer=clock)
@every_count
@every_store
def test_ingest(benchmark: Any, count: int, contender: str) -> None:
    clock.into(benchmark, stores(count)[1], contender, group=f"write {count:,} items", baseline=LANCE)


@pytest.mark.benchmark(timer=clock)
@every_count
@cold_and_warm
@every_store
def test_load(benchmark: Any, count: int, cold: bool, contender: str) -> None:
    group = f"load {count:,} items, {'cold' if cold else 'warm'}"
    clock.into(benchmark, loaded(count, cold), contender, group=group, baseline=LANCE)


@pytest.mark.benchmark(timer=clock)
@every_count
@cold_and_warm
@every_store
def test_fetch(benchmark: Any, count: int, cold: bool, contender: str) -> None:
    group = f"fetch {FETCHED} of {count:,} items, {'cold' if cold else 'warm'}"
    clock.into(benchmark, fetched(count, cold), contender, group=group, baseline=LANCE)


@pytest.mark.benchmark(timer=clock)
@every_count
@pytest.mark.parametrize("contender", ["two-stage", "exact-int8", "exact", "Lance, all read for every query"])
def test_search(benchmark: Any, count: int, contender: str) -> None:
    group = f"best {BEST} of {count:,} items for 1 query"
    clock.into(benchmark, searched(count), contender, group=group, baseline="exact")


@pytest.mark.benchmark(timer=clock)
@every_count
@pytest.mark.parametrize("contender", [GLOBAL, WHOLE])
def test_global_search(benchmark: Any, count: int, contender: str) -> None:
    group = f"best {BEST} of {count:,} items for 1 query by the global cosine"
    clock.into(benchmark, searched_globally(count), contender, group=group, baseline=WHOLE)


@pytest.mark.benchmark(timer=clock)
@every_count
@pytest.mark.parametrize(
    "contender", [ALL, *(f"{name}, {use}" for name in FILTERS for use in ("a new filter", "the same filter again"))]
)
def test_filters(benchmark: Any, count: int, contender: str) -> None:
    group = f"best {BEST} of {count:,} items for 1 query, exact, with a filter"
    clock.into(benchmark, filtered(count), contender, group=group, baseline=ALL)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", ["two-stage", "exact-int8"])
def test_scenes(benchmark: Any, contender: str) -> None:
    group = f"best {BEST} of {SCENES:,} pictures of Scenes for 1 description"
    clock.into(benchmark, scenes(), contender, group=group, baseline="exact-int8")


every_first_stage = pytest.mark.parametrize(
    "contender", [EXACT, *(f"{name}, {label}" for name in FIRST_STAGES for label in ("100 candidates", "99.9 %"))]
)


@pytest.mark.benchmark(timer=clock)
@every_first_stage
def test_first_stages(benchmark: Any, contender: str) -> None:
    group = f"first stages, best {BEST} of {SCENES:,} pictures of Scenes for 1 description, alpha {ALPHA:g}"
    clock.into(benchmark, staged(), contender, group=group, baseline=EXACT)


@pytest.mark.benchmark(timer=clock)
@every_count
@every_first_stage
def test_first_stages_at_random(benchmark: Any, count: int, contender: str) -> None:
    group = f"first stages, best {BEST} of {count:,} random items for 1 query, alpha {ALPHA:g}"
    clock.into(benchmark, staged_at_random(count), contender, group=group, baseline=EXACT)
