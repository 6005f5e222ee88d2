"""Captions to token ids at long context: by CLIP's byte-level BPE, or by a checkpoint's own ``tokenizer.json``.

A caption of ``n`` tokens is ``START, its text, EOT``, or ``its text, END`` for a tokenizer without a start token. Captions
longer than the context are cut with the EOT kept, refused, or split into windows that end with sentences; in every case the
caller can tell what happened to which caption.
"""

from __future__ import annotations

import re
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from finelip_fast._arguments import one_of
from finelip_fast.errors import InputError, TruncationWarning
from finelip_fast.vocabulary import CLIP_BPE, FileTokenizer, Tokenizer

__all__ = [
    "CLIP_BPE",
    "FileTokenizer",
    "Overflow",
    "TokenBatch",
    "Tokenizer",
    "encode_batch",
    "expected_truncation",
    "token_spans",
    "tokenize",
]

Overflow = Literal["truncate", "error", "window"]

MAX_CHARACTERS = 1 << 18

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@contextmanager
def expected_truncation() -> Iterator[None]:
    """Silence :class:`TruncationWarning` where captions are cut on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        yield


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Token ids of a batch of captions, and how the long ones were treated.

    ``W`` rows hold ``B_t`` captions: one row each, or several for a caption split into windows.

    Attributes:
        ids: ``[W, T]`` int64, zero after each row's EOT.
        lengths: ``[W]`` int64, the number of tokens of each row from START to EOT; the EOT is at ``lengths - 1``.
        owner: ``[W]`` int64, the caption that each row belongs to: ascending, a caption's windows side by side.
        tokens_cut: ``[B_t]`` int64, the number of tokens that each caption lost to truncation; 0 if it is whole.
    """

    ids: Tensor
    lengths: Tensor
    owner: Tensor
    tokens_cut: Tensor

    @property
    def n_cut(self) -> int:
        """Number of captions that were cut."""
        return int(self.tokens_cut.count_nonzero())


def tokenize(
    texts: str | Iterable[str],
    context_length: int = 256,
    *,
    overflow: Literal["truncate", "error"] = "truncate",
    tokenizer: Tokenizer = CLIP_BPE,
) -> Tensor:
    """Convert captions to token ids, one row each.

    Text is cleaned: mojibake is repaired, HTML entities are resolved, white space is collapsed, and letters become lower case;
    SigLIP's tokenizers also remove punctuation. An empty caption is ``[START, EOT]``, and ``[EOT]`` alone for a tokenizer
    without a start token. A special token spelled out in a caption is plain text and never ends it.

    Args:
        texts: One caption, or an iterable of captions.
        context_length: Row width ``T``, at least 3.
        overflow: Treatment of captions of more than ``context_length`` tokens: ``"truncate"`` cuts them, makes the last
            remaining token the EOT and warns once per call; ``"error"`` refuses them.
        tokenizer: Tokenizer of the model, ``model.tokenizer``. Default: CLIP's, which all checkpoints but SigLIP's use.

    Returns:
        int64 ``[B_t, T]``, zero-padded.

    Raises:
        InputError: A caption is not a string, is longer than 262,144 characters or, with ``overflow="error"``, than the
            context; or an argument is out of range.

    Warns:
        TruncationWarning: Captions were cut; the message gives their number and the largest loss.
    """
    one_of("overflow", overflow, get_args(Overflow))
    if str(overflow) == "window":  # from a caller without type checks
        raise InputError(
            "expected overflow='truncate' or 'error', got 'window', which can return several rows per text; "
            "use encode_batch, which also returns the text that each row belongs to"
        )
    batch = _encode(texts, context_length, overflow, tokenizer)
    _warn_if_cut(batch)
    return batch.ids


def encode_batch(
    texts: str | Iterable[str],
    context_length: int = 256,
    *,
    overflow: Overflow = "truncate",
    warn: bool = True,
    tokenizer: Tokenizer = CLIP_BPE,
) -> TokenBatch:
    """Convert captions to token ids, with lengths and an account of the long ones.

    Args:
        texts: One caption, or an iterable of captions.
        context_length: Row width ``T``, at least 3.
        overflow: ``"truncate"`` and ``"error"`` as in :func:`tokenize`. ``"window"`` splits a long caption into as few rows
            as its sentences allow, of about equal length, each with its own START and EOT; together they hold every token of
            the text in order. A sentence that is longer than a row is split, too.
        warn: Whether to warn about captions that were cut.
        tokenizer: Tokenizer of the model.

    Returns:
        A :class:`TokenBatch`. A caption that fits has exactly one row, the same for every ``overflow``.

    Raises:
        InputError: The same as for :func:`tokenize`.

    Warns:
        TruncationWarning: The same as for :func:`tokenize`.
    """
    batch = _encode(texts, context_length, overflow, tokenizer)
    if warn:
        _warn_if_cut(batch)
    return batch


def _encode(texts: str | Iterable[str], context_length: int, overflow: Overflow, tokenizer: Tokenizer) -> TokenBatch:
    check_overflow(overflow)
    _check_context(context_length)
    rows: list[list[int]] = []
    owner: list[int] = []
    tokens_cut: list[int] = []
    for caption, text in enumerate(_as_list(texts)):
        tokens = [*tokenizer.start, *tokenizer.tokens(text), tokenizer.end]
        excess = max(0, len(tokens) - context_length)
        if excess and overflow == "error":
            raise InputError(
                f"expected texts of at most {context_length} tokens, got {len(tokens)} at position {caption}; "
                "shorten it, raise context_length if the model allows, or pass overflow='truncate'"
            )
        if overflow == "window":
            parts = _windows(text, tokens, context_length, tokenizer)
        else:
            parts = [[*tokens[: context_length - 1], tokenizer.end] if excess else tokens]
        rows += parts
        owner += [caption] * len(parts)
        tokens_cut.append(excess if overflow == "truncate" else 0)

    ids = torch.zeros(len(rows), context_length, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return TokenBatch(
        ids=ids,
        lengths=torch.tensor([len(row) for row in rows], dtype=torch.int64),
        owner=torch.tensor(owner, dtype=torch.int64),
        tokens_cut=torch.tensor(tokens_cut, dtype=torch.int64),
    )


def _windows(caption: str, tokens: list[int], context_length: int, tokenizer: Tokenizer) -> list[list[int]]:
    """The caption itself if it fits, else rows that end where sentences do."""
    start, end = tokenizer.start, tokenizer.end
    text, room = tokens[len(start) : -1], context_length - len(start) - 1
    if len(text) <= room:
        return [tokens]
    sizes = [_size(sentence, tokenizer) for sentence in SENTENCE_END.split(caption)]
    if sum(sizes) != len(text):  # a repair, or a token, spans the end of a sentence
        sizes = [len(text)]
    return [[*start, *text[first:last], end] for first, last in even_spans(sizes, room)]


def even_spans(sizes: list[int], room: int) -> list[tuple[int, int]]:
    """Spans of up to ``room`` tokens: as few as sentences of these sizes allow, then the longest as short as possible.

    A sentence that is longer is split evenly.
    """
    edges = [0]
    for size in filter(None, sizes):
        parts = -(-size // room)
        edges += [edges[-1] + size * part // parts for part in range(1, parts + 1)]
    shortest = max(end - start for start, end in pairwise(edges))
    fewest = len(_packed(edges, room))
    lengths = range(shortest, room + 1)
    return _packed(edges, lengths[bisect_left(lengths, True, key=lambda length: len(_packed(edges, length)) <= fewest)])


def _packed(edges: list[int], length: int) -> list[tuple[int, int]]:
    """Spans from edge to edge of up to ``length`` each; no two neighbouring edges are further apart than that."""
    starts = [edges[0]]
    for before, edge in pairwise(edges):
        if edge - starts[-1] > length:
            starts.append(before)
    return list(pairwise([*starts, edges[-1]]))


def token_spans(
    caption: str, spans: Iterable[tuple[int, int]], tokenizer: Tokenizer = CLIP_BPE
) -> list[tuple[int, int]]:
    """Locate spans of a caption among its tokens.

    Args:
        caption: The text, as given to :func:`tokenize`.
        spans: ``(start, end)`` in characters, each of whole words.
        tokenizer: Tokenizer of the model.

    Returns:
        ``(first, last + 1)`` of the token row for each span; CLIP's START is position 0.
    """
    spans = list(spans)
    cuts = sorted({0, len(caption), *(edge for span in spans for edge in span)})
    before = len(tokenizer.start)
    position, count = {0: before}, before
    if tokenizer.splits_at_blanks:
        for start, end in pairwise(cuts):
            count += _size(caption[start:end], tokenizer)
            position[end] = count
    # Mojibake may be repaired across a blank.
    if not tokenizer.splits_at_blanks or (not caption.isascii() and count != before + _size(caption, tokenizer)):
        ends = cuts[::-1]
        counts = (before + _size(caption[:end], tokenizer) for end in ends)
        position = dict(zip(ends, accumulate(counts, min), strict=True))
    return [(position[start], position[end]) for start, end in spans]


@lru_cache(maxsize=1 << 16)  # words recur, and repairing text is slow
def _size(text: str, tokenizer: Tokenizer) -> int:
    """Number of tokens in a piece of text."""
    return len(tokenizer.tokens(text))


def _as_list(texts: str | Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, bytes):
        raise InputError(f"expected a str or a list of them, got {type(texts).__name__}; convert it first")
    captions = list(texts)
    for number, text in enumerate(captions):
        check_caption(text, number)
    return captions


def check_caption(text: Any, number: int) -> None:
    """
    Raises:
        InputError: The caption is not a string, or is too long; the message gives its ``number``.
    """
    if not isinstance(text, str):
        raise InputError(
            f"expected each text to be a str, got {type(text).__name__} at position {number}; "
            'convert it to a str ("" stands for no text)'
        )
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"expected texts of at most {MAX_CHARACTERS} characters, got {len(text)} at position {number}; shorten it"
        )


def check_overflow(overflow: Any) -> None:
    """
    Raises:
        InputError: The value is none of ``"truncate"``, ``"error"`` and ``"window"``.
    """
    one_of("overflow", overflow, get_args(Overflow))


def _check_context(context_length: Any) -> None:
    if not isinstance(context_length, int) or not 3 <= context_length <= MAX_CHARACTERS:
        raise InputError(
            f"expected context_length to be an int from 3 (START, one token, EOT) to {MAX_CHARACTERS}, got "
            f"{context_length!r:.80}; pass the model's own, such as 256"
        )


def _warn_if_cut(batch: TokenBatch) -> None:
    if batch.n_cut == 0:
        return
    were, pronoun = ("was", "it") if batch.n_cut == 1 else ("were", "them")
    lost = int(batch.tokens_cut.max())
    warnings.warn(
        f"{batch.n_cut} of {len(batch.tokens_cut)} texts exceeded {batch.ids.shape[1]} tokens and {were} cut; "
        f"the longest lost {lost} token{'s' * (lost > 1)}. Shorten {pronoun}, or pass overflow='window' (Retriever, "
        f"encode_batch) to read all of {pronoun}, or overflow='error' to raise an error.",
        TruncationWarning,
        stacklevel=3,  # the caller of the public function
    )
