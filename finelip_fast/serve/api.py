"""The routes of ``/v1``: search, scores, explanations, and what is served."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from finelip_fast._versions import library_version
from finelip_fast.explain import Explanation
from finelip_fast.explain.pictures import explained
from finelip_fast.hits import Hit
from finelip_fast.kernels import clim_scores
from finelip_fast.serve import schemas
from finelip_fast.serve.answers import Refusal, answer, no_item
from finelip_fast.serve.collection import Collection, model_name
from finelip_fast.serve.requests import (
    File,
    check_count,
    check_pictures,
    check_texts,
    check_where,
    deadline,
    listed,
    media_type,
    read_form,
    read_json,
    serving,
    size_of,
    stage,
    unsupported,
    validated,
)
from finelip_fast.serve.thumbnails import thumbnail_address
from finelip_fast.tokenizer import Tokenizer, encode_batch, expected_truncation, token_spans

_WORD = re.compile(r"\S+")

router = APIRouter(prefix="/v1", tags=["search"])


# Searching -----------------------------------------------------------------------------------------------------------


@router.post(
    "/search", response_model=schemas.SearchResponse, openapi_extra=schemas.takes(schemas.SearchRequest, form=True)
)
async def search(request: Request) -> Response:
    """Find the best items for one or many texts, pictures or items; one result for each, in order."""
    server = serving(request)
    limits, pipeline = server.settings.limits, server.pipeline
    query, pictures = await _read_search(request)
    if [query.text is None, not pictures and query.image is None, query.item is None].count(False) != 1:
        raise Refusal(400, "invalid_request", "expected exactly one of text, image and item")
    _refuse_lone_shard(query)
    last = query.k + query.offset
    if last > limits.k:
        message = f"expected k + offset of at most {limits.k}, got {last}; narrow the search with where"
        raise Refusal(400, "k_too_large", message, param="k")
    where = check_where(query.where, limits)
    alpha = None if query.alpha is None else server.collection.engine.config.choose_alpha(query.alpha)

    with stage(request, "encode"):
        queries, counts = await _embed_queries(request, query, pictures)
    if not queries:
        return answer({"results": [], "covered": 1.0, "missing": {}})
    with stage(request, "search"):
        found = await pipeline.search(
            queries, last, mode=query.mode, where=where, alpha=alpha, deadline=deadline(request)
        )
    results = [
        {"hits": list(map(_hit, hits[query.offset :])), "note": hits.note, **count}
        for hits, count in zip(found.hits, counts, strict=True)
    ]
    return answer({"results": results, "covered": found.covered, "missing": found.missing})


async def _embed_queries(
    request: Request, query: schemas.SearchRequest, pictures: list[str | bytes]
) -> tuple[list[Tensor], list[dict[str, int | None]]]:
    """Return the embeddings ``[L, D]`` of the queries, and how much of each text was read."""
    server = serving(request)
    limits, pipeline = server.settings.limits, server.pipeline
    if query.text is not None:
        texts = check_texts(listed(query.text), limits, "text")
        request.scope["finelip.queries"] = texts
        embedded = await pipeline.embed_texts(texts, deadline=deadline(request))
        counts: list[dict[str, int | None]] = [
            {"tokens": text.tokens, "tokens_cut": text.tokens_cut} for text in embedded
        ]
        return [text.embedding for text in embedded], counts
    if query.item is not None:
        ids = listed(query.item)
        check_count(ids, limits.images, "items", "item")
        stored = await pipeline.run(server.collection.embeddings_of, ids, query.shard, deadline=deadline(request))
        if missing := [id for id in ids if id not in stored]:
            raise no_item(missing[0], shard=query.shard)
        queries = [stored[id] for id in ids]
    else:
        images = await check_pictures(pictures or listed(query.image), limits, "image")
        queries = await pipeline.embed_images(images, deadline=deadline(request))
    return queries, [{"tokens": None, "tokens_cut": None}] * len(queries)


async def _read_search(request: Request) -> tuple[schemas.SearchRequest, list[str | bytes]]:
    """Return the request, and the pictures sent in a form."""
    kind = media_type(request)
    if kind == "application/json":
        return await read_json(request, schemas.SearchRequest), []
    if kind != "multipart/form-data":
        raise unsupported(kind, "application/json", "multipart/form-data")
    values: dict[str, Any] = {}
    pictures: list[str | bytes] = []
    for name, value in await read_form(request, serving(request).settings.limits):
        if name == "image":
            pictures.append(value.content if isinstance(value, File) else value)
        elif isinstance(value, File):
            raise Refusal(400, "invalid_form", "expected files only under the name image", param=name[:200])
        elif name in ("text", "item") and name in values:
            values[name] = [*listed(values[name]), value]
        elif value or name in ("text", "item"):  # an empty form control says nothing
            values[name] = value
    return validated(schemas.SearchRequest, values, strict=False), pictures


def _refuse_lone_shard(query: schemas.SearchRequest | schemas.ExplainRequest) -> None:
    if query.shard is not None and query.item is None:
        message = "expected shard with item, got it alone; to search items of one shard, leave out hits by their shard"
        raise Refusal(400, "invalid_request", message, param="shard")


def _hit(hit: Hit) -> dict[str, Any]:
    return {
        "id": hit.id,
        "score": hit.score,
        "global_score": hit.global_score,
        "fine_score": hit.fine_score,
        "stands_out": hit.stands_out,
        "verdict": hit.verdict,
        "metadata": hit.metadata,
        "mode": hit.mode,
        "path": hit.path,
        "thumbnail": None if hit.path is None else thumbnail_address(hit.id, hit.shard),
        "shard": hit.shard,
    }


@router.post("/score", response_model=schemas.ScoreResponse, openapi_extra=schemas.takes(schemas.ScoreRequest))
async def score(request: Request) -> Response:
    """Score every picture against every text, without the index."""
    server = serving(request)
    limits, pipeline = server.settings.limits, server.pipeline
    query = await read_json(request, schemas.ScoreRequest)
    config = server.collection.engine.config
    alpha = server.collection.alpha if query.alpha is None else config.choose_alpha(query.alpha)
    texts = check_texts(query.texts, limits, "texts")
    images = await check_pictures(query.images, limits, "images")
    with stage(request, "encode"):
        pictures = await pipeline.embed_images(images, deadline=deadline(request))
        captions = [row.embedding for row in await pipeline.embed_texts(texts, deadline=deadline(request))]
    with stage(request, "search"):
        rows = await pipeline.run(partial(_scores, pictures, captions, alpha), deadline=deadline(request))
    return answer({"scores": rows})


def _scores(images: Sequence[Any], texts: Sequence[Any], alpha: float) -> list[list[float]]:
    import torch

    pair = torch.stack(list(images)).float(), torch.stack(list(texts)).float()
    rows: list[list[float]] = clim_scores(*pair, alpha=alpha).tolist()
    return rows


# Explaining ----------------------------------------------------------------------------------------------------------


@router.post("/explain", response_model=schemas.ExplainResponse, openapi_extra=schemas.takes(schemas.ExplainRequest))
async def explain(request: Request) -> Response:
    """Explain the score of a picture and a text: each word with its places, each place with its words."""
    server = serving(request)
    limits, pipeline = server.settings.limits, server.pipeline
    query = await read_json(request, schemas.ExplainRequest)
    check_texts([query.text], limits, "text")
    if (query.image is None) == (query.item is None):
        raise Refusal(400, "invalid_request", "expected either image or item")
    _refuse_lone_shard(query)
    source: bytes | Path | None
    if query.image is not None:
        (source,) = await check_pictures([query.image], limits, "image")
    else:
        picture = server.collection.picture
        source = await pipeline.run(picture, query.item, query.shard, deadline=deadline(request))
        if source is None:
            raise no_item(str(query.item), "whose picture is there", query.shard)
    with stage(request, "explain"):
        work = partial(_explained, server.collection, source, query.text)
        return answer(await pipeline.run(work, deadline=deadline(request)))


def _explained(collection: Collection, source: bytes | Path, text: str) -> dict[str, Any]:
    explanation: Explanation = collection.explain(source, text)
    width, height = size_of(source)
    is_fine = explanation.fine_score is not None
    words = [
        {
            "text": word.text,
            "start": word.start,
            "end": word.end,
            "adds": explanation.added_by(word) if is_fine else None,
        }
        for word in explanation.words
    ]
    end = explanation.words[-1].end if explanation.words else 0
    return {
        "score": explanation.score,
        "global_score": explanation.global_score,
        "fine_score": explanation.fine_score,
        "alpha": explanation.alpha,
        "words": words,
        "beyond": end if text[end:].strip() else len(text),
        **explained(explanation),
        "width": width,
        "height": height,
    }


@router.post("/tokens", response_model=schemas.TokensResponse, openapi_extra=schemas.takes(schemas.TokensRequest))
async def tokens(request: Request) -> Response:
    """Count a text's tokens, and find where in it the context ends."""
    server = serving(request)
    text = (await read_json(request, schemas.TokensRequest)).text
    check_texts([text], server.settings.limits, "text")
    engine = server.collection.engine
    counted = partial(_counted, text, engine.config.context_length, engine.tokenizer)
    return answer(await server.pipeline.run(counted, deadline=deadline(request)))


def _counted(text: str, context_length: int, tokenizer: Tokenizer) -> dict[str, int | None]:
    with expected_truncation():
        batch = encode_batch([text], context_length, tokenizer=tokenizer)
    cut = int(batch.tokens_cut[0])
    cut_at = None
    if cut:
        spans = [match.span() for match in _WORD.finditer(text)]
        placed_spans = zip(spans, token_spans(text, spans, tokenizer), strict=True)
        # The last position of the context belongs to the end token.
        cut_at = next((start for (start, _), (_, last) in placed_spans if last >= context_length), len(text))
    return {"tokens": int(batch.lengths[0]) + cut, "context_length": context_length, "cut_at": cut_at}


# The server ----------------------------------------------------------------------------------------------------------


@router.get("/info", response_model=schemas.InfoResponse)
async def info(request: Request) -> Response:
    """Describe what is served, and the bounds on requests."""
    server = serving(request)
    collection, limits, engine = server.collection, server.settings.limits, server.collection.engine
    warning = None
    if not engine.source:
        warning = "the bundled model knows drawn street scenes only; for photographs, index with published weights"

    def described() -> dict[str, Any]:
        return {
            "version": library_version(),
            "model": model_name(engine.source),
            "engine": str(engine),
            "context_length": engine.config.context_length,
            "alpha": collection.alpha,
            "aggregated": engine.config.trained_aggregators,
            "items": len(collection),
            "index_version": collection.version(),
            "fields": [
                {name: getattr(field, name) for name in ("name", "kind", "values", "least", "greatest")}
                for field in collection.fields()
            ],
            "writable": server.settings.writable and collection.writable,
            "warning": warning,
            "limits": {name: getattr(limits, name) for name in limits.__dataclass_fields__},
        }

    return answer(await server.pipeline.run(described, deadline=deadline(request)))
