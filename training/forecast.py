"""Forecast of how long an adaptation takes on this machine, from a few of its pairs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch

from finelip_fast.datasets import PairDataset
from finelip_fast.datasets.survey import Survey
from finelip_fast.encoders import caption_lengths
from finelip_fast.errors import FineLIPError
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import encode_batch, expected_truncation
from finelip_fast.training.config import TrainConfig
from finelip_fast.training.optimizer import freeze
from finelip_fast.training.start import autocast

# Number of pairs to time, spread over the data; a step that trains only the aggregators is timed whole.
_PAIRS = 8


def encoding_seconds(encoders: FineLIP, pairs: PairDataset, known: Survey) -> float:
    """Estimate the time to encode all pictures and captions once, including reading."""
    ids = _ids(encoders, known, _PAIRS).to(encoders.device)
    numbers = _spread(len(known.ids), _PAIRS)

    def encode_pictures() -> None:
        pixels = []
        for number in numbers:
            try:
                pixels.append(encoders.preprocess(pairs[known.first[number]].image))
            except (FineLIPError, OSError):  # reported when its turn comes
                continue
        if pixels:
            encoders.visual(torch.stack(pixels).to(encoders.device))

    with torch.inference_mode():
        for_pictures = _timed(encode_pictures, encoders.device) / len(numbers) * len(known.ids)
        for_captions = _timed(lambda: encoders.text_tokens(ids), encoders.device) / len(ids) * len(known.captions)
    return for_pictures + for_captions


def step_seconds(model: FineLIP, config: TrainConfig, known: Survey) -> float:
    """Estimate the time of a training step, without reading, which workers do in the meantime."""
    model = copy.deepcopy(model).train()
    freeze(model, config.unfreeze)
    sizes = model.config
    has_features = bool(config.features)
    n_pairs = config.batch_size if has_features else min(config.batch_size, _PAIRS)
    ids = _ids(model, known, n_pairs).to(model.device)
    if has_features:
        length = int(caption_lengths(ids, sizes.end_token).max())
        pixels = torch.randn(n_pairs, 1 + sizes.patches, sizes.embed_dim, device=model.device)
        tokens = torch.randn(n_pairs, length, sizes.embed_dim, device=model.device)
    else:
        pixels, tokens = torch.randn(n_pairs, 3, sizes.image_size, sizes.image_size, device=model.device), None
    image_ids = torch.arange(n_pairs, device=model.device)

    def step() -> None:
        with autocast(model.device, config.precision):
            output = model(pixels, ids, tokens)
            loss, _ = config.criterion(output.images, output.texts, image_ids, output.logit_scale)
        loss.backward()
        model.zero_grad()

    return _timed(step, model.device) / n_pairs * config.batch_size * config.accumulation_steps


def _ids(model: FineLIP, known: Survey, count: int) -> torch.Tensor:
    captions = [known.captions[at] for at in _spread(len(known.captions), count)]
    with expected_truncation():
        return encode_batch(captions, model.config.context_length, tokenizer=model.tokenizer).ids


def _spread(size: int, count: int) -> list[int]:
    """Return ``count`` evenly spaced numbers below ``size``, some repeated if there are fewer."""
    return [at * size // count for at in range(count)]


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes, after a warm-up run."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
