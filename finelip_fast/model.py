"""FineLIP: two encoders, two aggregators, one score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finelip_fast.aggregator import TokenAggregator, global_rows
from finelip_fast.config import FineLIPConfig
from finelip_fast.encoders import ImageEncoder, TextEncoder, caption_lengths
from finelip_fast.errors import InputError
from finelip_fast.kernels import clim_scores
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import CLIP_BPE, Tokenizer

if TYPE_CHECKING:
    from finelip_fast.siglip import SigLIPImageEncoder, SigLIPTextEncoder

# Captions of similar length that a CPU encodes together: fewer captions mean less padding to compute.
_CAPTIONS_AT_ONCE = 16

_INTEGERS = (torch.int64, torch.int32)  # as an embedding takes them


class TrainingOutput(NamedTuple):
    """The outputs for a batch of pairs that losses need.

    Attributes:
        images, texts: Embeddings ``[B, K + 1, D]``, with the aggregated rows even if the aggregators are yet to be trained.
        logit_scale: The multiplier of the scores itself, ``exp(logit_scale)``.
        patches: Projected features ``[B, P, D]`` of the patches, before aggregation.
        tokens: Projected features ``[B, T', D]`` of the captions' tokens, up to the longest caption.
    """

    images: Tensor
    texts: Tensor
    logit_scale: Tensor
    patches: Tensor
    tokens: Tensor


class FineLIP(nn.Module):
    """A model that turns a picture or a caption into one matrix ``[L, D]`` of unit rows; row 0 is CLIP's global embedding.

    If ``config.trained_aggregators`` is False, as for plain CLIP, it is the only row (``L = 1``).

    Args:
        config: Sizes. The weights are random at first; :func:`finelip_fast.load` returns a trained model.
        tokenizer: Tokenizer of its captions, kept as :attr:`tokenizer`.

    Raises:
        InputError: ``config`` is not a FineLIPConfig.

    Example:
        >>> model = finelip_fast.load()
        >>> images = model.encode_image(pixels)                           # [B_i, L, D]
        >>> texts = model.encode_text(finelip_fast.tokenize(captions))    # [B_t, L, D]
        >>> model.score(images, texts)                                    # [B_i, B_t]
    """

    def __init__(self, config: FineLIPConfig, tokenizer: Tokenizer = CLIP_BPE) -> None:
        super().__init__()
        if not isinstance(config, FineLIPConfig):
            raise InputError(f"expected config as a FineLIPConfig, got {config!r:.80}; use FineLIPConfig.from_dict")
        self.config, self.tokenizer = config, tokenizer
        self.visual, self.text = _encoders(config)
        sizes = (config.embed_dim, config.aggregator_hidden, config.aggregated_tokens)
        self.image_aggregator = TokenAggregator(*sizes)
        self.text_aggregator = TokenAggregator(*sizes)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's initial value

    @property
    def alpha(self) -> float:
        """Weight of the global cosine in the score, from the configuration; 1 if the aggregators are untrained."""
        return self.config.alpha

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing that turns a picture into pixels for :meth:`encode_image`."""
        return Preprocess.of(self.config)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.logit_scale.dtype

    def extra_repr(self) -> str:
        """The main sizes, shown at the top when the model is printed."""
        config = self.config
        sizes = ("image_size", "patch_size", "context_length", "tokens", "embed_dim", "trained_aggregators")
        return ", ".join(f"{name}={getattr(config, name)}" for name in sizes)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed pictures.

        Args:
            pixels: ``[B, 3, H, W]`` of a floating dtype, normalised, ``H = W = config.image_size``.

        Returns:
            ``[B, L, D]``, unit rows, row 0 from CLS.

        Raises:
            InputError: The pixels have another shape, or are not normalised floating-point numbers in a tensor.
        """
        check_pixels(pixels, self.config)
        tokens = self.visual(pixels if pixels.dtype == self.dtype else pixels.to(self.dtype))
        return self.aggregate_image(tokens) if self._aggregates else global_rows(tokens[:, 0], self.dtype)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Embed captions.

        Positions after the longest caption's end token cannot affect the result, so they are not computed (except in a
        compiled or exported graph, whose shapes must not depend on values).

        Args:
            ids: int64 ``[B, T]`` from :func:`finelip_fast.tokenize` with :attr:`tokenizer`, ``T <= config.context_length``.

        Returns:
            ``[B, L, D]``, unit rows, row 0 from the end token. A row of padding alone gives zeros.

        Raises:
            InputError: The ids are not a tensor of such integers, are longer than the context or, on the CPU, outside the
                vocabulary.
        """
        check_ids(ids, self.config)
        tokens, lengths = self.text_tokens(ids)
        if self._aggregates:
            return self.aggregate_text(tokens, lengths)
        return global_rows(_end_tokens(tokens, lengths), self.dtype)

    def score(self, images: Tensor, texts: Tensor, *, alpha: float | None = None) -> Tensor:
        """Score every picture against every caption.

        Args:
            images: ``[B_i, L, D]`` from :meth:`encode_image`.
            texts: ``[B_t, L, D]`` from :meth:`encode_text`.
            alpha: Weight of the global cosine; None takes :attr:`alpha`.

        Returns:
            float32 ``[B_i, B_t]``.
        """
        return clim_scores(images, texts, alpha=self.alpha if alpha is None else alpha)

    def probability(self, images: Tensor, texts: Tensor) -> Tensor:
        """Probability that each picture and each caption belong together, as SigLIP's training defines it (arXiv 2303.15343).

        Computed as ``sigmoid(exp(logit_scale) * cosine + logit_bias)`` from the global rows. Unlike scores, which only order
        pictures, all probabilities are small if nothing matches.

        Args:
            images: ``[B_i, L, D]`` from :meth:`encode_image`.
            texts: ``[B_t, L, D]`` from :meth:`encode_text`.

        Returns:
            float32 ``[B_i, B_t]``.

        Raises:
            InputError: The model has no ``logit_bias``: it is not a SigLIP, or was trained further with another loss.
        """
        if self.config.logit_bias is None:
            raise InputError(
                "expected a SigLIP model with logit_bias, got one without, whose scores are not probabilities; compare scores "
                "with each other (model.score)"
            )
        cosines = images[:, 0].float() @ texts[:, 0].float().T
        return torch.sigmoid(self.logit_scale.float().exp() * cosines + self.config.logit_bias)

    def forward(self, pixels: Tensor, ids: Tensor, tokens: Tensor | None = None) -> TrainingOutput:
        """Compute the outputs that a training step differentiates.

        Args:
            pixels: ``[B, 3, H, W]``, or the pictures' features ``[B, 1 + P, D]`` if they were computed before.
            ids: ``[B, T]``.
            tokens: The captions' features ``[B, T', D]`` if they were computed before.
        """
        patches = self.visual(pixels) if pixels.dim() == 4 else pixels
        if tokens is None:
            tokens, lengths = self.text_tokens(ids)
        else:
            lengths = self._lengths(ids)
        return TrainingOutput(
            self.aggregate_image(patches),
            self.aggregate_text(tokens, lengths),
            self.logit_scale.exp(),
            patches[:, 1:],
            tokens,
        )

    def text_tokens(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return projected features ``[B, T', D]`` up to the longest caption, and the captions' lengths with end token."""
        lengths = self._lengths(ids)
        if torch.compiler.is_compiling():
            return self.text(ids), lengths
        # A GPU is faster with all of them at once.
        size = _CAPTIONS_AT_ONCE if ids.device.type == "cpu" else len(ids)
        order = lengths.argsort()
        parts = [self.text(ids[rows, : max([1, *lengths[rows].tolist()])]) for rows in order.split(size)]
        longest = parts[-1].shape[1]
        tokens = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])
        return tokens[order.argsort()], lengths

    def _lengths(self, ids: Tensor) -> Tensor:
        return caption_lengths(ids, self.config.end_token)

    @property
    def _aggregates(self) -> bool:
        """True if embeddings have aggregated rows."""
        return self.config.trained_aggregators

    def aggregate_image(self, tokens: Tensor) -> Tensor:
        """Aggregate features ``[B, 1 + P, D]``, CLS first, to embeddings ``[B, K + 1, D]``."""
        embeddings: Tensor = self.image_aggregator(tokens[:, 1:], anchor=tokens[:, 0])
        return embeddings

    def aggregate_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Aggregate features ``[B, T, D]`` of captions, with lengths up to the end token, to embeddings ``[B, K + 1, D]``."""
        anchor = _end_tokens(tokens, lengths)
        embeddings: Tensor = self.text_aggregator(
            tokens, anchor=anchor, lengths=aggregated_lengths(lengths, self.config)
        )
        return embeddings

    def gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute the transformers' activations in the backward pass instead of keeping them."""
        for encoder in (self.visual, self.text):
            encoder.transformer.grad_checkpointing = enable


def aggregated_lengths(lengths: Tensor, config: FineLIPConfig) -> Tensor:
    """Number of aggregated tokens of each caption: those before the end token.

    SigLIP has no start token, and an empty caption is its end token alone, which is then aggregated so that all rows have a
    length.
    """
    before = (lengths - 1).clamp(min=0)
    return torch.maximum(before, lengths.clamp(max=1)) if config.family == "siglip" else before


def _end_tokens(tokens: Tensor, lengths: Tensor) -> Tensor:
    """The features ``[B, D]`` of the captions' end tokens; a row without one has no caption and gets zeros."""
    last = (lengths - 1).clamp(min=0)
    features = tokens[torch.arange(tokens.shape[0], device=tokens.device), last]
    return features.masked_fill((lengths == 0)[:, None], 0.0)


def check_pixels(pixels: Tensor, config: FineLIPConfig) -> None:
    """Raise InputError unless the pixels are floating-point numbers ``[B, 3, S, S]`` of the model's size."""
    side = config.image_size
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or pixels.shape[1:] != (3, side, side):
        got = list(pixels.shape) if isinstance(pixels, Tensor) else f"{pixels!r:.80}"
        raise InputError(
            f"expected pixels [B, 3, {side}, {side}], got {got}; use model.preprocess.batch, which takes a list of pictures"
        )
    if not pixels.is_floating_point():
        raise InputError(
            f"expected normalised pixels of a floating dtype, got {pixels.dtype}; use model.preprocess.batch"
        )


def check_ids(ids: Tensor, config: FineLIPConfig) -> None:
    """Raise InputError unless the ids are integers ``[B, T]``, no longer than the model's context, and of its vocabulary.

    Values are not examined on a GPU, which would have to be waited for, or in a graph, which must not depend on them.
    """
    is_sound = isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype in _INTEGERS
    if not is_sound or not 1 <= ids.shape[1] <= config.context_length:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else f"{ids!r:.80}"
        raise InputError(
            f"expected integer ids [B, T] with T in 1..{config.context_length}, got {got}; use finelip_fast.tokenize with "
            "context_length and tokenizer of the model"
        )
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        least, most = (int(end) for end in ids.aminmax())
        if least < 0 or most >= config.vocab_size:
            wrong = least if least < 0 else most
            raise InputError(
                f"expected ids from 0 to {config.vocab_size - 1}, got {wrong}; use the tokenizer of the model, model.tokenizer"
            )


def _encoders(config: FineLIPConfig) -> tuple[ImageEncoder | SigLIPImageEncoder, TextEncoder | SigLIPTextEncoder]:
    """Create the encoders of a model's family, for pictures and for captions."""
    if config.family == "siglip":
        from finelip_fast.siglip import SigLIPImageEncoder, SigLIPTextEncoder  # with timm, which CLIP does without

        return SigLIPImageEncoder(config), SigLIPTextEncoder(config)
    return ImageEncoder(config), TextEncoder(config)
