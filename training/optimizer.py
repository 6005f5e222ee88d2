"""Which weights are trained, what AdamW does to them, and the learning rate over a run."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from finelip_fast.model import FineLIP
from finelip_fast.training.config import TrainConfig

# Of the two encoders, what stands behind their blocks.
_BEHIND_BLOCKS = ("ln_post", "proj", "attn_pool", "ln_final", "text_projection")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")


def freeze(model: FineLIP, unfreeze: str) -> None:
    """Leave weights of the encoders as they are; aggregators and the scale of the scores are always trained.

    Args:
        model: Model whose parameters are marked.
        unfreeze: What is trained of both encoders: ``"all"``, ``"none"``, or ``"last:N"``, the last ``N`` blocks and what is
            behind them. No gradient is computed further ahead.
    """
    if unfreeze == "all":
        return
    count = 0 if unfreeze == "none" else int(unfreeze.removeprefix("last:"))
    for encoder in (model.visual, model.text):
        layers = len(encoder.transformer.resblocks)
        for name, parameter in encoder.named_parameters():
            block = _BLOCK.match(name)
            is_late = int(block[1]) >= layers - count if block else name.partition(".")[0] in _BEHIND_BLOCKS
            parameter.requires_grad_(is_late and count > 0)


def parameter_groups(model: FineLIP, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups: two learning rates, each with and without weight decay.

    Norms, biases, positions, the class embedding, the query of a pool and scales are not decayed; frozen weights are in no
    group.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.dim() >= 2 and not name.endswith(("positional_embedding", "attn_pool.latent"))
        groups.setdefault(("aggregator" in name, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "peak_lr": config.aggregator_lr if aggregator else config.encoder_lr,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (aggregator, decayed), parameters in groups.items()
    ]


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
