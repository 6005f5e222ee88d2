"""The routes of ``/v1/items``: listing, thumbnails, adding and removing."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from finelip_fast._json import parse_json
from finelip_fast.errors import ImageError, InputError
from finelip_fast.serve import schemas
from finelip_fast.serve.answers import Refusal, answer, file_answer, no_item
from finelip_fast.serve.collection import Added, Upload
from finelip_fast.serve.requests import (
    File,
    check_where,
    deadline,
    item_of,
    listed,
    media_type,
    read_form,
    refused_pictures,
    serving,
    unsupported,
)
from finelip_fast.serve.settings import Limits
from finelip_fast.serve.thumbnails import SIDES, thumbnail_address

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

router = APIRouter(prefix="/v1/items", tags=["search"])


@router.get("", response_model=schemas.ItemsResponse)
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
        listing = [
            {
                "id": item.id,
                "metadata": item.metadata,
                "path": None if item.path is None else str(item.path),
                "thumbnail": None if item.path is None else thumbnail_address(item.id, item.shard),
                "shard": item.shard,
            }
            for item in part
        ]
        return {"items": listing, "total": len(server.collection), "next": following}

    return answer(await server.pipeline.run(page, deadline=deadline(request)))


@router.get("/{id:path}/thumbnail", response_class=Response)
async def thumbnail(
    request: Request,
    id: str,
    side: Annotated[int, Query(description=f"Longer side in pixels, one of {SIDES}.")] = 320,
    shard: Annotated[str | None, Query(description=schemas.SHARD)] = None,
) -> Response:
    """Return a small copy of an item's picture, never of another file."""
    server = serving(request)
    item = item_of(request, "/thumbnail")
    if side not in SIDES:
        raise Refusal(400, "no_such_side", f"expected side to be one of {SIDES}, got {side}", param="side")
    path = await server.pipeline.run(server.collection.picture, item, shard, deadline=deadline(request))
    if path is None:
        raise no_item(item, "whose picture is there", shard)
    try:
        content = await server.pipeline.run(server.thumbnails.get, path, side, deadline=deadline(request))
    except ImageError:
        raise no_item(item, "whose picture can be read", shard) from None
    return file_answer(request, content, server.thumbnails.media_type, private=True)


@router.post("", status_code=201, response_model=schemas.AddResponse, openapi_extra=_UPLOAD)
async def add(request: Request) -> Response:
    """Add pictures; those reported as added are on disk and found by every later search.

    One that cannot be added is reported with the reason and affects no others; 400, with the same `items`, if none was added.
    """
    _require_writable(request)
    server = serving(request)
    limits = server.settings.limits
    files, metadata = await _read_upload(request, limits)
    added = [
        Added(None, file.name, reason)
        for file, reason in zip(files, await refused_pictures([file.content for file in files], limits), strict=True)
    ]
    sound = [place for place, item in enumerate(added) if item.reason is None]
    uploads = [Upload(files[place].content, files[place].name, metadata[place]) for place in sound]
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


async def _read_upload(request: Request, limits: Limits) -> tuple[list[File], list[dict[str, Any]]]:
    """Return the files of a form, at least one, and the metadata of each."""
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
    return files, [{} for _ in files] if metadata is None else metadata


def _metadata(text: str | bytes) -> list[dict[str, Any]]:
    values = parse_json(text, "metadata", error=InputError, expected="an object, or a list of one for each picture")
    fields = listed(values)
    if not all(isinstance(part, dict) for part in fields):
        raise Refusal(400, "invalid_form", "expected metadata to be an object, or a list of objects", param="metadata")
    return fields


@router.delete("/{id:path}", response_model=schemas.RemoveResponse)
async def remove(request: Request, id: str) -> Response:
    """Delete an item permanently."""
    server = serving(request)
    _require_writable(request)
    item = item_of(request)
    try:
        await server.pipeline.run(server.collection.delete, [item], deadline=deadline(request))
    except InputError:
        raise no_item(item) from None
    return answer({"removed": 1})


def _require_writable(request: Request) -> None:
    """
    Raises:
        Refusal: 403 if items may not be added or deleted.
    """
    server = serving(request)
    if not (server.settings.writable and server.collection.writable):
        raise Refusal(403, "read_only", "the server is read-only; start it with --writable")
