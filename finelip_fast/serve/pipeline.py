"""The pipeline from texts and pictures to hits, for many requests at once: each stage is a queue that forms batches.

==========  ==================================  ============================================================
stage       what shares a batch                 threads
==========  ==================================  ============================================================
tokenize    texts                               1
decode      nothing: pictures one by one        as many as processors, 8 at most
encode      texts of similar length; pictures   1, shared: two would compete for processors, and
search      the same k, mode, filter, alpha     PyTorch keeps a team of threads for each calling thread
work        nothing: other calls that block     same as decode
==========  ==================================  ============================================================
"""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finelip_fast.errors import ImageError
from finelip_fast.hits import Hits
from finelip_fast.index.search import Mode
from finelip_fast.preprocess import Preprocess
from finelip_fast.serve.batching import Batcher, Observer, Workers
from finelip_fast.serve.settings import ServeSettings
from finelip_fast.tokenizer import encode_batch

if TYPE_CHECKING:
    from finelip_fast.serve.collection import Collection, Found

R = TypeVar("R")

# A CPU gains nothing from larger batches, and the first item of a batch would wait for the last.
_CPU_TOKENS, _CPU_IMAGES, _CPU_QUERIES = 256, 4, 8
_MOST_THREADS = 8
_RECENT_TEXTS = 128
# Numbers of hits that searches are rounded up to, so that they share batches.
_STEPS_OF_K = (1, 10, 20, 30, 50, 100, 200, 300, 500)


@dataclass(frozen=True)
class TextEmbedding:
    """A text as the model read it.

    Attributes:
        embedding: ``[L, D]``.
        tokens: Number of tokens of the whole text, including START and EOT.
        tokens_cut: Number of tokens beyond the context, which were not read.
    """

    embedding: Tensor
    tokens: int
    tokens_cut: int


class _Tokens(NamedTuple):
    ids: Tensor  # of one text, unpadded
    cut: int


class _EncodeKey(NamedTuple):
    kind: str
    length: int


class _SearchKey(NamedTuple):
    k: int
    mode: Mode
    where: str | None
    alpha: float | None


@dataclass(frozen=True)
class _BoundedPreprocess(Preprocess):
    """Preprocessing that refuses a picture with too many pixels, based on its header."""

    max_pixels: int = 0

    def _reduction(self, width: int, height: int) -> tuple[int, int]:
        if width * height > self.max_pixels:
            raise ImageError(f"expected at most {self.max_pixels:,} pixels, got {width} x {height}; shrink it")
        return super()._reduction(width, height)


class Pipeline:
    """Encode and search for many requests at once.

    All methods raise the errors of :meth:`finelip_fast.serve.batching.Batcher.submit`: Overloaded, DeadlineExceeded, Draining.
    ``deadline`` is a time on the event loop's clock.

    Args:
        collection: Items to search, and the engine that made their embeddings.
        settings: ``max_batch``, ``batch_wait`` and ``queue``, and the limit on pixels.
        observer: Observer of batches and queue lengths, by the names of the stages.
        computing: Thread that encodes and searches, preferably the one that opened the collection: PyTorch keeps a team of
            threads for each thread that calls it, and a second team slows the first. None: a new thread.
    """

    def __init__(
        self,
        collection: Collection,
        settings: ServeSettings,
        observer: Observer | None = None,
        computing: Workers | None = None,
    ) -> None:
        self._collection, self._engine = collection, collection.engine
        self._preprocess = _BoundedPreprocess(**vars(self._engine.preprocess), max_pixels=settings.limits.pixels)
        self._on_cpu = self._engine.device.type == "cpu"
        self._recent: OrderedDict[str, TextEmbedding] = OrderedDict()
        several = partial(
            Batcher,
            max_batch=settings.max_batch,
            wait=settings.batch_wait,
            capacity=settings.queue,
            observer=observer,
        )
        several_threads = partial(Workers, count=min(os.cpu_count() or 1, _MOST_THREADS), lasting=False)
        single = partial(several, max_batch=1)
        self._tokenize: Batcher[None, str, _Tokens] = several(self._tokenize_batch, name="tokenize", wait=0.0)
        self._decode: Batcher[None, tuple[str, bytes], Tensor] = single(
            self._decode_batch, name="decode", workers=several_threads("decode")
        )
        self._computing = computing or Workers("compute")
        # Before encoding, so that requests that are nearly done are answered first.
        self._search: Batcher[_SearchKey, Tensor, Found] = several(
            self._search_batch,
            name="search",
            workers=self._computing,
            limit=self._most_searched if self._on_cpu else None,
        )
        self._encode: Batcher[_EncodeKey, Tensor, Tensor] = several(
            self._encode_batch,
            name="encode",
            workers=self._computing,
            limit=self._most_encoded if self._on_cpu else None,
        )
        self._work: Batcher[None, Callable[[], Any], Any] = single(
            self._work_batch, name="work", workers=several_threads("work")
        )

    @property
    def _stages(self) -> tuple[Batcher[Any, Any, Any], ...]:
        """All stages, those that feed others first."""
        return self._tokenize, self._decode, self._encode, self._search, self._work

    async def start(self) -> None:
        """Start the threads; otherwise the first request starts them."""
        for stage in self._stages:
            await stage.start()

    async def close(self) -> None:
        """Answer waiting requests, refuse new ones, and stop the threads."""
        for stage in self._stages:
            await stage.close()
        self._computing.close()

    async def embed_texts(self, texts: Sequence[str], *, deadline: float, recent: bool = True) -> list[TextEmbedding]:
        """Embed texts; texts longer than the context are cut.

        Args:
            texts: Texts, of any lengths.
            deadline: Time at which to give up.
            recent: Whether an embedding computed shortly before may be returned.

        Raises:
            InputError: A text that is too long to tokenize.
        """
        embedded = {text: self._recent[text] for text in texts if text in self._recent} if recent else {}
        missing = list(dict.fromkeys(text for text in texts if text not in embedded))
        tokenized = await self._tokenize.submit(None, missing, deadline=deadline)
        rows = await self._encode.submit_pairs(
            [(_EncodeKey("text", self._rounded(len(tokens.ids))), tokens.ids) for tokens in tokenized],
            deadline=deadline,
        )
        for text, tokens, row in zip(missing, tokenized, rows, strict=True):
            embedded[text] = TextEmbedding(row, len(tokens.ids) + tokens.cut, tokens.cut)
        for text in embedded:
            self._recent[text] = embedded[text]
            self._recent.move_to_end(text)
        while len(self._recent) > _RECENT_TEXTS:
            self._recent.popitem(last=False)
        return [embedded[text] for text in texts]

    async def embed_images(self, images: Sequence[bytes], *, deadline: float) -> list[Tensor]:
        """Return embeddings ``[L, D]`` of encoded pictures.

        Raises:
            ImageError: A picture that cannot be read or has too many pixels; if there are several, the message says which.
        """
        names = [
            f"picture {number} of {len(images)}: " if len(images) > 1 else "" for number, _ in enumerate(images, 1)
        ]
        pixels = await self._decode.submit(None, list(zip(names, images, strict=True)), deadline=deadline)
        return await self._encode.submit(_EncodeKey("image", 0), pixels, deadline=deadline)

    async def search(
        self,
        queries: Sequence[Tensor],
        k: int,
        *,
        mode: Mode = "auto",
        where: str | None = None,
        alpha: float | None = None,
        deadline: float,
    ) -> Found:
        """Search with embeddings.

        Args:
            queries: Embeddings ``[L, D]``, one or more.
            k, mode, where, alpha: The same as for the collection's search; an alpha of None means the collection's.
            deadline: Time at which to give up.

        Raises:
            InputError, StoreError: Whatever the collection raises for these queries.
        """
        at_least = next((step for step in _STEPS_OF_K if step >= k), k)
        alpha = self._collection.alpha if alpha is None else alpha
        key = _SearchKey(at_least, mode, where, alpha)
        results = await self._search.submit(key, queries, deadline=deadline)
        return dataclasses.replace(
            results[0],
            hits=[Hits(result.hits[0][:k]) for result in results],
            covered=min(result.covered for result in results),
            missing={shard: why for result in results for shard, why in result.missing.items()},
        )

    async def run(self, function: Callable[..., R], *args: Any, deadline: float) -> R:
        """Call a function in a separate thread and return its result.

        Raises:
            Exception: Whatever the function raises.
        """
        results: list[R] = await self._work.submit(None, [partial(function, *args)], deadline=deadline)
        return results[0]

    # In threads --------------------------------------------------------------------------------------------------------

    def _tokenize_batch(self, _: None, texts: Sequence[str]) -> list[_Tokens]:
        engine = self._engine
        batch = encode_batch(texts, engine.config.context_length, warn=False, tokenizer=engine.tokenizer)
        lengths, cut = batch.lengths.tolist(), batch.tokens_cut.tolist()
        return [_Tokens(ids[:length].clone(), n) for ids, length, n in zip(batch.ids, lengths, cut, strict=True)]

    def _decode_batch(self, _: None, pictures: Sequence[tuple[str, bytes]]) -> list[Tensor | Exception]:
        return [self._pixels(*picture) for picture in pictures]

    def _pixels(self, name: str, content: bytes) -> Tensor | ImageError:
        try:
            return self._preprocess(content)
        except ImageError as error:
            return ImageError(f"{name}{error}")

    def _encode_batch(self, key: _EncodeKey, items: Sequence[Tensor]) -> list[Tensor]:
        if key.kind == "image":
            embedded = self._engine.encode_image(torch.stack(list(items)))
        else:
            embedded = self._engine.encode_text(pad_sequence(list(items), batch_first=True))
        return [row.clone() for row in embedded]  # so that no row keeps the whole batch in memory

    def _search_batch(self, key: _SearchKey, queries: Sequence[Tensor]) -> list[Found]:
        results = self._collection.search(
            torch.stack(list(queries)), key.k, mode=key.mode, where=key.where, alpha=key.alpha
        )
        return [dataclasses.replace(results, hits=[hits]) for hits in results.hits]

    def _work_batch(self, _: None, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        return [call() for call in calls]

    # How batches are formed --------------------------------------------------------------------------------------------

    def _rounded(self, length: int) -> int:
        """Return the length that a text is padded to at most; a call costs about as much as 16 tokens."""
        if not self._on_cpu:
            return 0  # a GPU gains more from full batches than it loses to padding
        step = max(16, 1 << length.bit_length() - 2)
        return -(-length // step) * step

    def _most_encoded(self, key: _EncodeKey) -> int:
        return _CPU_IMAGES if key.kind == "image" else _CPU_TOKENS // key.length

    def _most_searched(self, _: _SearchKey) -> int:
        return _CPU_QUERIES
