"""Stand-in for the pipeline and the collection: one call after another, in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from finelip_fast.explain import Explanation
from finelip_fast.hits import thumbnail
from finelip_fast.index.catalogue import Item
from finelip_fast.index.search import Mode
from finelip_fast.retriever import Retriever
from finelip_fast.serve.collection import Added, Collection, Found, Upload
from finelip_fast.serve.settings import ServeSettings
from finelip_fast.tokenizer import encode_batch, expected_truncation

T = TypeVar("T")


@dataclass(frozen=True)
class TextEmbedding:
    embedding: Tensor
    tokens: int
    tokens_cut: int


class RetrieverCollection:
    def __init__(self, retriever: Retriever, uploads: Path | None = None) -> None:
        self._retriever = retriever
        self.engine, self.alpha, self.writable = retriever.engine, retriever.alpha, uploads is not None

    def __len__(self) -> int:
        return len(self._retriever)

    def version(self) -> int:
        return self._retriever.index.version

    def search(
        self, queries: Tensor, k: int, *, mode: Mode = "auto", where: str | None = None, alpha: float | None = None
    ) -> Found:
        return Found(self._retriever.search_embeddings(queries, k=k, mode=mode, where=where, alpha=alpha))

    def embeddings_of(self, ids: Sequence[str]) -> dict[str, Tensor]:
        index = self._retriever.index
        rows = dict(zip(index.ids, index.embeddings.float(), strict=True))
        return {id: rows[id] for id in ids if id in rows}

    def items(
        self, *, where: str | None = None, limit: int = 100, after: str | None = None
    ) -> tuple[list[Item], str | None]:
        start = int(after or 0)
        items = list(self._retriever.index.items(where=where))
        return items[start : start + limit], str(start + limit) if start + limit < len(items) else None

    def fields(self) -> list[Any]:
        return []

    def picture(self, id: str) -> Path | None:
        item = self._retriever.index.get([id]).get(id)
        root = self._retriever.index.root
        if item is None or root is None:
            return None
        path = root / item.id
        return path if path.is_file() else None

    def explain(self, image: bytes | Path, text: str) -> Explanation:
        return self._retriever.explain(image, text)

    def add(self, uploads: Sequence[Upload]) -> list[Added]:
        report = self._retriever.add_images(
            [upload.content for upload in uploads],
            ids=[upload.name for upload in uploads],
            metadata=[upload.metadata for upload in uploads],
            progress=False,
        )
        return [Added(upload.name if upload.name in report.added else None, upload.name) for upload in uploads]

    def delete(self, ids: Sequence[str]) -> None:
        self._retriever.delete(ids)


class Pipeline:
    def __init__(self, collection: Collection, settings: ServeSettings, observer: Any = None) -> None:
        self.collection = collection

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def embed_texts(self, texts: Sequence[str], *, deadline: float, recent: bool = True) -> list[TextEmbedding]:
        def embed() -> list[TextEmbedding]:
            engine = self.collection.engine
            with expected_truncation():
                batch = encode_batch(list(texts), engine.config.context_length)
                rows = engine.embed_texts(texts)
            return [
                TextEmbedding(row, int(length) + int(cut), int(cut))
                for row, length, cut in zip(rows, batch.lengths, batch.tokens_cut, strict=True)
            ]

        return await self.run(embed, deadline=deadline)

    async def embed_images(self, images: Sequence[bytes], *, deadline: float) -> list[Tensor]:
        return list(await self.run(self.collection.engine.embed_images, images, deadline=deadline))

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
        search = partial(self.collection.search, torch.stack(list(queries)), k, mode=mode, where=where, alpha=alpha)
        return await self.run(search, deadline=deadline)

    async def run(self, function: Callable[..., T], *args: Any, deadline: float) -> T:
        return await asyncio.to_thread(function, *args)


class Thumbnails:
    def get(self, path: Path, side: int) -> bytes:
        import io

        image = thumbnail(str(path), side)
        assert image is not None
        file = io.BytesIO()
        image.save(file, "WEBP")
        return file.getvalue()
