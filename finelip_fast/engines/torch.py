"""The PyTorch engine, which runs everywhere: float16 on NVIDIA GPUs, float32 elsewhere, or less on a CPU on request."""

from __future__ import annotations

import copy
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor

from finelip_fast import checkpoint as checkpoints
from finelip_fast._arguments import find_device
from finelip_fast.engines.base import Engine
from finelip_fast.errors import EngineError, InputError
from finelip_fast.frozen import freeze, why_not
from finelip_fast.kernels import cpu
from finelip_fast.model import FineLIP, check_ids, check_pixels
from finelip_fast.runtimes.manifest import Precision
from finelip_fast.tokenizer import tokenize

# Precisions by kind of device, starting with the default.
PRECISIONS: dict[str, tuple[Precision, ...]] = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp16",)}
NUMBERS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}


class TorchEngine(Engine):
    """The model itself, without gradients; on a CPU its encoders are frozen (:func:`finelip_fast.frozen.freeze`).

    Args:
        checkpoint: Folder, file or name, as :func:`finelip_fast.load` takes it.
        device: Device to run on; None means a GPU if there is one. An Apple GPU must give the same results as the CPU.
        precision: Precision of the linear layers: on a CPU ``"fp32"``, ``"bf16"`` or ``"int8"``, on an NVIDIA GPU ``"fp16"``.
            None means the first of them.
        reason: Reason why this engine was chosen.

    Raises:
        InputError: A precision that the device does not have.
        EngineError: A device that is not available, or a precision that this processor has no instructions for.
        CheckpointError: A checkpoint that cannot be loaded.
    """

    name = "torch"

    def __init__(
        self,
        checkpoint: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        precision: Precision | None = None,
        *,
        reason: str = "asked for",
    ) -> None:
        self.device = find_device(device)
        self.precision = _check_precision(precision, self.device)
        model = checkpoints.load(checkpoint)
        self._identify(model.config, checkpoints.fingerprint(model), model.tokenizer, checkpoint)
        # Embeddings are returned on the CPU in any case, because an index is searched there.
        tries = (
            device is None
            and self.device.type == "cpu"
            and self.precision == "fp32"
            and torch.backends.mps.is_available()
        )
        self._accelerator = _apple_gpu(model) if tries else None
        self._frozen = self.device.type == "cpu" and self._accelerator is None
        if self._frozen:
            self.model = freeze(model.eval(), cast(cpu.LinearPrecision, self.precision))
        else:
            dtype = torch.float16 if self.precision == "fp16" else torch.float32
            self.model = model.to(self._accelerator or self.device, dtype).eval()
        self.description = f"{self._accelerator or self.device}, {NUMBERS[self.precision]}"
        if tries and self._accelerator is None:
            self.description += "; the GPU failed a trial"
        self.reason = reason

    def _opened_with(self) -> tuple[Any, ...]:
        return self.source or None, str(self.device), self.precision

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "precision": self.precision}

    def load_model(self) -> FineLIP:
        # A frozen model has no parameters left, and explanations are computed on the CPU.
        return self.model if not self._frozen and self._accelerator is None else super().load_model()

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        self._check_process()
        check_pixels(pixels, self.config)
        return self.model.encode_image(pixels.to(self.model.device, self.model.dtype)).to(self.device)

    @torch.inference_mode()
    def encode_text(self, ids: Tensor) -> Tensor:
        self._check_process()
        check_ids(ids, self.config)  # on the CPU still, where looking at their values costs nothing
        return self.model.encode_text(ids.to(self.model.device)).to(self.device)


def precisions_on(device: torch.device) -> tuple[Precision, ...]:
    """Return the precisions that a device has, starting with the default.

    Raises:
        InputError: A device of another kind.
    """
    if device.type not in PRECISIONS:
        raise InputError(
            f"expected device of the engine as {' or '.join(PRECISIONS)}, got {str(device)!r}; leave it out, and the engine "
            "uses an Apple GPU if that gives the same results"
        )
    return PRECISIONS[device.type]


def _check_precision(precision: Precision | None, device: torch.device) -> Precision:
    known = precisions_on(device)
    if precision is None:
        return known[0]
    if precision not in known:
        raise InputError(
            f"expected precision of engine='torch' on {device} to be one of {', '.join(known)}, got {precision!r:.80}; "
            "exports support others (engine='onnx', engine='trt')"
        )
    if device.type == "cpu" and (reason := why_not(precision)) is not None:
        raise EngineError(f"engine='torch' cannot run in {precision}: {reason}; omit precision")
    return precision


def _apple_gpu(model: FineLIP) -> torch.device | None:
    """The GPU of an Apple machine, if it encodes a picture and a text as the CPU does; PyTorch lacks some operations there."""
    config = model.config
    pixels = torch.linspace(-1, 1, 3 * config.image_size**2).view(1, 3, config.image_size, config.image_size)
    ids = tokenize(["a red house"], config.context_length, tokenizer=model.tokenizer)
    try:
        with torch.inference_mode():
            expected = model.encode_image(pixels), model.encode_text(ids)
            copied = copy.deepcopy(model).to("mps")
            encoded = copied.encode_image(pixels.to("mps")).cpu(), copied.encode_text(ids.to("mps")).cpu()
    except (RuntimeError, NotImplementedError, TypeError):  # the last for float64, which it does not have
        return None
    agrees = all(torch.allclose(*pair, atol=1e-3) for pair in zip(encoded, expected, strict=True))
    return torch.device("mps") if agrees else None
