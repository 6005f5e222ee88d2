"""Recall, bytes and search time by number and precision of the aggregated tokens kept."""

from __future__ import annotations

from contextlib import closing
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from finelip_fast.engines import Engine
from finelip_fast.index import Index, IndexSpec, StoredDtype
from finelip_fast.metrics import bootstrap_interval, summary
from finelip_fast.records import Plot, Record, Series, Table
from finelip_fast.studies.setting import Pairs, Setting, median_ms

_DTYPES: tuple[StoredDtype, ...] = ("float16", "int8")
_HITS = 10
_QUERIES = 50  # timed queries


def most_matched(pairs: Pairs, texts: Tensor) -> Tensor:
    """Sort rows of embeddings by use: row 0, then those that win most often within matching pairs, on either side.

    Both sides share one order: trained aggregators pair up, and a row without its partner on the other side is of little use.

    Args:
        pairs: Pairs with pictures ``[P, L, D]``.
        texts: Embeddings ``[C, L, D]`` of their captions.

    Returns:
        int64 ``[L]``.
    """
    images = pairs.images[pairs.owners.to(pairs.images.device)]
    cosines = texts.float() @ images.float().transpose(1, 2)
    winners = torch.cat([cosines.argmax(dim=side).flatten().cpu() for side in (1, 2)])
    uses = torch.bincount(winners, minlength=images.shape[1])
    uses[0] = int(uses.sum()) + 1
    return uses.argsort(descending=True, stable=True)


def tokens(engine: Engine, setting: Setting) -> Record:
    """Search the pictures with the captions, with fewer aggregated tokens than were trained, in each precision.

    Rows are left out of trained embeddings without retraining: a model trained with fewer may do better. The rows kept are
    those that win most often in the validation pairs.

    Raises:
        InputError: The checkpoint has no trained aggregators.
    """
    setting.refuse_untrained(engine)
    known = setting.embed(engine, setting.validation)
    order = most_matched(known, engine.embed_texts(known.captions))
    pairs = setting.embed(engine)
    texts = engine.embed_texts(pairs.captions)
    trained = len(order) - 1
    counts = sorted({0, 1, 2, 4, 8, 16, 32, trained} & set(range(trained + 1)))
    rows: list[dict[str, Any]] = []
    series = []
    for dtype in _DTYPES:
        recalls, bounds = [], []
        for count in counts:
            best_rows = order[: count + 1].sort().values
            images, queries = pairs.images[:, best_rows], texts[:, best_rows]
            alpha = engine.alpha if count else 1.0
            spec = IndexSpec(engine.fingerprint, count + 1, engine.config.embed_dim, alpha, dtype)
            with TemporaryDirectory() as folder, closing(Index(spec, folder, device=engine.device)) as index:
                empty = _bytes(folder)
                index.add([str(number) for number in range(len(images))], images, [{}] * len(images))
                size = (_bytes(folder) - empty) / len(images)
                neighbours = index.search(queries, min(_HITS, len(images)), mode="exact").numbers.cpu()
                milliseconds = _search_ms(index, queries)
            right = neighbours == pairs.owners[:, None]
            ranks = torch.where(right.any(dim=1), right.int().argmax(dim=1) + 1, len(images) + 1)
            recall = summary(ranks)
            recalls.append(100 * recall["recall@1"])
            bounds.append([100 * bound for bound in bootstrap_interval(ranks <= 1, groups=pairs.owners)])
            rows.append(
                {"aggregated tokens": count, "precision": dtype}
                | {f"t2i R@{k} (%)": round(100 * recall[f"recall@{k}"], 1) for k in (1, 5, 10)}
                | {"bytes an item": round(size), "1 search (ms)": milliseconds}
            )
        low, high = map(list, zip(*bounds, strict=True))
        series.append(Series(dtype, counts, recalls, low, high))
    half = {row["aggregated tokens"]: row["t2i R@1 (%)"] for row in rows if row["precision"] == "float16"}
    small = {row["aggregated tokens"]: row["t2i R@1 (%)"] for row in rows if row["precision"] == "int8"}
    finding = (
        f"Text to image, recall@1 is {half[trained]:.1f} % with all {trained} aggregated tokens, {half[0]:.1f} % with none; "
        f"int8 instead of float16 changes it by {small[trained] - half[trained]:+.1f} points. "
        "Rows were left out, not trained away."
    )
    about = setting.about(engine, validation=setting.validation, pictures=len(pairs.images))
    plots = (Plot("recall", "aggregated tokens kept", "text to image, recall@1 (%)", tuple(series)),)
    return Record("tokens", "What aggregated tokens are worth", (Table("Search", rows),), plots, about, finding)


def _search_ms(index: Index, queries: Tensor) -> float:
    turn = cycle(queries.split(1))
    return median_ms(lambda: index.search(next(turn), 1, mode="exact"), _QUERIES)


def _bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
