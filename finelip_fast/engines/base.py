"""What an engine is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finelip_fast import checkpoint as checkpoints
from finelip_fast._errors import EngineError
from finelip_fast.config import FineLIPConfig
from finelip_fast.embed import embed_images, embed_texts
from finelip_fast.model import FineLIP
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import Overflow

ENGINES = ("auto", "torch", "onnx", "trt")


class Engine(ABC):
    """A runtime that holds one checkpoint's encoders.

    Attributes:
        name: ``"torch"``, ``"onnx"`` or ``"trt"``.
        config: Sizes of the model.
        preprocess: What makes pixels of a picture.
        alpha: The model's own weight of the global cosine.
        fingerprint: Identifies the checkpoint; an index refuses another one.
        source: What the checkpoint was opened as; empty for the bundled one, absolute for a path.
        device: Where embeddings come out.
        precision: Of products and weights: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"int8-calibrated"``.
        description: Runtime, device and precision in a few words.
        reason: Why this engine and not another.
    """

    name: str
    config: FineLIPConfig
    preprocess: Preprocess
    alpha: float
    fingerprint: str
    source: str
    device: torch.device
    precision: str
    description: str
    reason: str

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, 3, H, W]`` to embeddings ``[B, L, D]``, unit rows, row 0 = CLS."""

    @abstractmethod
    def encode_text(self, ids: Tensor) -> Tensor:
        """Ids ``[B, T]`` to embeddings ``[B, L, D]``, unit rows, row 0 = EOT."""

    def embed_images(self, images: Iterable[Any], *, batch_size: int = 64) -> Tensor:
        """Pictures of any kind to ``[N, L, D]``; see :func:`finelip_fast.embed.embed_images`."""
        return embed_images(self.encode_image, self.preprocess, images, batch_size=batch_size)

    def embed_texts(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 64,
        overflow: Overflow = "truncate",
        context_length: int | None = None,
    ) -> Tensor:
        """Captions to ``[N, L, D]``, cut at the model's context or a shorter one; see :mod:`finelip_fast.embed`."""
        context_length = self.config.context_length if context_length is None else context_length
        return embed_texts(
            self.encode_text, texts, context_length=context_length, batch_size=batch_size, overflow=overflow
        )

    def __str__(self) -> str:
        return f"{self.name}: {self.description} ({self.reason})"

    def _identify(self, model: FineLIP, checkpoint: str | PathLike[str] | None) -> None:
        """What follows from the checkpoint alone."""
        self.fingerprint = checkpoints.fingerprint(model)
        self.source = (
            "" if checkpoint is None else str(Path(checkpoint).absolute() if Path(checkpoint).exists() else checkpoint)
        )
        self.config, self.preprocess, self.alpha = model.config, model.preprocess, model.alpha


def find_device(wanted: str | torch.device | None) -> torch.device:
    """The device to run on; None takes a GPU if there is one.

    Raises:
        EngineError: A device that is not here.
    """
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former where torch is built without CUDA
        reason = str(error).partition("\n")[0]
        raise EngineError(
            f"device={str(wanted)!r} cannot be used: {reason}; use device='cpu', or leave it out to take what is there"
        ) from None
    return device
