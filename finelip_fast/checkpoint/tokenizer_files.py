"""Tokenizers stored beside weights: our own, and those of open_clip's SigLIP models as transformers writes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from finelip_fast._files import read_bytes
from finelip_fast._json import parse_json
from finelip_fast.config import FineLIPConfig
from finelip_fast.errors import CheckpointError
from finelip_fast.tokenizer import CLIP_BPE, FileTokenizer, Tokenizer

TOKENIZER = "tokenizer.json"
# The tokenizer, which determines the end token, and the files that name the padding token.
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")
# If there is no maximum length, transformers writes about 10 ** 30, which is too large to be read as a number.
_UNBOUNDED = re.compile(rb'("model_max_length"\s*:)\s*\d{19,}')
_MAX_TOKENIZER, _MAX_CONFIG = 1 << 27, 1 << 24  # bytes; a vocabulary of 256,000 pieces takes 34 MB


def own_tokenizer(folder: Path, config: FineLIPConfig) -> Tokenizer:
    """Open the tokenizer of a folder in our format.

    Raises:
        CheckpointError: The file that the configuration names is missing or different.
    """
    if not config.tokenizer:
        return CLIP_BPE
    path = folder / TOKENIZER
    tokenizer = FileTokenizer(_content(path), config.end_token, config.vocab_size, str(path))
    if tokenizer.sha256 != config.tokenizer:
        raise CheckpointError(
            f"{path}: expected the tokenizer of SHA-256 {config.tokenizer}, with which the checkpoint was written, found "
            f"{tokenizer.sha256}; get it again from where the checkpoint came from"
        )
    return tokenizer


def foreign_tokenizer(folder: Path, config: FineLIPConfig) -> tuple[FineLIPConfig, Tokenizer]:
    """Open the tokenizer of a SigLIP model, and add its tokens to the configuration.

    Raises:
        CheckpointError: It is missing, damaged, for another model, or adds more than an end token to a caption.
    """
    path = folder / TOKENIZER
    content = _content(path)
    about: dict[str, Any] = {}
    for name in reversed(TOKENIZER_FILES[1:]):  # the first one takes precedence
        if (folder / name).is_file():
            about |= _about(folder / name)
    tokenizer = FileTokenizer(content, 0, config.vocab_size, str(path))
    added = tokenizer.added()
    if len(added) != 1:
        raise CheckpointError(
            f"{path}: expected a tokenizer as SigLIP's, which adds an end token to a caption and nothing else, found one that "
            f"adds the tokens {added!r:.80}"
        )
    if about.get("padding_side", "right") != "right":
        raise CheckpointError(
            f"{path}: expected padding_side 'right', as SigLIP's, found {about['padding_side']!r:.40}"
        )
    token = about.get("pad_token")
    text = token.get("content") if isinstance(token, dict) else token
    padding = tokenizer.parsed.token_to_id(text) if isinstance(text, str) else None
    if padding is None:
        raise CheckpointError(
            f"{path}: expected pad_token in {' or '.join(TOKENIZER_FILES[1:])} to be one of its tokens, found {text!r:.80}"
        )
    tokenizer.end = added[0]
    return config.replace(end_token=added[0], pad_token=padding, tokenizer=tokenizer.sha256), tokenizer


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; a SigLIP needs its tokenizer beside the weights: put {', '.join(TOKENIZER_FILES[:2])} "
            "there, from where the weights came from"
        )
    return read_bytes(path, error=CheckpointError, max_bytes=_MAX_TOKENIZER)


def _about(path: Path) -> dict[str, Any]:
    content = read_bytes(path, error=CheckpointError, max_bytes=_MAX_CONFIG)
    about: dict[str, Any] = parse_json(
        _UNBOUNDED.sub(rb"\1 null", content), path, error=CheckpointError, expected="JSON about a tokenizer", kind=dict
    )
    return about
