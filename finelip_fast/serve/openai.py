"""``/v1/embeddings`` and ``/v1/models`` as OpenAI's clients expect them, also for pictures and all rows."""

from __future__ import annotations

import base64
from typing import Any

import torch
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from finelip_fast.serve import schemas
from finelip_fast.serve.answers import Refusal, answer
from finelip_fast.serve.collection import model_name
from finelip_fast.serve.requests import (
    check_count,
    check_pictures,
    check_texts,
    deadline,
    listed,
    read_object,
    serving,
    stage,
    validated,
)

_ALIAS = "finelip"

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.post(
    "/embeddings", response_model=schemas.EmbeddingsResponse, openapi_extra=schemas.takes(schemas.EmbeddingsRequest)
)
async def embeddings(request: Request) -> Response:
    """Embed texts and pictures: global rows or, with ``multi_vector``, all rows, which late interaction compares."""
    server = serving(request)
    limits, engine = server.settings.limits, server.collection.engine
    values = await read_object(request)
    if isinstance(inputs := values.get("input"), list) and any(isinstance(value, (int, list)) for value in inputs):
        message = "expected texts or pictures, got tokens, which are of another tokenizer; send the text itself"
        raise Refusal(400, "tokens", message, param="input")
    query = validated(schemas.EmbeddingsRequest, values, strict=True)
    name = model_name(engine.source)
    if query.model not in (None, "", name, _ALIAS):
        message = f"expected model {name!r}, which this server has, got {query.model!r:.80}; see /v1/models"
        raise Refusal(404, "model_not_found", message, param="model")
    if query.dimensions not in (None, engine.config.embed_dim):
        message = (
            f"expected dimensions {engine.config.embed_dim}, the model's own, got {query.dimensions}; leave it out"
        )
        raise Refusal(400, "invalid_dimensions", message, param="dimensions")
    inputs = listed(query.input)
    if not inputs:
        raise Refusal(400, "empty_input", "expected at least one input, got an empty list", param="input")
    check_count(inputs, max(limits.texts, limits.images), "inputs", "input")
    texts = check_texts([value for value in inputs if isinstance(value, str)], limits, "input")
    request.scope["finelip.queries"] = texts
    pictures = await check_pictures([value.image for value in inputs if not isinstance(value, str)], limits, "input")
    with stage(request, "encode"):
        embedded = await server.pipeline.embed_texts(texts, deadline=deadline(request)) if texts else []
        rows = await server.pipeline.embed_images(pictures, deadline=deadline(request)) if pictures else []
    of_texts, of_pictures = iter(embedded), iter(rows)
    ordered = [next(of_texts).embedding if isinstance(value, str) else next(of_pictures) for value in inputs]
    read = sum(text.tokens - text.tokens_cut for text in embedded)
    data = [
        {"object": "embedding", "index": number, **_encoded(embedding, query)}
        for number, embedding in enumerate(ordered)
    ]
    usage = {"prompt_tokens": read, "total_tokens": read}
    return answer({"object": "list", "data": data, "model": name, "usage": usage})


def _encoded(embedding: Tensor, query: schemas.EmbeddingsRequest) -> dict[str, Any]:
    values = (embedding if query.multi_vector else embedding[0]).detach().to("cpu", torch.float32).contiguous()
    if query.encoding_format == "float":
        return {"embedding": values.tolist()}
    encoded = {"embedding": base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()}
    return {**encoded, "shape": list(values.shape)} if query.multi_vector else encoded


@router.get("/models")
async def models(request: Request) -> Response:
    """List the model that this server embeds with."""
    name = model_name(serving(request).collection.engine.source)
    return answer({"object": "list", "data": [_model(name)]})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """Describe the model with a given name."""
    known = model_name(serving(request).collection.engine.source)
    if name not in (known, _ALIAS):
        raise Refusal(404, "model_not_found", f"expected model {known!r}, got {name!r:.80}", param="model")
    return answer(_model(known))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "finelip_fast"}
