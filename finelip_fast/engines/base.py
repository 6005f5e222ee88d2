"""What an engine is, and how one is picked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from finelip_fast._errors import EngineError, InputError
from finelip_fast.config import FineLIPConfig
from finelip_fast.embed import embed_images, embed_texts
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import Overflow

ENGINES = ("auto", "torch", "onnx", "trt")

_ABSENT = {
    "onnx": "this version has no ONNX Runtime engine",
    "trt": "this version has no TensorRT engine",
}


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


def open_engine(name: str, checkpoint: str | PathLike[str] | None, device: str | torch.device | None = None) -> Engine:
    """Open an engine on a checkpoint.

    Args:
        name: ``"auto"`` takes the fastest that can run here; any other name gives that engine or an error.
        checkpoint: As :func:`finelip_fast.load` takes it.
        device: Where to run; None: a GPU if there is one.

    Raises:
        InputError: An unknown name.
        EngineError: An engine or a device that cannot run here.
        CheckpointError: A checkpoint that cannot be loaded.
    """
    from finelip_fast.engines.torch import TorchEngine

    if name not in ENGINES:
        raise InputError(f"expected engine to be one of {ENGINES}, got {name!r}")
    if name in _ABSENT:
        raise EngineError(f"engine={name!r} cannot run: {_ABSENT[name]}; use engine='torch' or engine='auto'")
    reason = "asked for" if name == "torch" else "the only engine of this version"
    return TorchEngine(checkpoint, device, reason=reason)


def why_not(name: str) -> str | None:
    """Why an engine cannot run here; None if it can."""
    return _ABSENT.get(name)
