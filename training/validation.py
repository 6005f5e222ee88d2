"""Recall on validation pairs, as ``finelip eval`` measures it, and the criterion for the best checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finelip_fast._terminal import printable
from finelip_fast.datasets import PairDataset
from finelip_fast.datasets.survey import Survey, survey
from finelip_fast.embed import embed_texts
from finelip_fast.errors import ImageError, TrainingError
from finelip_fast.metrics import WAYS, pair_summary, quality
from finelip_fast.model import FineLIP
from finelip_fast.ranking import tiled_ranks
from finelip_fast.tokenizer import expected_truncation
from finelip_fast.training.features import Features

_logger = logging.getLogger(__name__)

_BATCH = 64  # pictures at once


@torch.inference_mode()
def validate(
    model: FineLIP,
    pairs: PairDataset,
    *,
    name: str,
    alphas: Sequence[float] | None = None,
    features: Features | None = None,
) -> dict[str, float]:
    """Rank all captions for each picture and all pictures for each caption; a picture may have several captions.

    Args:
        model: Model in eval mode.
        pairs: Pairs to measure, at least one. Pictures that cannot be read are left out with their captions, and named in the
            log.
        name: Name of the pairs, for the error message.
        alphas: Weights of the global cosine to choose from by the best :func:`finelip_fast.metrics.quality`, the first one if
            several are equal; None, or untrained aggregators: the model's own.
        features: Features of the pairs from the model's encoders, which then do not run; None: the encoders run.

    Returns:
        ``{"val_alpha": ..., "val_i2t_recall@1": ..., "val_t2i_recall@1": ...}``, with the usual cut-offs: the
        combined score of ``finelip eval`` at that weight.

    Raises:
        TrainingError: No picture can be read.
    """

    known = survey(pairs)
    tensor_of = partial(_pixels, model, pairs, known) if features is None else partial(_computed, features, known)
    encode_image = model.encode_image if features is None else model.aggregate_image
    numbers: list[int] = []  # of the pictures that can be read
    images: list[Tensor] = []
    for first in range(0, len(known.ids), _BATCH):
        readable, tensors = _readable(tensor_of, range(first, min(first + _BATCH, len(known.ids))))
        if tensors:
            numbers += readable
            images.append(encode_image(torch.stack(tensors).to(model.device)))
    if not images:
        raise TrainingError(
            f"none of the {len(known.ids)} pictures of validation={name!r} can be read; if its paths start from another "
            "folder, pass --root"
        )
    rows = {number: row for row, number in enumerate(numbers)}
    indices = [index for index, number in enumerate(known.picture_of) if number in rows]
    picture_of = [rows[known.picture_of[index]] for index in indices]
    texts = _texts(model, known, indices) if features is None else _aggregated_texts(model, features, indices)
    if alphas is None or not model.config.trained_aggregators:
        alphas = (model.alpha,)
    swept = tiled_ranks(torch.cat(images), texts, torch.tensor(picture_of), alphas)
    summaries = dict(zip(alphas, map(pair_summary, swept), strict=True))
    alpha = max(alphas, key=lambda weight: quality(summaries[weight]))
    recalls = {f"val_{metric}": value for metric, value in summaries[alpha].items() if "_recall@" in metric}
    return {"val_alpha": alpha, **recalls}


def mean_recall(metrics: dict[str, float]) -> float:
    """Mean recall@1 of both directions; below that of any validation if there was none."""
    return sum(metrics.get(f"val_{way}_recall@1", -1.0) for way in WAYS) / 2


def _texts(model: FineLIP, known: Survey, indices: Sequence[int]) -> Tensor:
    def encode_text(ids: Tensor) -> Tensor:
        return model.encode_text(ids.to(model.device))

    captions = [known.captions[index] for index in indices]
    with expected_truncation():  # the log counts only those in training batches
        return embed_texts(encode_text, captions, context_length=model.config.context_length, tokenizer=model.tokenizer)


def _aggregated_texts(model: FineLIP, features: Features, indices: Sequence[int]) -> Tensor:
    parts = []
    for first in range(0, len(indices), _BATCH):
        tokens = [features.caption(index).float() for index in indices[first : first + _BATCH]]
        lengths = torch.tensor([len(rows) for rows in tokens], device=model.device)
        parts.append(model.aggregate_text(pad_sequence(tokens, batch_first=True).to(model.device), lengths))
    return torch.cat(parts)


def _pixels(model: FineLIP, pairs: PairDataset, known: Survey, number: int) -> Tensor:
    return model.preprocess(pairs[known.first[number]].image)


def _computed(features: Features, known: Survey, number: int) -> Tensor:
    return features.picture(known.first[number]).float()  # autocast on a CPU cannot concatenate float16


def _readable(tensor_of: Callable[[int], Tensor], numbers: Sequence[int]) -> tuple[list[int], list[Tensor]]:
    """Numbers and tensors of the pictures that can be read."""
    readable, tensors = [], []
    for number in numbers:
        try:
            tensors.append(tensor_of(number))
            readable.append(number)
        except ImageError as error:
            _logger.warning("skipped in validation: %s", printable(error))
    return readable, tensors
