"""The routes of ``/v1``: search, scores, explanations and items."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from finelip_fast._files import installed
from finelip_fast._json import parse_json
from finelip_fast.errors import ImageError, InputError
from finelip_fast.explain import Explanation
from finelip_fast.explain.pictures import explained
from finelip_fast.hits import Hit
from finelip_fast.kernels import clim_scores
from finelip_fast.serve import schemas
from finelip_fast.serve.answers import Refusal, answer
from finelip_fast.serve.collection import Added, Collection, Upload
from finelip_fast.serve.requests import (
    File,
    check_count,
    check_pictures,
    check_texts,
    check_where,
    deadline,
    item_of,
    listed,
    media_type,
    read_form,
    read_json,
    refused_pictures,
    serving,
    size_of,
    stage,
    unsupported,
    validated,
)
from finelip_fast.serve.thumbnails import SIDES
from finelip_fast.tokenizer import Tokenizer, encode_batch, expected_truncation, token_spans

_WORD = re.compile(r"\S+")

_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "metadata": {
                            "type": "string",
                            "description": "JSON: an object for the one picture, or a list of one for each.",
                            "examples": ['{"camera": "front"}', '[{"camera": "front"}, {"camera": "rear"}]'],
                        },
                    },
                }
            }
        },
    }
}

router = APIRouter(prefix="/v1", tags=["search"])


def takes(model: type[BaseModel], *, form: bool = False) -> dict[str, Any]:
    """Return the OpenAPI description of a request body, which the routes read themselves, within bounds."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    examples = {name: {"value": body} for name, body in schemas.EXAMPLES[model].items()}
    content: dict[str, Any] = {"application/json": {"schema": schema, "examples": examples}}
    if form:
        content["multipart/form-data"] = {"schema": schema}
    return {"requestBody": {"required": True, "content": content}}


# Searching -----------------------------------------------------------------------------------------------------------


@router.post("/search", response_model=schemas.SearchResponse, openapi_extra=takes(schemas.SearchRequest, form=True))
async def search(request: Request) -> Response:
    """Find the best items for one or many texts, pictures or items; one result for each, in order."""
    server = serving(request)
    limits, pipeline = server.settings.limits, server.pipeline
    query, pictures = await _read_search(request)
    if [query.text is None, not pictures and query.image is None, query.item is None].count(False) != 1:
        raise Refusal(400, "invalid_request", "expected exactly one of text, image and item")
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
    shards: Sequence[Sequence[str | None]] = found.shards or [[None] * len(hits) for hits in found.hits]
    results = [
        {
            "hits": [_hit(hit, shard) for hit, shard in zip(hits[query.offset :], names[query.offset :], strict=True)],
            "note": hits.note,
            **count,
        }
        for hits, names, count in zip(found.hits, shards, counts, strict=True)
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
        stored = await pipeline.run(server.collection.embeddings_of, ids, deadline=deadline(request))
        if missing := [id for id in ids if id not in stored]:
            raise no_item(missing[0])
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


def _hit(hit: Hit, shard: str | None) -> dict[str, Any]:
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
        "thumbnail": None if hit.path is None else thumbnail_address(hit.id),
        "shard": shard,
    }


@router.post("/score", response_model=schemas.ScoreResponse, openapi_extra=takes(schemas.ScoreRequest))
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


@router.post("/explain", response_model=schemas.ExplainResponse, openapi_extra=takes(schemas.ExplainRequest))
async def explain(request: Request) -> Response:
    """Explain the score of a picture and a text: each word with its places, each place with its words."""
    server = serving(request)
    limits, pipeline = server.settings.limits, server.pipeline
    query = await read_json(request, schemas.ExplainRequest)
    check_texts([query.text], limits, "text")
    if (query.image is None) == (query.item is None):
        raise Refusal(400, "invalid_request", "expected either image or item")
    source: bytes | Path | None
    if query.image is not None:
        (source,) = await check_pictures([query.image], limits, "image")
    else:
        source = await pipeline.run(server.collection.picture, query.item, deadline=deadline(request))
        if source is None:
            raise no_item(str(query.item), "whose picture is there")
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
            "adds": float(explanation.contributions[word.first : word.last].sum()) if is_fine else None,
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


@router.post("/tokens", response_model=schemas.TokensResponse, openapi_extra=takes(schemas.TokensRequest))
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


# Items ---------------------------------------------------------------------------------------------------------------


@router.get("/items", response_model=schemas.ItemsResponse)
async def items(
    request: Request,
    where: Annotated[str | None, Query(description="Filter on the metadata, such as `camera = 'front'`.")] = None,
    limit: Annotated[int, Query(ge=1, description="Items of the page.")] = 100,
    after: Annotated[str | None, Query(description="`next` of the page before.")] = None,
) -> Response:
    """List one page of the items, in the order they were added."""
    server = serving(request)
    limits = server.settings.limits
    if limit > limits.items:
        message = f"expected a limit of at most {limits.items}, got {limit}; use after for the next page"
        raise Refusal(400, "limit_too_large", message, param="limit")

    def page() -> dict[str, Any]:
        part, following = server.collection.items(where=check_where(where, limits), limit=limit, after=after)
        listing = []
        for item in part:
            path = server.collection.picture(item.id)
            listing.append(
                {
                    "id": item.id,
                    "metadata": item.metadata,
                    "path": None if path is None else str(path),
                    "thumbnail": None if path is None else thumbnail_address(item.id),
                }
            )
        return {"items": listing, "total": len(server.collection), "next": following}

    return answer(await server.pipeline.run(page, deadline=deadline(request)))


@router.get("/items/{id:path}/thumbnail", response_class=Response)
async def thumbnail(
    request: Request,
    id: str,
    side: Annotated[int, Query(description=f"Longer side in pixels, one of {SIDES}.")] = 320,
) -> Response:
    """Return a small copy of an item's picture, never of another file."""
    server = serving(request)
    item = item_of(request, "/thumbnail")
    if side not in SIDES:
        raise Refusal(400, "no_such_side", f"expected side to be one of {SIDES}, got {side}", param="side")
    path = await server.pipeline.run(server.collection.picture, item, deadline=deadline(request))
    if path is None:
        raise no_item(item, "whose picture is there")
    try:
        content = await server.pipeline.run(server.thumbnails.get, path, side, deadline=deadline(request))
    except ImageError:
        raise no_item(item, "whose picture can be read") from None
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=server.thumbnails.media_type, headers=headers)


@router.post("/items", status_code=201, response_model=schemas.AddResponse, openapi_extra=_UPLOAD)
async def add(request: Request) -> Response:
    """Add pictures; those reported as added are on disk and found by every later search.

    One that cannot be added is reported with the reason and affects no others; 400, with the same `items`, if none was added.
    """
    require_writable(request)
    server = serving(request)
    limits = server.settings.limits
    kind = media_type(request)
    if kind != "multipart/form-data":
        raise unsupported(kind, "multipart/form-data")
    files: list[File] = []
    metadata: list[dict[str, Any]] | None = None
    for name, value in await read_form(request, limits):
        if name == "image" and isinstance(value, File):
            files.append(value)
        elif name == "metadata" and metadata is None:
            metadata = _metadata(value.content if isinstance(value, File) else value)
        else:
            message = "expected image as files, and metadata once"
            raise Refusal(400, "invalid_form", message, param=name[:200])
    if not files or (metadata is not None and len(metadata) != len(files)):
        got = f"{len(files)} pictures" + ("" if metadata is None else f" and metadata of {len(metadata)}")
        raise Refusal(400, "invalid_form", f"expected files as image, and metadata for all or none of them, got {got}")
    added = [
        Added(None, file.name, reason)
        for file, reason in zip(files, await refused_pictures([file.content for file in files], limits), strict=True)
    ]
    sound = [place for place, item in enumerate(added) if item.reason is None]
    uploads = [Upload(files[place].content, files[place].name, metadata[place] if metadata else {}) for place in sound]
    if uploads:
        results = await server.pipeline.run(server.collection.add, uploads, deadline=deadline(request))
        for place, item in zip(sound, results, strict=True):
            added[place] = item
    items = [{"id": item.id, "name": item.name, "reason": item.reason} for item in added]
    body = {"added": sum(item.id is not None and not item.existing for item in added), "items": items}
    if all(item.id is None for item in added):
        reasons = [str(item.reason) if len(added) == 1 else f"{item.name}: {item.reason}" for item in added]
        raise Refusal(400, "nothing_added", "; ".join(reasons), param="image", fields=body)
    return answer(body, status=201)


def _metadata(text: str | bytes) -> list[dict[str, Any]]:
    values = parse_json(text, "metadata", error=InputError, expected="an object, or a list of one for each picture")
    fields = listed(values)
    if not all(isinstance(part, dict) for part in fields):
        raise Refusal(400, "invalid_form", "expected metadata to be an object, or a list of objects", param="metadata")
    return fields


@router.delete("/items/{id:path}", response_model=schemas.RemoveResponse)
async def remove(request: Request, id: str) -> Response:
    """Delete an item permanently."""
    server = serving(request)
    require_writable(request)
    item = item_of(request)
    try:
        await server.pipeline.run(server.collection.delete, [item], deadline=deadline(request))
    except InputError:
        raise no_item(item) from None
    return answer({"removed": 1})


def require_writable(request: Request) -> None:
    """
    Raises:
        Refusal: 403 if items may not be added or deleted.
    """
    server = serving(request)
    if not (server.settings.writable and server.collection.writable):
        raise Refusal(
            403,
            "read_only",
            "the server is read-only; start it with --writable",
        )


def no_item(id: str, clause: str = "") -> Refusal:
    """Return the refusal for the id of a missing item."""
    return Refusal(
        404, "no_such_item", f"expected the id of an item {clause}".rstrip() + f", got {id!r:.200}", param="item"
    )


def thumbnail_address(id: str) -> str:
    """Return the address of an item's thumbnail; any id is one segment of the path."""
    return f"/v1/items/{quote(id, safe='', errors='surrogateescape')}/thumbnail"


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
            "version": installed("finelip-fast").get("finelip-fast", ""),
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


def model_name(source: str) -> str:
    """Return the name of a checkpoint from its source, without any folder of this machine."""
    return (Path(source).name if Path(source).is_absolute() else source) or "finelip-scenes"
