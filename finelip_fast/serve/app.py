"""The application: the page, the API, health and metrics, and their guards."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from PIL import Image
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute

from finelip_fast._pages import render
from finelip_fast._versions import library_version
from finelip_fast.errors import FineLIPError
from finelip_fast.serve import api, health, items, openai, schemas
from finelip_fast.serve.answers import Refusal, file_answer, refusal_of
from finelip_fast.serve.batching import Workers
from finelip_fast.serve.collection import Collection, model_name
from finelip_fast.serve.guards import Account, Bounds, Doors
from finelip_fast.serve.health import Health, warm
from finelip_fast.serve.metrics import Metrics
from finelip_fast.serve.pipeline import Pipeline
from finelip_fast.serve.requests import Serving, invalid
from finelip_fast.serve.settings import ServeSettings
from finelip_fast.serve.thumbnails import Thumbnails

_PAGES = Path(__file__).parent.parent / "data" / "pages"
_KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
_SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")
_REQUESTS = (
    schemas.SearchRequest,
    schemas.ScoreRequest,
    schemas.ExplainRequest,
    schemas.TokensRequest,
    schemas.EmbeddingsRequest,
)
_FAULTS = {
    400: "The request is invalid.",
    401: "The API key is missing or wrong.",
    404: "No such item.",
    413: "The request is too large.",
    429: "Too many requests are waiting; `Retry-After` says when to try again.",
    503: "The server is not ready, or the index cannot be read.",
    504: "The request timed out.",
}


def create_app(collection: Collection, settings: ServeSettings, computing: Workers | None = None) -> FastAPI:
    """Create the application for a collection; it is warmed up once its startup is complete.

    Args:
        collection: Collection to search, which the caller closes.
        settings: Bounds and permissions.
        computing: Thread that computes; see :class:`finelip_fast.serve.pipeline.Pipeline`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await server.pipeline.start()
        await warm(server, _picture())
        server.state = "ready"
        try:
            yield
        finally:
            server.state = "draining"
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(server.pipeline.close(), settings.drain)

    faults: dict[int | str, dict[str, Any]] = {
        status: {"model": schemas.FaultResponse, "description": reason} for status, reason in _FAULTS.items()
    }
    app = FastAPI(
        title="finelip_fast",
        version=library_version(),
        description="Search pictures with long descriptions. With a key: `Authorization: Bearer KEY`.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    metrics = Metrics()
    server = Serving(collection, settings, Pipeline(collection, settings, metrics, computing), Thumbnails())
    app.state.serving, app.state.metrics, app.state.health = server, metrics, Health(server)
    app.state.described = {
        "version": app.version,
        "model": model_name(collection.engine.source),
        "engine": str(collection.engine),
    }
    routers = [api.router, items.router, openai.router]
    for router in routers:
        app.include_router(router, responses=faults)
    app.include_router(health.router)
    _add_pages(app)
    _answer_heads(app, [route for router in (*routers, health.router, app.router) for route in router.routes])
    _add_handlers(app)
    _describe_requests(app)
    app.add_middleware(Bounds, server=server)
    app.add_middleware(Doors, server=server)
    app.add_middleware(Account, server=server, metrics=metrics)
    return app


def _picture() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 60)).save(content, "PNG")
    return content.getvalue()


def _add_pages(app: FastAPI) -> None:
    files = {path.name: path.read_bytes() for path in _PAGES.iterdir() if path.suffix in _KINDS}
    for name in _SWAGGER:
        files[name] = (resources.files("fastapi_offline") / "static" / name).read_bytes()

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(render("serve.html"))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render("docs.html"))

    @app.get("/static/{name}", include_in_schema=False)
    async def static(request: Request, name: str) -> Response:
        if name not in files:
            raise Refusal(404, "no_such_file", f"expected a file of the page, got {name!r:.80}")
        return file_answer(request, files[name], _KINDS[Path(name).suffix], private=False)


def _answer_heads(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Have HEAD answered where GET is, as load balancers and monitors expect; uvicorn leaves out the body."""
    for route in routes:
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)


def _add_handlers(app: FastAPI) -> None:
    def answered(request: Request, refusal: Refusal) -> Response:
        request.scope["finelip.code"] = refusal.code
        return refusal.answer(getattr(request.state, "request_id", None))

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return answered(request, error)

    @app.exception_handler(FineLIPError)
    async def failed(request: Request, error: FineLIPError) -> Response:
        return answered(request, refusal_of(error))

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return answered(request, invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = {
            404: "expected a path of the API, see /docs",
            405: f"expected another method than {request.method:.20}, see /docs",
        }.get(error.status_code, str(error.detail))
        code = {404: "no_such_route", 405: "method"}.get(error.status_code, "invalid_request")
        headers: Mapping[str, str] | None = error.headers
        return answered(request, Refusal(error.status_code, code, message, headers=headers))


def _describe_requests(app: FastAPI) -> None:
    """Add the bodies that the routes read themselves to the OpenAPI schema."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in _REQUESTS], ref_template="#/components/schemas/{model}"
    )
    generate = app.openapi

    def described() -> dict[str, Any]:
        schema = generate()
        known = schema.setdefault("components", {}).setdefault("schemas", {})
        for name, definition in definitions["$defs"].items():
            known.setdefault(name, definition)
        # FastAPI's own descriptions of errors, which this server answers in its own format.
        known.pop("HTTPValidationError", None)
        known.pop("ValidationError", None)
        for routes in schema["paths"].values():
            for route in routes.values():
                route.get("responses", {}).pop("422", None)
        return schema

    app.openapi = described  # type: ignore[method-assign]
