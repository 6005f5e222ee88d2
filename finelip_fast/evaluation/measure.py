"""Recall of a checkpoint on pairs of pictures and captions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from finelip_fast._errors import InputError
from finelip_fast.datasets import PairDataset
from finelip_fast.engines import Engine
from finelip_fast.kernels import clim_scores
from finelip_fast.metrics import pair_ranks, summary
from finelip_fast.tokenizer import expected_truncation


@dataclass(frozen=True)
class Row:
    """Recall in one setting.

    Attributes:
        context: Longest caption in tokens.
        score: ``"global"``, ``"fine"`` or ``"combined"``.
        metrics: ``i2t_recall@k`` and ``t2i_recall@k``, in [0, 1].
    """

    context: int
    score: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes:
        pictures: How many.
        pairs: How many captions; a picture may have several.
        alpha: Weight of the global cosine in the combined score.
        rows: One for each context and score.
        image_seconds, text_seconds: Time to read and encode all pictures, and all captions at the longest context.
    """

    pictures: int
    pairs: int
    alpha: float
    rows: list[Row]
    image_seconds: float
    text_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [{"context": row.context, "score": row.score, **row.metrics} for row in self.rows]
        return {**vars(self), "rows": rows}

    def __str__(self) -> str:
        names = list(self.rows[0].metrics)
        heads = [name.replace("_recall", " R") for name in names]
        lines = [" ".join(f"{head:>9}" for head in ["context", "score", *heads])]
        for row in self.rows:
            values = (f"{row.metrics[name]:9.3f}" for name in names)
            lines.append(" ".join([f"{row.context:>9}", f"{row.score:>9}", *values]))
        return "\n".join(lines)


def evaluate(
    engine: Engine,
    pairs: PairDataset,
    *,
    contexts: Sequence[int] = (),
    alpha: float | None = None,
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
        batch_size: Pictures or captions at once.
        progress: Show a progress bar.

    Returns:
        Recall with the global cosine alone, late interaction alone, and both. Ties count against us.

    Raises:
        InputError: No pairs, a context below 3 or longer than the model's, or an alpha outside [0, 1].
        ImageError: A picture that cannot be read.
    """
    contexts = sorted(set(contexts)) or [engine.config.context_length]
    if not len(pairs):
        raise InputError("expected at least one pair to evaluate, got none")
    longest = engine.config.context_length
    if contexts[0] < 3 or contexts[-1] > longest:
        raise InputError(f"expected contexts from 3 to the model's {longest} tokens, got {contexts}")
    alpha = engine.alpha if alpha is None else alpha
    if not 0 <= alpha <= 1:
        raise InputError(f"expected alpha in [0, 1], got {alpha}")
    started = time.perf_counter()
    captions: list[str] = []
    picture_of: list[int] = []
    numbers: dict[str, int] = {}
    blocks = []
    for first in tqdm(range(0, len(pairs), batch_size), unit="batch", disable=not progress, mininterval=0.5):
        examples = [pairs[index] for index in range(first, min(first + batch_size, len(pairs)))]
        captions += [example.caption for example in examples]
        new = {example.image_id: example.image for example in examples if example.image_id not in numbers}
        numbers |= {name: len(numbers) + number for number, name in enumerate(new)}
        picture_of += [numbers[example.image_id] for example in examples]
        if new:
            blocks.append(engine.embed_images(list(new.values()), batch_size=batch_size))
    images, owners = torch.cat(blocks), torch.tensor(picture_of)
    image_seconds, rows = time.perf_counter() - started, []
    for context in contexts:
        started = time.perf_counter()
        with expected_truncation():
            texts = engine.embed_texts(captions, batch_size=batch_size, context_length=context)
        text_seconds = time.perf_counter() - started
        for name, weight in (("global", 1.0), ("fine", 0.0), ("combined", alpha)):
            i2t, t2i = pair_ranks(clim_scores(images, texts, alpha=weight), owners)
            metrics = {
                f"{way}_{key}": value
                for way, ranks in (("i2t", i2t), ("t2i", t2i))
                for key, value in summary(ranks).items()
                if key.startswith("recall")
            }
            rows.append(Row(context, name, metrics))
    return Evaluation(len(numbers), len(pairs), alpha, rows, image_seconds, text_seconds)
