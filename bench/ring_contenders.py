"""Token-level search indexes for the ring, each with the same four methods.

Only NumPy is imported here; a contender's process imports its own packages. Contenders that answer one way support only
MaxSim: the sum, over the rows of the query, of the largest product with a row of the item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BOTH_WAYS, ONE_WAY = "both ways", "one way"
LEAST = (50, 100, 200, 400, 800, 1_600, 3_200)

Floats = npt.NDArray[np.floating[Any]]


class Contender:
    """An index. It is built in one process, and searched in another that opens its folder.

    Attributes:
        package, modules: Name of the package, as installed, and the modules imported from it and beside it.
        answers: Definition of the ten best: ``BOTH_WAYS`` or ``ONE_WAY``.
        knob: Name of the setting that trades speed for agreement; empty if there is none.
        efforts: Settings of the knob, from fast to thorough.
    """

    package = ""
    modules: Sequence[str] = ()
    answers = BOTH_WAYS
    knob = ""
    efforts: Sequence[int] = (0,)

    def about(self) -> dict[str, Any]:
        """Import the packages, and return what the race has to know."""
        for module in self.modules:
            import_module(module)
        about = {"answers": self.answers, "knob": self.knob, "efforts": list(self.efforts)}
        return about | {"package": self.package, "version": version(self.package)}

    def build(self, items: Path, folder: Path, alpha: float) -> None:
        """Write an index of ``items``, a file of float16 ``[N, L, D]``, to an empty folder."""
        raise NotImplementedError

    def open(self, folder: Path, alpha: float) -> None:
        raise NotImplementedError

    def search(self, query: Floats, k: int, effort: int) -> list[int]:
        """Return the numbers of the ``k`` best items for a query ``[L, D]`` of float32, best first."""
        raise NotImplementedError


class Ours(Contender):
    """The library's index in a folder, searched in one of its modes."""

    package, modules = "finelip-fast", ("finelip_fast.index",)

    def __init__(self, mode: str, efforts: Sequence[int] = (0,), **options: Any) -> None:
        self.mode, self.efforts, self.options = mode, efforts, options
        self.knob = "candidates" if len(efforts) > 1 else ""

    def build(self, items: Path, folder: Path, alpha: float) -> None:
        import torch

        from finelip_fast.index import Index, IndexSpec

        rows = torch.from_numpy(np.load(items))
        with Index(IndexSpec("ring", rows.shape[1], rows.shape[2], alpha), folder) as index:
            for first in range(0, len(rows), 20_000):
                part = rows[first : first + 20_000]
                index.add([str(first + number) for number in range(len(part))], part, [{}] * len(part))
            index.maintain()
            index.search(rows[:1].float(), 1, mode=self.mode, **self.options)  # creates the copies that the mode reads

    def open(self, folder: Path, alpha: float) -> None:
        from finelip_fast.index import Index
        from finelip_fast.index.spec import stored_spec

        stored = stored_spec(folder)
        assert stored is not None
        self.index = Index(stored[0], folder)

    def search(self, query: Floats, k: int, effort: int) -> list[int]:
        import torch

        options = self.options | ({"candidates": effort} if effort else {})
        results = self.index.search(torch.from_numpy(query)[None], k, mode=self.mode, **options)
        numbers: list[int] = results.numbers[0].tolist()
        return numbers


class PlainTorch(Contender):
    """All scores by careful plain PyTorch, with as many items at once as suit the caches."""

    package, modules = "torch", ("baselines",)

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def build(self, items: Path, folder: Path, alpha: float) -> None:
        np.save(folder / "items.npy", np.load(items))

    def open(self, folder: Path, alpha: float) -> None:
        import torch
        from baselines import images_that_suit

        self.alpha = alpha
        self.items = torch.from_numpy(np.load(folder / "items.npy")).to(getattr(torch, self.dtype))
        self.at_once = images_that_suit(self.items, self.items[:1])

    def search(self, query: Floats, k: int, effort: int) -> list[int]:
        import torch
        from baselines import plain_torch

        caption = torch.from_numpy(query)[None].to(self.items.dtype)
        with torch.inference_mode():
            scores = plain_torch(self.items, caption, alpha=self.alpha, at_once=1, images_at_once=self.at_once)
            numbers: list[int] = scores[:, 0].topk(k).indices.tolist()
        return numbers


class SentenceTransformers(Contender):
    """``semantic_search`` of sentence-transformers with its ``maxsim``: exact, in memory."""

    package, modules, answers = "sentence-transformers", ("sentence_transformers.util",), ONE_WAY

    def build(self, items: Path, folder: Path, alpha: float) -> None:
        np.save(folder / "items.npy", np.load(items))

    def open(self, folder: Path, alpha: float) -> None:
        import torch

        self.items = torch.from_numpy(np.load(folder / "items.npy")).float()

    def search(self, query: Floats, k: int, effort: int) -> list[int]:
        import torch
        from sentence_transformers.util import maxsim, semantic_search

        with torch.inference_mode():
            hits = semantic_search(torch.from_numpy(query)[None], self.items, top_k=k, score_function=maxsim)
        return [hit["corpus_id"] for hit in hits[0]]


class Usearch(Contender):
    """A graph of global rows; on its own it answers neither way."""

    package, modules = "usearch", ("usearch.index",)

    def build(self, items: Path, folder: Path, alpha: float) -> None:
        from usearch.index import Index

        rows = np.load(items)[:, 0]
        index = Index(ndim=rows.shape[1], metric="ip", dtype="f16")
        index.add(np.arange(len(rows)), rows)
        index.save(str(folder / "graph.usearch"))

    def open(self, folder: Path, alpha: float) -> None:
        from usearch.index import Index

        self.index = Index.restore(str(folder / "graph.usearch"))

    def search(self, query: Floats, k: int, effort: int) -> list[int]:
        self.index.expansion_search = 2 * k
        keys: list[int] = self.index.search(query[0].astype(np.float16), k).keys.tolist()
        return keys


class FastPlaid(Contender):
    """PLAID of fast-plaid, which is also PyLate's index: centroids and 4-bit residuals."""

    package, modules, answers = "fast-plaid", ("fast_plaid.search",), ONE_WAY
    knob, efforts = "n_ivf_probe", (8, 16, 32, 64, 128)

    def build(self, items: Path, folder: Path, alpha: float) -> None:
        import torch
        from fast_plaid.search import FastPlaid as Index

        Index(str(folder), device="cpu").create(list(torch.from_numpy(np.load(items)).float()))

    def open(self, folder: Path, alpha: float) -> None:
        from fast_plaid.search import FastPlaid as Index

        self.index = Index(str(folder), device="cpu")

    def search(self, query: Floats, k: int, effort: int) -> list[int]:
        import torch

        probes = {"n_ivf_probe": effort, "n_full_scores": max(4_096, 8 * k)}
        hits = self.index.search(torch.from_numpy(query)[None], top_k=k, show_progress=False, **probes)
        return [number for number, _ in hits[0]]


class Lance(Contender):
    """A LanceDB table with a multivector column, with or without an index."""

    package, modules, answers = "lancedb", ("lancedb.index", "pyarrow"), ONE_WAY

    def __init__(self, index: str | None) -> None:
        self.kind = index
        # A row is scored by the hits of each query vector: it takes many hits for the best rows to be among them.
        self.knob, self.efforts = ("hits a vector", LEAST) if index else ("", (0,))

    def build(self, items: Path, folder: Path, alpha: float) -> None:
        import lancedb
        import pyarrow as pa

        rows = np.load(items).astype(np.float32)  # float16 distances took several times as long
        count, tokens, width = rows.shape
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), width)
        bags = pa.ListArray.from_arrays(pa.array(np.arange(0, tokens * count + 1, tokens, dtype=np.int32)), vectors)
        table = lancedb.connect(folder).create_table("items", pa.table({"number": np.arange(count), "rows": bags}))
        if self.kind:
            table.create_index(
                "rows", config=getattr(import_module("lancedb.index"), self.kind)(distance_type="cosine")
            )

    def open(self, folder: Path, alpha: float) -> None:
        import lancedb

        self.table = lancedb.connect(folder).open_table("items")

    def search(self, query: Floats, k: int, effort: int) -> list[int]:
        request = self.table.search(query, vector_column_name="rows").distance_type("cosine").select(["number"])
        if effort:
            request = request.nprobes(20).refine_factor(1)
        numbers: list[int] = request.limit(max(k, effort)).to_arrow()["number"].to_pylist()[:k]
        return numbers


class QdrantEdge(Contender):
    """Qdrant in this process, comparing multivectors by ``MAX_SIM``: all of them, or the nearest by global row."""

    package, modules, answers = "qdrant-edge-py", ("qdrant_edge",), ONE_WAY

    def __init__(self, efforts: Sequence[int] = (0,)) -> None:
        self.efforts = efforts
        self.knob = "candidates" if len(efforts) > 1 else ""

    def build(self, items: Path, folder: Path, alpha: float) -> None:
        import qdrant_edge as qdrant

        rows = np.load(items)
        half = qdrant.VectorStorageDatatype.Float16
        no_graph = qdrant.HnswIndexConfig(m=0, ef_construct=100, full_scan_threshold=10_000)
        several = qdrant.MultiVectorConfig(qdrant.MultiVectorComparator.MaxSim)
        params = partial(qdrant.EdgeVectorParams, rows.shape[2], qdrant.Distance.Dot, datatype=half)
        vectors = {"tokens": params(multivector_config=several, hnsw_config=no_graph)}
        if self.knob:
            vectors["global"] = params()
        shard = qdrant.EdgeShard.create(str(folder), qdrant.EdgeConfig(vectors=vectors))
        for first in range(0, len(rows), 1_000):
            points = []
            for number, tokens in enumerate(rows[first : first + 1_000].tolist(), start=first):
                stored = {"tokens": tokens, "global": tokens[0]} if self.knob else {"tokens": tokens}
                points.append(qdrant.Point(number, stored, None))
            shard.update(qdrant.UpdateOperation.upsert_points(points))
        shard.optimize()
        shard.flush()
        shard.close()

    def open(self, folder: Path, alpha: float) -> None:
        import qdrant_edge as qdrant

        self.shard = qdrant.EdgeShard.load(str(folder))

    def search(self, query: Floats, k: int, effort: int) -> list[int]:
        import qdrant_edge as qdrant

        by_tokens = qdrant.Query.Nearest(query.tolist(), using="tokens")
        if not effort:
            everything = qdrant.SearchParams(exact=True)
            points = self.shard.query(qdrant.QueryRequest(k, query=by_tokens, params=everything))
        else:
            by_global = qdrant.Query.Nearest(query[0].tolist(), using="global")
            nearest = qdrant.Prefetch(effort, query=by_global)
            points = self.shard.query(qdrant.QueryRequest(k, query=by_tokens, prefetches=[nearest]))
        return [point.id for point in points]


class QdrantLocal(Contender):
    """qdrant-client without a server: NumPy, in memory."""

    package, modules, answers = "qdrant-client", ("qdrant_client",), ONE_WAY

    def build(self, items: Path, folder: Path, alpha: float) -> None:
        from qdrant_client import QdrantClient, models

        rows = np.load(items).astype(np.float32)
        client = QdrantClient(path=str(folder))
        several = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        params = models.VectorParams(size=rows.shape[2], distance=models.Distance.DOT, multivector_config=several)
        client.create_collection("items", vectors_config=params)
        points = (models.PointStruct(id=number, vector=tokens.tolist()) for number, tokens in enumerate(rows))
        client.upload_points("items", points)
        client.close()

    def open(self, folder: Path, alpha: float) -> None:
        from qdrant_client import QdrantClient

        self.client = QdrantClient(path=str(folder))

    def search(self, query: Floats, k: int, effort: int) -> list[int]:
        return [point.id for point in self.client.query_points("items", query=query.tolist(), limit=k).points]


class Rescored(Contender):
    """Candidates of a peer, scored both ways with float16 rows of a mapped file.

    Args:
        first: Contender that supplies the candidates, at its ``effort``.
    """

    knob, efforts = "candidates", LEAST

    def __init__(self, first: Contender, effort: int = 0) -> None:
        self.first, self.effort, self.package, self.modules = first, effort, first.package, first.modules

    def build(self, items: Path, folder: Path, alpha: float) -> None:
        (folder / "first").mkdir()
        self.first.build(items, folder / "first", alpha)
        np.save(folder / "items.npy", np.load(items))

    def open(self, folder: Path, alpha: float) -> None:
        self.first.open(folder / "first", alpha)
        self.items, self.alpha = np.load(folder / "items.npy", mmap_mode="r"), alpha

    def search(self, query: Floats, k: int, effort: int) -> list[int]:
        candidates = np.asarray(self.first.search(query, effort, self.effort))
        scores = both_ways(query, self.items[candidates].astype(np.float32), self.alpha)
        best: list[int] = candidates[np.argsort(-scores, kind="stable")[:k]].tolist()
        return best


def both_ways(query: Floats, items: Floats, alpha: float) -> Floats:
    """Return scores ``[n]`` of a query ``[L_q, D]`` and items ``[n, L_i, D]``, by the formula of the method."""
    similarity = (items.reshape(-1, items.shape[2]) @ query.T).reshape(len(items), -1, len(query))  # [n, L_i, L_q]
    maxima = similarity.max(axis=1), similarity.max(axis=2)
    fine = sum(np.where(part < 0, 0.1 * part, part).mean(axis=1) for part in maxima)
    scores: Floats = alpha * similarity[:, 0, 0] + (1 - alpha) * fine
    return scores


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "finelip_fast, exact": partial(Ours, "exact"),
    "finelip_fast, exact by int8": partial(Ours, "exact-int8"),
    "finelip_fast, two stages": partial(Ours, "two-stage", LEAST),
    "finelip_fast, two stages by sketches": partial(Ours, "sketch", LEAST),
    "plain torch, float32": partial(PlainTorch, "float32"),
    "plain torch, bfloat16": partial(PlainTorch, "bfloat16"),
    "usearch of global rows, scored again": lambda: Rescored(Usearch()),
    "fast-plaid": FastPlaid,
    "fast-plaid, scored again": lambda: Rescored(FastPlaid(), effort=32),
    "LanceDB, IVF_PQ": partial(Lance, "IvfPq"),
    "LanceDB, no index": partial(Lance, None),
    "Qdrant Edge, every item": QdrantEdge,
    "Qdrant Edge, nearest by global rows": partial(QdrantEdge, LEAST),
    "qdrant-client, local": QdrantLocal,
    "sentence-transformers": SentenceTransformers,
}
