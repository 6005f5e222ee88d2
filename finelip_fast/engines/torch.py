"""The PyTorch engine: runs everywhere, float32 on a CPU and float16 on a GPU."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from finelip_fast import checkpoint as checkpoints
from finelip_fast._errors import EngineError
from finelip_fast.engines.base import Engine


class TorchEngine(Engine):
    """The model itself, without gradients.

    Args:
        checkpoint: As :func:`finelip_fast.load` takes it.
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
        self.device = _device(device)
        model = checkpoints.load(checkpoint)
        self.fingerprint = checkpoints.fingerprint(model)
        self.source = (
            "" if checkpoint is None else str(Path(checkpoint).absolute() if Path(checkpoint).exists() else checkpoint)
        )
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.model = model.to(self.device, dtype).eval()
        self.config, self.preprocess, self.alpha = model.config, model.preprocess, model.alpha
        self.description = f"{self.device}, {str(dtype).removeprefix('torch.')}"
        self.reason = reason

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(self.device, self.model.dtype))

    @torch.inference_mode()
    def encode_text(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids.to(self.device))


def _device(wanted: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former where torch is built without CUDA
        reason = str(error).partition("\n")[0]
        raise EngineError(
            f"device={str(wanted)!r} cannot be used: {reason}; use device='cpu', or leave it out to take what is there"
        ) from None
    return device
