"""Starting point of a training run: its model, its device and its precision."""

from __future__ import annotations

import os
import warnings

import torch

from finelip_fast import checkpoint
from finelip_fast.kernels import cpu
from finelip_fast.model import FineLIP
from finelip_fast.training.config import TrainConfig


def load_base(source: str, context_length: int) -> FineLIP:
    """Load a checkpoint to train, its context stretched to ``context_length`` tokens; its aggregators may be untrained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", checkpoint.UntrainedAggregatorsWarning)  # it advises to train them
        return checkpoint.load(source, context_length=context_length)


def start_model(config: TrainConfig) -> FineLIP:
    """Build the model that a run starts from, on the CPU."""
    trains_aggregators = any(term.on != "global" for term in config.criterion.terms)
    if not config.init:
        return FineLIP(config.model_config.replace(trained_aggregators=trains_aggregators))
    model = load_base(config.init, config.context_length)
    # Contrastive training shifts the cosines that the bias was fitted to.
    model.config = model.config.replace(logit_bias=None)
    if trains_aggregators:
        model.config = model.config.replace(trained_aggregators=True)
    return model


def choose_device(name: str) -> torch.device:
    """Choose the device for a configuration's ``device``; among several GPUs, the one of this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without them, PyTorch multiplies far more slowly than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu.has_bfloat16()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context that computes in a configuration's ``precision``; ``"auto"``: bfloat16 if :func:`has_bfloat16`."""
    rounds = has_bfloat16(device) if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=rounds)
