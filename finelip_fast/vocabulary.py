"""Tokenizers: CLIP's byte-level BPE, or a checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

import gzip
import hashlib
import html
import re
import string
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finelip_fast.config import EOT_TOKEN, START_TOKEN, VOCAB_SIZE
from finelip_fast.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Parsed

# The file of CLIP's vocabulary, the number of its merges that CLIP uses, and the mark of a word's last symbol.
_FILE, _MERGES, _WORD_END = "bpe_simple_vocab_16e6.txt.gz", VOCAB_SIZE - 2 * 256 - 2, "</w>"
_SPECIAL = ("<start_of_text>", "<end_of_text>")
_KEPT_WORDS = 1 << 15  # whose tokens are remembered

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
        return _bpe().encode(_cleaned(text))

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


class _BytePairs:
    """CLIP's vocabulary and its merges (Sennrich et al., arXiv 1508.07909), from the file that comes with open_clip.

    open_clip reads it, too, but takes two seconds to import, which every search by text would wait for.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        import regex  # the standard library's expressions have no classes of letters and numbers

        merges = [tuple(line.split()) for line in lines]
        # Bytes are spelled as characters that can be printed; the vocabulary begins with those that are themselves such.
        printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        unprinted = [byte for byte in range(256) if byte not in printed]
        self._letters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + n) for n, byte in enumerate(unprinted)}
        symbols = [
            *self._letters.values(),
            *(letter + _WORD_END for letter in self._letters.values()),
            *map("".join, merges),
        ]
        self._ids = {symbol: number for number, symbol in enumerate(symbols)}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._tokens = lru_cache(maxsize=_KEPT_WORDS)(self._merge)
        names = "|".join(_SPECIAL)
        self._words = regex.compile(
            rf"{names}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}{{1,{_WORD}}}|\p{{N}}|[^\s\p{{L}}\p{{N}}]{{1,{_WORD}}}",
            regex.IGNORECASE,
        )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a cleaned text; the name of a special token is text like any other."""
        tokens: list[int] = []
        for word in self._words.findall(text):
            tokens += self.encode(word.replace("<", "< ")) if word in _SPECIAL else self._tokens(word)
        return tokens

    def _merge(self, word: str) -> tuple[int, ...]:
        symbols = [self._letters[byte] for byte in word.encode()]
        symbols[-1] += _WORD_END
        while len(symbols) > 1:
            first, second = min(pairwise(symbols), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if (first, second) not in self._ranks:
                break
            merged: list[str] = []
            for symbol in symbols:
                if merged and symbol == second and merged[-1] == first:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            symbols = merged
        return tuple(self._ids[symbol] for symbol in symbols)


@cache
def _bpe() -> _BytePairs:
    """CLIP's vocabulary.

    Raises:
        CheckpointError: open_clip is not installed, or brings no vocabulary.
    """
    package = find_spec("open_clip")
    path = Path((package and package.origin) or "open_clip").with_name(_FILE)
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 1 + _MERGES]  # the first is a comment
        if len(lines) < _MERGES:
            raise EOFError(f"{len(lines)} lines")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: expected CLIP's vocabulary, which open_clip brings, got {getattr(error, 'strerror', None) or error}; "
            "pip install --force-reinstall open_clip_torch"
        ) from error
    return _BytePairs(lines)


def _cleaned(text: str) -> str:
    """Text cleaned as open_clip does for CLIP: repaired, white space collapsed, lower case."""
    return " ".join(_repaired(text).split()).lower()


def _repaired(text: str) -> str:
    """Text with its mojibake repaired and its HTML entities resolved."""
    if not _SOUND.fullmatch(text):
        from ftfy import fix_text  # takes a quarter of a second

        text = "".join(map(fix_text, _PIECES.findall(text)))
    for _ in range(2):
        text = html.unescape(_LONG_NUMBER.sub("\ufffd", text))
    return text
