"""Embedding pictures and texts, and scoring them against each other: the part of a retriever that needs no index."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from finelip_fast._arguments import Embeddings, as_embeddings, folder_path, listed, share, whole_number
from finelip_fast.engines import Engine, EngineName, open_engine
from finelip_fast.errors import EngineError, InputError
from finelip_fast.explain import Explanation, explain
from finelip_fast.ingest import as_images
from finelip_fast.kernels import clim_scores
from finelip_fast.model import FineLIP
from finelip_fast.preprocess import ImageSource
from finelip_fast.runtimes.manifest import Precision
from finelip_fast.tokenizer import Overflow, check_overflow


class Embedder:
    """Embed, score and explain pictures and texts with one engine. The arguments and errors are those of ``Retriever``."""

    def __init__(
        self,
        checkpoint: str | PathLike[str] | None,
        *,
        engine: EngineName,
        device: str | torch.device | None,
        alpha: float | None,
        overflow: Overflow,
        precision: Precision | None,
        threads: int | None,
        build: bool,
    ) -> None:
        # As many invalid arguments as possible are refused before a model is loaded.
        if checkpoint is not None:
            if not isinstance(checkpoint, (str, PathLike)):
                raise InputError(f"expected checkpoint to be a path or a name, got {checkpoint!r:.80}")
            folder_path("checkpoint", checkpoint)
        alpha = None if alpha is None else share("alpha", alpha)
        threads = None if threads is None else whole_number("threads", threads)
        check_overflow(overflow)
        self._process = os.getpid()
        self._engine = open_engine(engine, checkpoint, device, precision=precision, threads=threads, build=build)
        self._alpha = self._engine.config.choose_alpha(alpha)
        self.overflow: Overflow = overflow
        self._model: FineLIP | None = None  # the PyTorch model, for explanations; loaded by the first one
        self._model_lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        """The engine in use; its ``str`` says what runs, on which device, and why it was chosen."""
        self._refuse_after_fork()
        return self._engine

    @property
    def alpha(self) -> float:
        """Weight of the global cosine in the score, in [0, 1]; set to None, it becomes the checkpoint's own.

        Raises:
            InputError: When it is set: not a number in [0, 1], or below 1 without trained aggregators.
        """
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float | None) -> None:
        self._alpha = self._engine.config.choose_alpha(alpha)

    def _refuse_after_fork(self) -> None:
        if os.getpid() != self._process:
            raise EngineError(
                "this retriever was opened before the process forked and cannot be used here; open one in the child process, "
                "or use the spawn start method: multiprocessing.get_context('spawn')"
            )

    @overload
    def encode_images(
        self, images: Iterable[ImageSource], *, batch_size: int = 64, convert_to_numpy: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def encode_images(
        self, images: Iterable[ImageSource], *, batch_size: int = 64, convert_to_numpy: Literal[True]
    ) -> np.ndarray[Any, np.dtype[np.float32]]: ...

    def encode_images(
        self, images: Iterable[ImageSource], *, batch_size: int = 64, convert_to_numpy: bool = False
    ) -> Tensor | np.ndarray[Any, np.dtype[np.float32]]:
        """Embed pictures without adding them.

        Args:
            images: Pictures as :func:`finelip_fast.open_image` takes them.
            batch_size: Number of pictures embedded at once.
            convert_to_numpy: Whether to return a float32 array instead of a tensor on the engine's device.

        Returns:
            ``[N, L, D]``, unit rows, row 0 = CLS.

        Raises:
            ImageError: A picture cannot be read.
            InputError: ``images`` is not a list of pictures.
        """
        images = listed("images", as_images(images))
        size = whole_number("batch_size", batch_size)
        return self._returned(
            self.engine.embed_images(images, batch_size=size) if images else self._nothing(), convert_to_numpy
        )

    @overload
    def encode_texts(
        self, texts: Iterable[str], *, batch_size: int = 64, convert_to_numpy: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def encode_texts(
        self, texts: Iterable[str], *, batch_size: int = 64, convert_to_numpy: Literal[True]
    ) -> np.ndarray[Any, np.dtype[np.float32]]: ...

    def encode_texts(
        self, texts: Iterable[str], *, batch_size: int = 64, convert_to_numpy: bool = False
    ) -> Tensor | np.ndarray[Any, np.dtype[np.float32]]:
        """Embed descriptions without adding them.

        Args:
            texts: Descriptions, or a single one.
            batch_size: Number of descriptions embedded at once.
            convert_to_numpy: Whether to return a float32 array instead of a tensor on the engine's device.

        Returns:
            ``[N, L, D]``, unit rows, row 0 = EOT.

        Raises:
            InputError: ``texts`` is not a list, or a text is not a string.
        """
        texts = listed("texts", [texts] if isinstance(texts, str) else texts)
        size = whole_number("batch_size", batch_size)
        embedded = self.engine.embed_texts(texts, batch_size=size, overflow=self.overflow) if texts else self._nothing()
        return self._returned(embedded, convert_to_numpy)

    def similarity(self, queries: Embeddings, items: Embeddings) -> Tensor:
        """Score embeddings against each other, weighted by the retriever's ``alpha``.

        Args:
            queries: Embeddings ``[Q, L, D]`` from :meth:`encode_texts` or :meth:`encode_images`, a dense tensor or an array.
            items: Embeddings ``[N, L, D]``, likewise.

        Returns:
            float32 ``[Q, N]`` on the engine's device.

        Raises:
            InputError: The embeddings differ in shape, or are not floating-point numbers.
        """
        first, second = (self._on_device(name, x) for name, x in (("queries", queries), ("items", items)))
        if first.dtype != second.dtype:
            first, second = first.float(), second.float()
        return clim_scores(first, second, alpha=self.alpha)

    def _on_device(self, name: str, embeddings: Embeddings) -> Tensor:
        return as_embeddings(name, embeddings).to(self.engine.device)

    def _nothing(self) -> Tensor:
        config = self.engine.config
        return torch.zeros(0, config.tokens, config.embed_dim, device=self.engine.device)

    @staticmethod
    def _returned(embedded: Tensor, as_numpy: bool) -> Tensor | np.ndarray[Any, np.dtype[np.float32]]:
        return embedded.float().cpu().numpy() if as_numpy else embedded

    def score(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Score every picture against every text, without the index.

        Returns:
            float32 ``[n_images, n_texts]``.

        Raises:
            ImageError: A picture cannot be read.
            InputError: An argument is not a list, or a text is not a string.
        """
        images, texts = (
            listed("images", as_images(images)),
            listed("texts", [texts] if isinstance(texts, str) else texts),
        )
        if not images or not texts:
            return torch.zeros(len(images), len(texts))
        embedded = self.engine.embed_images(images)
        return clim_scores(embedded, self.engine.embed_texts(texts, overflow=self.overflow), alpha=self.alpha)

    def _explain(self, image: Any, text: str) -> Explanation:
        with self._model_lock:
            if self._model is None:
                self._model = self.engine.load_model()
        return explain(self._model, image, text, alpha=self.alpha)
