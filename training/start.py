"""Where a training run starts: its model and its device."""

from __future__ import annotations

import os
import warnings

import torch

from finelip_fast import checkpoint
from finelip_fast.model import FineLIP
from finelip_fast.training.config import TrainConfig


def load_base(source: str, context_length: int) -> FineLIP:
    """A checkpoint to train, its context stretched to so many tokens; aggregators at their random start are expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", checkpoint.UntrainedAggregatorsWarning)  # its advice is to do this
        return checkpoint.load(source, context_length=context_length)


def start_model(config: TrainConfig) -> FineLIP:
    """The model that a run starts from, on the CPU."""
    trains_aggregators = any(term.on != "global" for term in config.criterion.terms)
    if not config.init:
        return FineLIP(config.model_config.replace(trained_aggregators=trains_aggregators))
    model = load_base(config.init, config.context_length)
    model.config = model.config.replace(logit_bias=None)  # a contrast moves the cosines that it was for
    if trains_aggregators:
        model.config = model.config.replace(trained_aggregators=True)
    return model


def choose_device(name: str) -> torch.device:
    """The device of a configuration's ``device``; of several GPUs, this process's."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device(name)
