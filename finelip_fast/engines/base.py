"""Base class of all engines."""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from finelip_fast import checkpoint as checkpoints
from finelip_fast.config import FineLIPConfig
from finelip_fast.embed import embed_images, embed_texts
from finelip_fast.errors import EngineError
from finelip_fast.model import FineLIP
from finelip_fast.preprocess import Preprocess
from finelip_fast.runtimes.manifest import Export
from finelip_fast.tokenizer import CLIP_BPE, Overflow, Tokenizer

EngineName = Literal["auto", "torch", "onnx", "trt"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


class Engine(ABC):
    """A runtime that holds one checkpoint's encoders.

    An engine is pickled as the arguments that it was opened with. Unpickling opens it again with the same checkpoint, files,
    device and threads, or raises an EngineError. In a process forked after it was opened, an engine on the CPU continues with
    one thread, because the others are not copied; an engine on a GPU raises an EngineError.

    Attributes:
        name: ``"torch"``, ``"onnx"`` or ``"trt"``.
        config: Sizes of the model.
        preprocess: Converter of pictures to pixels.
        tokenizer: Converter of captions to tokens.
        alpha: The model's own weight of the global cosine.
        fingerprint: Identifier of the checkpoint; an index refuses any other.
        source: Path or name that the checkpoint was opened by; empty for the bundled one, absolute for a path.
        device: Device of the embeddings.
        precision: Precision of products and weights: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"int8-calibrated"``.
        description: Runtime, device and precision in a few words.
        reason: Reason why this engine was chosen.
        faster: Option that would encode over 1.5 times as fast on this machine, with the command; empty if none is known.
    """

    name: str
    config: FineLIPConfig
    preprocess: Preprocess
    tokenizer: Tokenizer = CLIP_BPE
    alpha: float
    fingerprint: str
    source: str
    device: torch.device
    precision: str
    description: str
    reason: str
    faster: str = ""
    _process: int

    @property
    def export(self) -> Export | None:
        """Exported files that the engine runs; None if it runs the model itself."""
        return None

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode pixels ``[B, 3, H, W]`` to embeddings ``[B, L, D]``, unit rows, row 0 = CLS."""

    @abstractmethod
    def encode_text(self, ids: Tensor) -> Tensor:
        """Encode ids ``[B, T]`` to embeddings ``[B, L, D]``, unit rows, row 0 = EOT."""

    def embed_images(self, images: Iterable[Any], *, batch_size: int = 64) -> Tensor:
        """Embed pictures of any kind as ``[N, L, D]``; see :func:`finelip_fast.embed.embed_images`."""
        return embed_images(self.encode_image, self.preprocess, images, batch_size=batch_size)

    def embed_texts(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 64,
        overflow: Overflow = "truncate",
        context_length: int | None = None,
    ) -> Tensor:
        """Embed captions as ``[N, L, D]``, cut at the model's context or a shorter one; see :mod:`finelip_fast.embed`."""
        context_length = self.config.context_length if context_length is None else context_length
        return embed_texts(
            self.encode_text,
            texts,
            context_length=context_length,
            batch_size=batch_size,
            overflow=overflow,
            tokenizer=self.tokenizer,
        )

    def __str__(self) -> str:
        return f"{self.name}: {self.description} ({self.reason})"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of :func:`finelip_fast.engines.open_engine` that open an equivalent engine."""
        return {"name": self.name, "checkpoint": self.source or None, "device": str(self.device)}

    def load_model(self) -> FineLIP:
        """Return the PyTorch model with these encoders, in eval mode; loaded at each call unless the engine runs it."""
        return checkpoints.load(self.source or None)

    def _opened_with(self) -> tuple[Any, ...]:
        """Positional arguments that open the same engine in any process.

        Raises:
            EngineError: An engine from outside this library that does not provide them.
        """
        raise EngineError(f"{type(self).__name__} cannot be pickled; open it in each process, or implement __reduce__")

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (type(self), self._opened_with(), self.fingerprint, self.reason)

    def _check_process(self) -> None:
        """Continue in a forked process, or raise EngineError if that is impossible."""
        if self._process != os.getpid():
            if self.device.type == "cuda":
                raise EngineError(
                    f"{self.name} on {self.device}: a GPU cannot be used in a forked process; use the spawn start method: "
                    "multiprocessing.get_context('spawn')"
                )
            self._follow_fork()
            self._process = os.getpid()

    def _follow_fork(self) -> None:  # noqa: B027, for most engines there is nothing
        """Recreate what a forked process has no copy of."""

    def _identify(
        self, config: FineLIPConfig, fingerprint: str, tokenizer: Tokenizer, checkpoint: str | PathLike[str] | None
    ) -> None:
        """Set the attributes that follow from the checkpoint alone."""
        _use_one_thread_after_fork()
        self._process = os.getpid()
        self.fingerprint = fingerprint
        self.source = (
            "" if checkpoint is None else str(Path(checkpoint).absolute() if Path(checkpoint).exists() else checkpoint)
        )
        self.config, self.preprocess, self.alpha = config, Preprocess.of(config), config.alpha
        self.tokenizer = tokenizer


def _open_again(kind: type[Engine], opened_with: tuple[Any, ...], fingerprint: str, reason: str) -> Engine:
    engine = kind(*opened_with)
    if engine.fingerprint != fingerprint:
        raise EngineError(
            f"{engine.source or 'the bundled checkpoint'} has changed since the engine was pickled: expected the fingerprint "
            f"{fingerprint[:12]}…, got {engine.fingerprint[:12]}…; open it again"
        )
    engine.reason = reason
    return engine


@functools.cache
def _use_one_thread_after_fork() -> None:
    """Limit forked processes to one thread: they have no copy of PyTorch's threads, and would wait for them forever."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
