"""The PyTorch engine: runs everywhere, float32 on a CPU and float16 on a GPU."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor

from finelip_fast import checkpoint as checkpoints
from finelip_fast._arguments import find_device
from finelip_fast.engines.base import Engine
from finelip_fast.model import FineLIP


class TorchEngine(Engine):
    """The model itself, without gradients.

    Args:
        checkpoint: Folder, file or name, as :func:`finelip_fast.load` takes it.
        device: None takes a GPU if there is one.
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
        self.model = model.to(self.device, dtype).eval()
        self.precision = "fp16" if dtype == torch.float16 else "fp32"
        self.description = f"{self.device}, {str(dtype).removeprefix('torch.')}"
        self.reason = reason

    def _opened_with(self) -> tuple[Any, ...]:
        return self.source or None, str(self.device)

    def load_model(self) -> FineLIP:
        return self.model

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        self._check_process()
        return self.model.encode_image(pixels.to(self.device, self.model.dtype))

    @torch.inference_mode()
    def encode_text(self, ids: Tensor) -> Tensor:
        self._check_process()
        return self.model.encode_text(ids.to(self.device))
