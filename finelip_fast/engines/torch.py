"""The PyTorch engine: runs everywhere, float16 on a GPU of NVIDIA's and float32 elsewhere."""

from __future__ import annotations

import copy
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from finelip_fast import checkpoint as checkpoints
from finelip_fast._arguments import find_device
from finelip_fast.engines.base import Engine
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import tokenize


class TorchEngine(Engine):
    """The model itself, without gradients.

    Args:
        checkpoint: Folder, file or name, as :func:`finelip_fast.load` takes it.
        device: None takes a GPU if there is one: of Apple's, where it computes what the CPU does.
        reason: Why this engine was chosen.

    Raises:
        EngineError: A device that is not here.
        CheckpointError: A checkpoint that cannot be loaded.
    """

    name = "torch"

    def __init__(
        self,
        checkpoint: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        *,
        reason: str = "asked for",
    ) -> None:
        self.device = find_device(device)
        model = checkpoints.load(checkpoint)
        self._identify(model.config, checkpoints.fingerprint(model), checkpoint)
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        # Embeddings come out on the CPU all the same: an index is searched there.
        tries = device is None and self.device.type == "cpu" and torch.backends.mps.is_available()
        self._accelerator = _apple_gpu(model) if tries else None
        self.model = model.to(self._accelerator or self.device, dtype).eval()
        self.precision = "fp16" if dtype == torch.float16 else "fp32"
        self.description = f"{self._accelerator or self.device}, {str(dtype).removeprefix('torch.')}"
        if tries and self._accelerator is None:
            self.description += "; the GPU failed a trial"
        self.reason = reason

    def _opened_with(self) -> tuple[Any, ...]:
        return self.source or None, str(self.device)

    def load_model(self) -> FineLIP:
        return self.model if self._accelerator is None else super().load_model()

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        self._check_process()
        return self.model.encode_image(pixels.to(self.model.device, self.model.dtype)).to(self.device)

    @torch.inference_mode()
    def encode_text(self, ids: Tensor) -> Tensor:
        self._check_process()
        return self.model.encode_text(ids.to(self.model.device)).to(self.device)


def _apple_gpu(model: FineLIP) -> torch.device | None:
    """The GPU of an Apple machine, if it encodes a picture and a text as the CPU does; PyTorch lacks operations there."""
    config = model.config
    pixels = torch.linspace(-1, 1, 3 * config.image_size**2).view(1, 3, config.image_size, config.image_size)
    ids = tokenize(["a red house"], config.context_length)
    try:
        with torch.inference_mode():
            expected = model.encode_image(pixels), model.encode_text(ids)
            copied = copy.deepcopy(model).to("mps")
            encoded = copied.encode_image(pixels.to("mps")).cpu(), copied.encode_text(ids.to("mps")).cpu()
    except (RuntimeError, NotImplementedError, TypeError):  # the last of float64, which it does not have
        return None
    agrees = all(torch.allclose(*pair, atol=1e-3) for pair in zip(encoded, expected, strict=True))
    return torch.device("mps") if agrees else None
