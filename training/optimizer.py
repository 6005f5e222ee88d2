"""Selection of the weights to train, AdamW's parameter groups, and the learning rate schedule."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from finelip_fast.model import FineLIP
from finelip_fast.training.config import TrainConfig

# Parts of the two encoders that follow their blocks.
_BEHIND_BLOCKS = ("ln_post", "proj", "attn_pool", "ln_final", "text_projection")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")


def freeze(model: FineLIP, unfreeze: str) -> None:
    """Freeze weights of the encoders; the aggregators and the scale of the scores are always trained.

    Args:
        model: Model whose parameters are frozen or left trainable.
        unfreeze: Part of both encoders to train: ``"all"``, ``"none"``, or ``"last:N"``, the last ``N`` blocks and the layers
            after them. No gradient is computed for earlier layers.
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

    Norms, biases, positions, the class embedding, the query of attention pooling and scales have no weight decay. Frozen
    weights belong to no group.
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
    """Fraction of the peak learning rate at a step: linear warm-up, then cosine decay to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
