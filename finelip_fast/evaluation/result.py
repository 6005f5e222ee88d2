"""What an evaluation found: metrics with their intervals, and the ranks that they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finelip_fast._errors import InputError, StoreError
from finelip_fast._files import write_whole
from finelip_fast.metrics import bootstrap_interval, quality, summary

WAYS = ("i2t", "t2i")


@dataclass(frozen=True)
class Row:
    """What was measured in one setting.

    Attributes:
        context: Longest caption in tokens.
        score: ``"global"``, ``"fine"`` or ``"combined"``.
        metrics: For each of ``i2t`` and ``t2i``: ``recall@1``, ``@5``, ``@10`` and ``mrr`` in [0, 1], ``mean_rank``,
            ``median_rank``; as ``i2t_recall@1``.
        intervals: Of recall and mrr, 95 % bootstrap intervals ``(low, high)``; captions of one picture are drawn together.
        ranks: ``i2t`` of the pictures and ``t2i`` of the captions, in the order of the data; 1 is best.
    """

    context: int
    score: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    ranks: dict[str, list[int]]

    @classmethod
    def of(cls, context: int, score: str, ranks: Mapping[str, Tensor], picture_of: Tensor) -> Row:
        """The row of both directions' ranks; ``picture_of`` ``[C]`` says which captions share a picture."""
        several = picture_of.unique().numel() < len(picture_of)
        metrics: dict[str, float] = {}
        intervals: dict[str, tuple[float, float]] = {}
        for way, own in ranks.items():
            groups = picture_of if way == "t2i" and several else None
            for name, value in summary(own).items():
                metrics[f"{way}_{name}"] = value
                if name.startswith("recall@"):
                    hits = own <= int(name.removeprefix("recall@"))
                    intervals[f"{way}_{name}"] = bootstrap_interval(hits, groups=groups)
                elif name == "mrr":
                    intervals[f"{way}_{name}"] = bootstrap_interval(own.double().reciprocal(), groups=groups)
        return cls(context, score, metrics, intervals, {way: own.tolist() for way, own in ranks.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ranks = {f"{way}_ranks": values for way, values in self.ranks.items()}
        return {"context": self.context, "score": self.score, **self.metrics, "intervals": self.intervals, **ranks}


@dataclass(frozen=True)
class Sweep:
    """How the weight of the global cosine was chosen.

    Attributes:
        data: What the validation pairs are called.
        pairs_fingerprint: Theirs.
        pairs: How many.
        context: Longest caption in tokens.
        tried: For each weight ``alpha``, with recall@1 and mrr of both directions, as ``i2t_recall@1``.
    """

    data: str
    pairs_fingerprint: str
    pairs: int
    context: int
    tried: list[dict[str, float]]

    @property
    def best(self) -> float:
        """The weight of the best mean recall@1 of both directions; of equals, of the best mean mrr; then the smaller."""
        return max(self.tried, key=quality)["alpha"]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`finelip_fast.evaluation.evaluate` measured.

    Attributes:
        data: What the pairs are called; empty where no one said.
        checkpoint, checkpoint_fingerprint: What was measured: where it was opened from, and what identifies its weights.
        engine, precision, device: On what: ``"torch"``, ``"fp32"``, ``"cpu"``.
        version: Of this library.
        pairs_fingerprint: Equal for equal captions and names of pictures in equal order.
        pictures: How many.
        pairs: How many captions; a picture may have several.
        picture_of: Number of each caption's picture.
        alpha: Weight of the global cosine in the combined score.
        sweep: How it was chosen; None where it was not.
        rows: One for each context and score.
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
            StoreError: A file that cannot be written.
        """
        path, text = Path(path), json.dumps(self.to_dict()) + "\n"
        try:
            write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from error

    def __str__(self) -> str:
        heads = "".join(f"  {f'{way} R@1 [95 %]':20}{'R@5':>6}{'R@10':>6}{'MRR':>6}{'median':>7}" for way in WAYS)
        lines = [f"{'context':>7}{'score':>10}{heads}"]
        for row in self.rows:
            line = f"{row.context:7}{row.score:>10}"
            for way in WAYS:
                low, high = row.intervals[f"{way}_recall@1"]
                line += f"  {row.metrics[f'{way}_recall@1']:.3f} [{low:.3f}, {high:.3f}]"
                line += "".join(f"{row.metrics[f'{way}_{name}']:6.3f}" for name in ("recall@5", "recall@10", "mrr"))
                line += f"{row.metrics[f'{way}_median_rank']:7g}"
            lines.append(line)
        if self.sweep:
            tried = f"best of {len(self.sweep.tried)} on {self.sweep.pairs} validation pairs {self.sweep.data}".rstrip()
            lines.append(f"alpha {self.alpha:g}: {tried}")
        return "\n".join(lines)


def read_evaluation(path: str | Path) -> Evaluation:
    """What :meth:`Evaluation.save` wrote.

    Raises:
        InputError: Another file, or none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [_row(one) for one in found.pop("rows")]
        if sweep := found.pop("sweep"):
            del sweep["chosen"]
        evaluation = Evaluation(**found, rows=rows, sweep=Sweep(**sweep) if sweep else None)
        sizes = {"i2t": evaluation.pictures, "t2i": evaluation.pairs}
        for row in rows:
            if {way: len(ranks) for way, ranks in row.ranks.items()} != sizes:
                raise ValueError(f"expected ranks of {sizes} queries")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: expected a result of finelip eval DATA --out FILE of this version ({error}); evaluate anew"
        ) from None
    return evaluation


def _row(values: dict[str, Any]) -> Row:
    ranks = {way: values.pop(f"{way}_ranks") for way in WAYS}
    intervals = {name: (low, high) for name, (low, high) in values.pop("intervals").items()}
    return Row(values.pop("context"), values.pop("score"), values, intervals, ranks)
