"""Pairs as tensors, individually and in batches."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finelip_fast.datasets import Example
from finelip_fast.errors import InputError
from finelip_fast.tokenizer import CLIP_BPE, Tokenizer, encode_batch, expected_truncation, token_spans

# A sentence, from its first word to its end, and a phrase: several words up to a comma, semicolon or colon.
_SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s)|\Z)", re.DOTALL)
_PHRASE = re.compile(r"\w[^\s,;:]*(?:\s+[^\s,;:]+)+")


class Encoding(NamedTuple):
    """One pair as tensors.

    Attributes:
        pixels: ``[3, H, W]``.
        ids: int64 ``[T]``.
        length: Number of the caption's tokens in ``ids``, including the end token.
        image_id: 63 bits; equal for pairs with the same picture.
        spans: int64 ``[R, 2]``, the tokens ``first .. last + 1`` of each phrase with a known place in the picture.
        boxes: float32 ``[R, 4]``, these places: ``x0, y0, x1, y1`` in [0, 1].
        labels: int64 ``[R]``, equal for phrases that describe the same thing.
        parts: int64 ``[S, 2]``, the tokens of each sentence of the caption and, if a sentence has several phrases between
            commas, of each of these.
        is_cut: Whether the caption was longer than the context.
        broken: Pairs tried before this one that could not be read, with the reasons.
        tokens: Precomputed features ``[T, D]`` of the caption, if any; ``pixels`` then holds those of the picture,
            ``[1 + P, D]``.
    """

    pixels: Tensor
    ids: Tensor
    length: int
    image_id: int
    spans: Tensor
    boxes: Tensor
    labels: Tensor
    parts: Tensor
    is_cut: bool
    broken: Sequence[str] = ()
    tokens: Tensor | None = None


@dataclass
class Batch:
    """``B`` pairs, ready for the model; ``R`` of their phrases have a known place in the picture.

    Attributes:
        pixels: ``[B, 3, H, W]``.
        ids: int64 ``[B, T]``.
        image_ids: int64 ``[B]``; equal for pairs with the same picture.
        owners: int64 ``[R]``, the pair that each phrase belongs to.
        spans, boxes, labels: ``[R, 2]``, ``[R, 4]``, ``[R]``, as in :class:`Encoding`.
        part_owners: int64 ``[S]``, the pair that each part of a caption belongs to.
        parts: int64 ``[S, 2]``, as in :class:`Encoding`.
        captions_cut: Number of captions longer than the context.
        broken: Pairs that could not be read, with the reasons.
        sample_counts: Sample up to which each shard was read for this batch, by number of the shard.
        tokens: Precomputed features ``[B, T, D]`` of the captions, if any; ``pixels`` then holds those of the pictures,
            ``[B, 1 + P, D]``.

    A batch without pairs only reports what could not be read.
    """

    pixels: Tensor
    ids: Tensor
    image_ids: Tensor
    owners: Tensor
    spans: Tensor
    boxes: Tensor
    labels: Tensor
    part_owners: Tensor
    parts: Tensor
    captions_cut: int
    broken: list[str]
    sample_counts: dict[int, int] = field(default_factory=dict)
    tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with every tensor changed, for example moved to a device."""
        changed: Any = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by the data loader)."""
        return self.map(Tensor.pin_memory)


def encode_example(
    example: Example, preprocess: Callable[[Any], Tensor], context_length: int, tokenizer: Tokenizer = CLIP_BPE
) -> Encoding:
    """Encode a pair as tensors, leaving out phrases and parts that lie even partly beyond the context.

    Raises:
        ImageError: The picture cannot be read.
        InputError: The caption is empty or unreasonably long.
    """
    if not example.caption.strip():
        raise InputError("expected a caption, got none")
    with expected_truncation():
        tokens = encode_batch([example.caption], context_length, tokenizer=tokenizer)
    stretches = [(region.start, region.end) for region in example.regions]
    spans = token_spans(example.caption, stretches + _parts(example.caption), tokenizer)
    parts = [span for span in spans[len(stretches) :] if span[0] < span[1] < context_length]
    known = [
        (span, region)
        for span, region in zip(spans[: len(stretches)], example.regions, strict=True)
        if span[0] < span[1] < context_length
    ]
    return Encoding(
        preprocess(example.image),
        tokens.ids[0],
        int(tokens.lengths[0]),
        _number(example.image_id),
        torch.tensor([span for span, _ in known], dtype=torch.int64).reshape(-1, 2),
        torch.tensor([region.box for _, region in known], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([_number(region.label) for _, region in known], dtype=torch.int64),
        torch.tensor(parts, dtype=torch.int64).reshape(-1, 2),
        is_cut=tokens.n_cut > 0,
    )


def _parts(caption: str) -> list[tuple[int, int]]:
    """Character ranges of a caption's sentences and, if a sentence has several, of its phrases between commas."""
    parts = []
    for sentence in _SENTENCE.finditer(caption):
        parts.append(sentence.span())
        phrases = [phrase.span() for phrase in _PHRASE.finditer(caption, *sentence.span())]
        parts += phrases if len(phrases) > 1 else []
    return parts


def _number(name: str) -> int:
    """Hash a name to 63 bits."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def collate(items: Sequence[Encoding]) -> Batch:
    """Stack examples into a batch, with the ids cut to the longest caption."""
    ids = torch.stack([item.ids for item in items])
    longest = max(item.length for item in items)
    phrases = torch.tensor([len(item.spans) for item in items])
    tokens = [item.tokens for item in items if item.tokens is not None]
    return Batch(
        torch.stack([item.pixels for item in items]),
        ids[:, :longest],
        torch.tensor([item.image_id for item in items]),
        torch.arange(len(items)).repeat_interleave(phrases),
        torch.cat([item.spans for item in items]),
        torch.cat([item.boxes for item in items]),
        torch.cat([item.labels for item in items]),
        torch.arange(len(items)).repeat_interleave(torch.tensor([len(item.parts) for item in items])),
        torch.cat([item.parts for item in items]),
        sum(item.is_cut for item in items),
        [reason for item in items for reason in item.broken],
        tokens=pad_sequence(tokens, batch_first=True) if tokens else None,
    )
