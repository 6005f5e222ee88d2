"""Recall on validation pairs, and what the best checkpoint is chosen by."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from finelip_fast._terminal import printable
from finelip_fast.datasets import PairDataset
from finelip_fast.embed import embed_texts
from finelip_fast.errors import ImageError, TrainingError
from finelip_fast.metrics import WAYS, recall
from finelip_fast.model import FineLIP

_logger = logging.getLogger(__name__)

_BATCH = 64  # pictures at once


@torch.inference_mode()
def validate(model: FineLIP, pairs: PairDataset, *, name: str) -> dict[str, float]:
    """Rank the captions for each picture and the pictures for each caption; pair ``i`` belongs together.

    Args:
        model: Model in eval mode.
        pairs: Pairs whose picture cannot be read are left out, and named on the terminal.
        name: What the pairs are called, for the message.

    Returns:
        ``{"val_i2t_recall@1": ..., "val_t2i_recall@1": ...}``, with the usual cut-offs.

    Raises:
        TrainingError: No picture can be read.
    """

    def encode_text(ids: Tensor) -> Tensor:
        return model.encode_text(ids.to(model.device))

    images, texts = [], []
    for first in range(0, len(pairs), _BATCH):
        pixels, captions = _readable(model, pairs, range(first, min(first + _BATCH, len(pairs))))
        if captions:
            images.append(model.encode_image(torch.stack(pixels).to(model.device)))
            texts.append(embed_texts(encode_text, captions, context_length=model.config.context_length))
    if not images:
        raise TrainingError(f"none of the pictures of validation={name!r} can be read")
    scores = model.score(torch.cat(images), torch.cat(texts))
    return {f"val_{metric}": value for metric, value in recall(scores).items()}


def mean_recall(metrics: dict[str, float]) -> float:
    """Mean recall@1 of both directions; below that of any validation where there was none."""
    return sum(metrics.get(f"val_{way}_recall@1", -1.0) for way in WAYS) / 2


def _readable(model: FineLIP, pairs: PairDataset, indices: range) -> tuple[list[Tensor], list[str]]:
    """Pixels and captions, without the pairs whose picture cannot be read."""
    pixels, captions = [], []
    for example in (pairs[index] for index in indices):
        try:
            pixels.append(model.preprocess(example.image))
            captions.append(example.caption)
        except ImageError as error:
            _logger.warning("skipped in validation: %s", printable(error))
    return pixels, captions
