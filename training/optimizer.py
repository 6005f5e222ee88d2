"""What AdamW does to which weights, and the learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from finelip_fast.model import FineLIP
from finelip_fast.training.config import TrainConfig


def parameter_groups(model: FineLIP, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups: two learning rates, each with and without weight decay.

    Norms, biases, positions, the class embedding and scales are not decayed.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decayed = parameter.dim() >= 2 and not name.endswith("positional_embedding")
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
