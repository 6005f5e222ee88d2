"""Results of an evaluation: metrics with their intervals, and the ranks that they are computed from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finelip_fast._files import write_whole
from finelip_fast._json import read_json
from finelip_fast._terminal import printable
from finelip_fast._typed import typed
from finelip_fast.errors import InputError
from finelip_fast.metrics import SCORES, WAYS, bootstrap_interval, pair_summary, quality

_MAX_BYTES = 1 << 28  # about 70 bytes for each picture, caption, context and score


@dataclass(frozen=True)
class Row:
    """Measurements in one setting.

    Attributes:
        context_length: Longest caption in tokens.
        score: ``"global"``, ``"fine"`` or ``"combined"``.
        metrics: Metrics of ``i2t`` and of ``t2i``: ``recall@1``, ``@5``, ``@10`` and ``mrr`` in [0, 1], ``mean_rank``,
            ``median_rank``; with names such as ``i2t_recall@1``.
        intervals: 95 % bootstrap intervals ``(low, high)`` of recall and mrr; captions of one picture are drawn together.
        ranks: Ranks ``i2t`` of the pictures and ``t2i`` of the captions, in the order of the data; 1 is best.
    """

    context_length: int
    score: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    ranks: dict[str, list[int]]

    @classmethod
    def of(cls, context_length: int, score: str, ranks: Mapping[str, Tensor], picture_of: Tensor) -> Row:
        """Create a row from the ranks of both directions; ``picture_of`` ``[C]`` says which captions share a picture."""
        several = picture_of.unique().numel() < len(picture_of)
        metrics = pair_summary(ranks[way] for way in WAYS)
        intervals: dict[str, tuple[float, float]] = {}
        for name in metrics:
            way, _, metric = name.partition("_")
            groups = picture_of if way == "t2i" and several else None
            if metric.startswith("recall@"):
                hits = ranks[way] <= int(metric.removeprefix("recall@"))
                intervals[name] = bootstrap_interval(hits, groups=groups)
            elif metric == "mrr":
                intervals[name] = bootstrap_interval(ranks[way].double().reciprocal(), groups=groups)
        return cls(context_length, score, metrics, intervals, {way: values.tolist() for way, values in ranks.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ranks = {f"{way}_ranks": values for way, values in self.ranks.items()}
        return {
            "context_length": self.context_length,
            "score": self.score,
            **self.metrics,
            "intervals": self.intervals,
            **ranks,
        }


@dataclass(frozen=True)
class Sweep:
    """Record of how the weight of the global cosine was chosen.

    Attributes:
        data: Name of the validation pairs.
        pairs_fingerprint: Fingerprint of the validation pairs.
        pairs: Number of validation pairs.
        context_length: Longest caption in tokens.
        tried: Each weight ``alpha`` with recall@1 and mrr of both directions, such as ``i2t_recall@1``.
    """

    data: str
    pairs_fingerprint: str
    pairs: int
    context_length: int
    tried: list[dict[str, float]]

    @property
    def best(self) -> float:
        """The weight with the best mean recall@1 of both directions; ties go to the best mean mrr, then the smaller weight."""
        return max(self.tried, key=quality)["alpha"]


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`finelip_fast.evaluation.evaluate`.

    Attributes:
        data: Name of the pairs; empty if none was given.
        checkpoint, checkpoint_fingerprint: Source of the measured checkpoint, and the fingerprint of its weights.
        engine, precision, device: Engine, precision and device used, such as ``"torch"``, ``"fp32"``, ``"cpu"``.
        version: Version of this library.
        pairs_fingerprint: Fingerprint, equal for equal captions and names of pictures in equal order.
        pictures: Number of pictures.
        pairs: Number of captions; a picture may have several.
        picture_of: Index of each caption's picture.
        alpha: Weight of the global cosine in the combined score.
        sweep: Record of how alpha was chosen; None if it was not chosen.
        rows: Rows, one for each context and score.
        image_seconds, text_seconds: Time to read and encode all pictures, and all captions at the longest context.
    """

    data: str
    checkpoint: str
    checkpoint_fingerprint: str
    engine: str
    precision: str
    device: str
    version: str
    pairs_fingerprint: str
    pictures: int
    pairs: int
    picture_of: list[int]
    alpha: float
    sweep: Sweep | None
    rows: list[Row]
    image_seconds: float
    text_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sweep = self.sweep and {"chosen": self.sweep.best, **vars(self.sweep)}
        return {**vars(self), "sweep": sweep, "rows": [row.to_dict() for row in self.rows]}

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON, whole or not at all.

        Raises:
            WriteError: A file that cannot be written.
        """
        # A file name that is not valid UTF-8 contains halves of surrogate pairs, which JSON should not contain.
        content = json.dumps(self.to_dict(), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        write_whole(Path(path), lambda temporary: temporary.write_bytes(content))

    def __str__(self) -> str:
        heads = "".join(f"  {f'{way} R@1 [95 %]':20}{'R@5':>6}{'R@10':>6}{'MRR':>6}{'median':>7}" for way in WAYS)
        lines = [f"{'context':>7}{'score':>10}{heads}"]
        for row in self.rows:
            line = f"{row.context_length:7}{row.score:>10}"
            for way in WAYS:
                low, high = row.intervals[f"{way}_recall@1"]
                line += f"  {row.metrics[f'{way}_recall@1']:.3f} [{low:.3f}, {high:.3f}]"
                line += "".join(f"{row.metrics[f'{way}_{name}']:6.3f}" for name in ("recall@5", "recall@10", "mrr"))
                line += f"{row.metrics[f'{way}_median_rank']:7g}"
            lines.append(line)
        if self.sweep:
            pairs = f"{self.sweep.pairs} validation pairs {printable(self.sweep.data)}".rstrip()
            lines.append(f"alpha {self.alpha:g}: best of {len(self.sweep.tried)} on {pairs}")
        return "\n".join(lines)


def read_evaluation(path: str | Path) -> Evaluation:
    """Read a result that :meth:`Evaluation.save` wrote.

    Raises:
        InputError: Another file, no file, or one whose numbers do not follow from its ranks.
    """
    expected = "a result of finelip eval DATA --save FILE of this version"
    values = read_json(path, error=InputError, expected=expected, kind=dict, max_bytes=_MAX_BYTES)
    if isinstance(rows := values.get("rows"), list):
        values["rows"] = [_nested(row) if isinstance(row, dict) else row for row in rows]
    sweep = values.get("sweep")
    chosen = sweep.pop("chosen", None) if isinstance(sweep, dict) else None
    try:
        evaluation: Evaluation = typed(values, Evaluation)
        _check(evaluation)
        _require(not evaluation.sweep or chosen == evaluation.sweep.best, "'chosen' the best of what was tried", chosen)
    except ValueError as error:
        raise InputError(f"{path}: expected {expected} ({error}); run the evaluation again") from None
    return evaluation


def _nested(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a :class:`Row` from the output of :meth:`Row.to_dict`."""
    ranks = {way: row.pop(f"{way}_ranks", None) for way in WAYS}
    about: dict[str, Any] = {name: row.pop(name) for name in ("context_length", "score", "intervals") if name in row}
    return {**about, "ranks": ranks, "metrics": row}


def _check(evaluation: Evaluation) -> None:
    """Refuse values that no evaluation produces; their types have been checked already."""
    described = set(evaluation.picture_of)
    _require(
        len(evaluation.picture_of) == evaluation.pairs > 0,
        f"picture_of of {evaluation.pairs} captions",
        len(evaluation.picture_of),
    )
    _require(
        len(described) == evaluation.pictures and min(described) == 0 and max(described) == evaluation.pictures - 1,
        f"picture_of with each of the {evaluation.pictures} pictures",
        len(described),
    )
    _require(0 <= evaluation.alpha <= 1, "alpha in [0, 1]", evaluation.alpha)
    _require(
        min(evaluation.image_seconds, evaluation.text_seconds) >= 0, "times of at least 0 s", evaluation.image_seconds
    )
    _require(bool(evaluation.rows), "rows", evaluation.rows)
    kinds = [(row.context_length, row.score) for row in evaluation.rows]
    _require(len(set(kinds)) == len(kinds), "each context and score once", kinds)
    for row in evaluation.rows:
        _require(
            row.context_length >= 3 and row.score in SCORES,
            f"a context and one of {SCORES}",
            (row.context_length, row.score),
        )
        for way, count, targets in (
            ("i2t", evaluation.pictures, evaluation.pairs),
            ("t2i", evaluation.pairs, evaluation.pictures),
        ):
            ranks = row.ranks[way]
            _require(len(ranks) == count, f"{way} ranks of {count} queries", len(ranks))
            _require(
                min(ranks) >= 1 and max(ranks) <= targets, f"{way} ranks from 1 to {targets}", (min(ranks), max(ranks))
            )
        metrics = pair_summary(torch.tensor(row.ranks[way]) for way in WAYS)
        _require(
            row.metrics.keys() == metrics.keys()
            and all(math.isclose(row.metrics[name], value, rel_tol=1e-6) for name, value in metrics.items()),
            "metrics that follow from the ranks",
            row.metrics,
        )
        shares = {name for name in metrics if not name.endswith("_rank")}
        _require(row.intervals.keys() == shares, f"intervals of {sorted(shares)}", sorted(row.intervals))
        for low, high in row.intervals.values():
            _require(0 <= low <= high <= 1, "intervals (low, high) in [0, 1]", (low, high))
    if sweep := evaluation.sweep:
        names = {"alpha", *(f"{way}_{name}" for way in WAYS for name in ("recall@1", "mrr"))}
        _require(
            sweep.pairs > 0 and sweep.context_length >= 3,
            "a sweep of pairs at a context",
            (sweep.pairs, sweep.context_length),
        )
        _require(bool(sweep.tried), "weights that were tried", sweep.tried)
        for tried in sweep.tried:
            fits = tried.keys() == names and all(0 <= value <= 1 for value in tried.values())
            _require(fits, f"{sorted(names)} in [0, 1]", tried)
        _require(evaluation.alpha == sweep.best, f"the best alpha of the sweep, {sweep.best}", evaluation.alpha)


def _require(condition: bool, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"expected {expected}, found {value!r:.80}")
