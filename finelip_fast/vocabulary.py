"""Tokenizers: CLIP's byte-level BPE, or a checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import html
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from finelip_fast.config import EOT_TOKEN, START_TOKEN
from finelip_fast.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import Tokenizer as Parsed

# Repairing text takes time quadratic in the length of a line, byte pairs in that of a word, so lines and words longer than
# these are processed in pieces. Few words that people write come near, and everything else takes linear time.
_LINE, _WORD = 4096, 256

_PIECES = re.compile(rf"[\s\S]{{1,{_LINE - 1}}}(?:\s|\Z)|[\s\S]{{1,{_LINE}}}")
_SOUND = re.compile(r"[\t\n\f\r -%'-~]*")  # characters that are never repaired
_LONG_NUMBER = re.compile(r"&#[0-9]{1000,};?")  # of no character, and with more digits than Python reads
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Tokenizer(ABC):
    """A converter of a caption's text to tokens.

    Attributes:
        start: Tokens before the text; empty if there are none.
        end: Token after the text.
        splits_at_blanks: Whether tokens never span words, so that the token counts of parts of a text add up.
    """

    start: tuple[int, ...]
    end: int
    splits_at_blanks: bool

    @abstractmethod
    def tokens(self, text: str) -> list[int]:
        """Return the text's own tokens, without start and end; the end token is never among them."""


class _ClipBPE(Tokenizer):
    """CLIP's byte-level BPE, after CLIP's cleaning of the text."""

    start, end, splits_at_blanks = (START_TOKEN,), EOT_TOKEN, True

    def tokens(self, text: str) -> list[int]:
        tokens: list[int] = []
        for token in _bpe().encode(text):
            # The vocabulary reads a special token's name as the token itself: an EOT inside a caption would end it there.
            tokens += _spelled_out(token) if token in (START_TOKEN, EOT_TOKEN) else [token]
        return tokens

    def __repr__(self) -> str:
        return "CLIP_BPE"

    def __reduce__(self) -> str:
        return "CLIP_BPE"


CLIP_BPE = _ClipBPE()


class FileTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the package ``tokenizers``, after SigLIP's cleaning of the text.

    As for CLIP, mojibake is repaired and HTML entities are resolved; then ASCII punctuation is removed, white space is
    collapsed, and letters become lower case, as when SigLIP was trained.

    Args:
        content: Content of the file.
        end: Id of the end token.
        vocab_size: Number of ids that the model has embeddings for.
        source: Name of the file in messages.
    """

    start, splits_at_blanks = (), False

    def __init__(self, content: bytes, end: int, vocab_size: int, source: str = "tokenizer.json") -> None:
        self.content, self.end, self.vocab_size, self.source = content, end, vocab_size, source

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, in hex."""
        return hashlib.sha256(self.content).hexdigest()

    def tokens(self, text: str) -> list[int]:
        text = " ".join(_repaired(text).replace("_", " ").translate(_PUNCTUATION).lower().split())
        ids = self._encode(text, add_special_tokens=False)
        # Characters that the file normalises, such as full-width letters, can still spell out the end token.
        return [token for token in ids if token != self.end]

    @cached_property
    def parsed(self) -> Parsed:
        """The tokenizer that the file describes.

        Raises:
            CheckpointError: The file describes no tokenizer, or one with ids that the model does not have.
            InputError: The package ``tokenizers`` is not installed.
        """
        try:
            from tokenizers import Tokenizer as Parsed
        except ImportError:
            raise InputError(
                f"{self.source} needs the package tokenizers: pip install 'finelip-fast[siglip]'"
            ) from None
        with self._faults_named():
            parsed = Parsed.from_buffer(self.content)
        parsed.no_truncation()
        parsed.no_padding()
        largest = max(parsed.get_vocab().values(), default=-1)
        if not 0 <= max(largest, self.end) < self.vocab_size:
            raise CheckpointError(
                f"{self.source}: expected ids below {self.vocab_size}, which the model has embeddings of, found {largest}: "
                "it is another model's tokenizer"
            )
        return parsed

    def added(self) -> list[int]:
        """Return the tokens that the file adds to a text: an end token in SigLIP's."""
        return self._encode("", add_special_tokens=True)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        parsed = self.parsed
        with self._faults_named():
            ids: list[int] = parsed.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic is not an Exception
            raise CheckpointError(f"{self.source}: expected a tokenizer, found {error!s:.200}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return FileTokenizer, (self.content, self.end, self.vocab_size, self.source)


@cache
def _spelled_out(token: int) -> list[int]:
    """The tokens of a special token's name as plain text; the blank after "<" keeps it from being recognised."""
    tokens: list[int] = _bpe().encode(_bpe().decoder[token].replace("<", "< "))
    return tokens


@cache
def _bpe() -> SimpleTokenizer:
    """CLIP's BPE with its vocabulary. Imported on first use, since importing open_clip takes seconds."""
    import regex
    from open_clip.tokenizer import SimpleTokenizer

    bpe = SimpleTokenizer()
    bpe.clean_fn = _cleaned  # pyright: ignore[reportAttributeAccessIssue]  # it names the argument otherwise
    bpe.pat = regex.compile(bpe.pat.pattern.replace("]+", f"]{{1,{_WORD}}}"), regex.IGNORECASE)
    return bpe


def _cleaned(text: str) -> str:
    """Text cleaned as open_clip does for CLIP: repaired, white space collapsed, lower case."""
    return " ".join(_repaired(text).split()).lower()


def _repaired(text: str) -> str:
    """Text with its mojibake repaired and its HTML entities resolved."""
    from ftfy import fix_text

    if not _SOUND.fullmatch(text):
        text = "".join(map(fix_text, _PIECES.findall(text)))
    for _ in range(2):
        text = html.unescape(_LONG_NUMBER.sub("\ufffd", text))
    return text
