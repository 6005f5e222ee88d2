"""Recall of a checkpoint on pairs of pictures and captions."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast._errors import InputError
from finelip_fast.datasets import PairDataset
from finelip_fast.engines import Engine
from finelip_fast.evaluation.ranking import tiled_ranks
from finelip_fast.metrics import bootstrap_interval, summary
from finelip_fast.tokenizer import expected_truncation

_SWEEP = tuple(round(0.05 * step, 2) for step in range(21))


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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ranks = {f"{way}_ranks": values for way, values in self.ranks.items()}
        return {"context": self.context, "score": self.score, **self.metrics, "intervals": self.intervals, **ranks}


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes:
        checkpoint, engine: What was measured, and on what.
        pairs_fingerprint: Equal for equal pictures' names and captions in equal order.
        pictures: How many.
        pairs: How many captions; a picture may have several.
        alpha: Weight of the global cosine in the combined score.
        sweep: Mean recall@1 of both directions on the validation pairs for each weight that was tried; empty: none was.
        rows: One for each context and score.
        image_seconds, text_seconds: Time to read and encode all pictures, and all captions at the longest context.
    """

    checkpoint: str
    engine: str
    pairs_fingerprint: str
    pictures: int
    pairs: int
    alpha: float
    sweep: dict[float, float]
    rows: list[Row]
    image_seconds: float
    text_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        names = [f"{way}_{name}" for way in ("i2t", "t2i") for name in ("recall@1", "recall@5", "recall@10", "mrr")]
        heads = [name.replace("_recall", " R").replace("_mrr", " MRR") for name in names]
        lines = [
            "".join([f"{'context':>7}{'score':>10}", *(f"{head:>9}" for head in heads), "  median ranks  95 % of R@1"])
        ]
        for row in self.rows:
            values = (f"{row.metrics[name]:9.3f}" for name in names)
            medians = " / ".join(f"{row.metrics[f'{way}_median_rank']:g}" for way in ("i2t", "t2i"))
            within = ", ".join("{:.3f} to {:.3f}".format(*row.intervals[f"{way}_recall@1"]) for way in ("i2t", "t2i"))
            lines.append("".join([f"{row.context:7}{row.score:>10}", *values, f"{medians:>14}  {within}"]))
        if self.sweep:
            lines.append(f"alpha {self.alpha:g} was the best of {len(self.sweep)} on the validation pairs")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Embedded:
    """Embedded pictures ``[P, L, D]``, captions, and the row of each caption's picture."""

    images: Tensor
    captions: list[str]
    picture_of: Tensor
    fingerprint: str


def evaluate(
    engine: Engine,
    pairs: PairDataset,
    *,
    contexts: Sequence[int] = (),
    alpha: float | None = None,
    validation: PairDataset | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Rank all pictures for each caption and all captions for each picture.

    Args:
        engine: The encoders.
        pairs: What belongs together; pairs of one ``image_id`` share the picture, which is found at ``k`` when any of its
            captions is.
        contexts: Caption lengths in tokens to cut at; none: the model's own.
        alpha: Weight of the global cosine in the combined score; None: the model's own.
        validation: Other pairs, on which the weight is chosen in place of ``alpha``: of 0, 0.05 .. 1 the one with the best
            mean recall@1 of both directions, of equals the one with the best mean reciprocal rank.
        batch_size: Pictures or captions at once.
        progress: Show a progress bar.

    Returns:
        Ranks and metrics with the global cosine alone, late interaction alone, and both. Ties count against us. The scores are
        never all in memory; the embeddings are.

    Raises:
        InputError: No pairs, a context below 3 or longer than the model's, an alpha outside [0, 1], both ``alpha`` and
            ``validation``, or validation pairs that are the measured ones.
        ImageError: A picture that cannot be read.
    """
    contexts = sorted(set(contexts)) or [engine.config.context_length]
    if not len(pairs):
        raise InputError("expected at least one pair to evaluate, got none")
    longest = engine.config.context_length
    if contexts[0] < 3 or contexts[-1] > longest:
        raise InputError(f"expected contexts from 3 to the model's {longest} tokens, got {contexts}")
    if alpha is not None and validation is not None:
        raise InputError("expected alpha or validation pairs to choose it on, got both")
    alpha = engine.alpha if alpha is None else alpha
    if not 0 <= alpha <= 1:
        raise InputError(f"expected alpha in [0, 1], got {alpha}")
    started = time.perf_counter()
    data = _embed(engine, pairs, batch_size, progress)
    image_seconds, rows = time.perf_counter() - started, []
    sweep: dict[float, float] = {}
    if validation is not None:
        alpha, sweep = _choose_alpha(engine, validation, data.fingerprint, contexts[-1], batch_size, progress)
    for context in contexts:
        started = time.perf_counter()
        texts = _embed_texts(engine, data, context, batch_size)
        text_seconds = time.perf_counter() - started
        found = tiled_ranks(data.images, texts, data.picture_of, (1.0, 0.0, alpha), progress=progress)
        for score, (i2t, t2i) in zip(("global", "fine", "combined"), found, strict=True):
            rows.append(_row(context, score, {"i2t": i2t, "t2i": t2i}, data.picture_of))
    return Evaluation(
        checkpoint=engine.source or "bundled",
        engine=f"{engine.name}, {engine.description}",
        pairs_fingerprint=data.fingerprint,
        pictures=len(data.images),
        pairs=len(pairs),
        alpha=alpha,
        sweep=sweep,
        rows=rows,
        image_seconds=image_seconds,
        text_seconds=text_seconds,
    )


def _embed(engine: Engine, pairs: PairDataset, batch_size: int, progress: bool) -> _Embedded:
    captions: list[str] = []
    picture_of: list[int] = []
    numbers: dict[str, int] = {}
    blocks = []
    fingerprint = hashlib.sha256()
    for first in tqdm(range(0, len(pairs), batch_size), unit="batch", disable=not progress, mininterval=0.5):
        examples = [pairs[index] for index in range(first, min(first + batch_size, len(pairs)))]
        captions += [example.caption for example in examples]
        new = {example.image_id: example.image for example in examples if example.image_id not in numbers}
        numbers |= {name: len(numbers) + number for number, name in enumerate(new)}
        picture_of += [numbers[example.image_id] for example in examples]
        if new:
            blocks.append(engine.embed_images(list(new.values()), batch_size=batch_size))
    # Folders differ between machines: which caption is whose counts, not what the pictures are called.
    fingerprint.update(repr((captions, picture_of)).encode())
    return _Embedded(torch.cat(blocks), captions, torch.tensor(picture_of), fingerprint.hexdigest())


def _embed_texts(engine: Engine, data: _Embedded, context: int, batch_size: int) -> Tensor:
    with expected_truncation():
        return engine.embed_texts(data.captions, batch_size=batch_size, context_length=context)


def _choose_alpha(
    engine: Engine, validation: PairDataset, measured: str, context: int, batch_size: int, progress: bool
) -> tuple[float, dict[float, float]]:
    if not len(validation):
        raise InputError("expected at least one validation pair to choose alpha on, got none")
    data = _embed(engine, validation, batch_size, progress)
    if data.fingerprint == measured:
        raise InputError("expected validation pairs other than the measured ones: alpha would be chosen on the test")
    texts = _embed_texts(engine, data, context, batch_size)
    found = tiled_ranks(data.images, texts, data.picture_of, _SWEEP, progress=progress)
    means = {
        alpha: tuple(sum(summary(way)[name] for way in ways) / 2 for name in ("recall@1", "mrr"))
        for alpha, ways in zip(_SWEEP, found, strict=True)
    }
    return max(means, key=lambda alpha: means[alpha]), {alpha: recall for alpha, (recall, _) in means.items()}


def _row(context: int, score: str, ranks: dict[str, Tensor], picture_of: Tensor) -> Row:
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for way, own in ranks.items():
        groups = picture_of if way == "t2i" else None
        for name, value in summary(own).items():
            metrics[f"{way}_{name}"] = value
            if name.startswith("recall@"):
                intervals[f"{way}_{name}"] = bootstrap_interval(own <= int(name.removeprefix("recall@")), groups=groups)
            elif name == "mrr":
                intervals[f"{way}_{name}"] = bootstrap_interval(own.double().reciprocal(), groups=groups)
    return Row(context, score, metrics, intervals, {way: own.tolist() for way, own in ranks.items()})
