"""Encoding lists of pictures or captions in batches: the one loop that engines, training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from finelip_fast.aggregator import join_windows
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import CLIP_BPE, Overflow, TokenBatch, Tokenizer, encode_batch

T = TypeVar("T")


def embed_images(
    encode_image: Callable[[Tensor], Tensor], preprocess: Preprocess, images: Iterable[Any], *, batch_size: int = 64
) -> Tensor:
    """Embed pictures.

    Args:
        encode_image: Function from pixels ``[B, 3, H, W]`` on the CPU to embeddings ``[B, L, D]``.
        preprocess: Preprocessing that turns a picture into pixels.
        images: Anything that :func:`finelip_fast.preprocess.open_image` takes; read batch by batch.
        batch_size: Number of pictures encoded at once.

    Returns:
        ``[N, L, D]`` on the encoder's device.
    """
    return torch.cat([encode_image(preprocess.batch(batch)) for batch in _batches(images, batch_size)])


def embed_texts(
    encode_text: Callable[[Tensor], Tensor],
    texts: Sequence[str],
    *,
    context_length: int,
    batch_size: int = 64,
    overflow: Overflow = "truncate",
    tokenizer: Tokenizer = CLIP_BPE,
) -> Tensor:
    """Embed captions, in order of length so that batches hold little padding; results are returned in the given order.

    Args:
        encode_text: Function from ids ``[B, T]`` on the CPU to embeddings ``[B, L, D]``.
        texts: Captions, at least one.
        context_length: Maximum length of a sequence in tokens.
        batch_size: Number of sequences encoded at once.
        overflow: Treatment of longer captions: ``"truncate"``, ``"error"`` or ``"window"``
            (see :func:`finelip_fast.tokenize`).
        tokenizer: Tokenizer of the model.

    Returns:
        ``[N, L, D]`` on the encoder's device.

    Raises:
        InputError: A caption is too long under ``overflow="error"``.
    """
    batch = encode_batch(texts, context_length, overflow=overflow, tokenizer=tokenizer)
    return embed_tokens(encode_text, batch, batch_size=batch_size)


def embed_tokens(encode_text: Callable[[Tensor], Tensor], batch: TokenBatch, *, batch_size: int = 64) -> Tensor:
    """Embed tokenised captions, in order of length; windows of one caption are joined.

    Args:
        encode_text: Function from ids ``[B, T]`` on the CPU to embeddings ``[B, L, D]``.
        batch: Token ids of at least one caption.
        batch_size: Number of sequences encoded at once.

    Returns:
        ``[N, L, D]`` on the encoder's device, in the captions' order.
    """
    order = batch.lengths.argsort(stable=True)
    rows = torch.cat([encode_text(batch.ids[numbers]) for numbers in torch.split(order, batch_size)])
    restored = torch.empty_like(rows)
    restored[order.to(rows.device)] = rows
    return join_windows(restored, batch.owner.to(rows.device))


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
