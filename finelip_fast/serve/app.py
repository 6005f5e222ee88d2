"""The application: the page, the API, health and metrics, and what guards them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from finelip_fast._pages import render
from finelip_fast.errors import FineLIPError
from finelip_fast.serve import api
from finelip_fast.serve.answers import Refusal, refusal_of
from finelip_fast.serve.direct import Pipeline, RetrieverCollection, Thumbnails
from finelip_fast.serve.requests import Serving, invalid
from finelip_fast.serve.settings import ServeSettings

_PAGES = Path(__file__).parent.parent / "data" / "pages"
_KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}


def create_app(collection: RetrieverCollection, settings: ServeSettings) -> FastAPI:
    """The application over a collection.

    Args:
        collection: What is searched; its caller closes it.
        settings: Bounds and permissions.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server = app.state.serving
        await server.pipeline.start()
        server.state = "ready"
        try:
            yield
        finally:
            server.state = "draining"
            await server.pipeline.close()

    app = FastAPI(title="finelip_fast", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.serving = Serving(collection, settings, Pipeline(collection, settings), Thumbnails())
    app.include_router(api.router)
    _add_pages(app)
    _add_handlers(app)
    return app


def _add_pages(app: FastAPI) -> None:
    files = {path.name: path for path in _PAGES.iterdir() if path.suffix in _KINDS}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(render("serve.html"))

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files:
            raise Refusal(404, "no_such_file", f"expected a file of the page, got {name!r:.80}")
        return Response(files[name].read_bytes(), media_type=_KINDS[files[name].suffix])


def _add_handlers(app: FastAPI) -> None:
    def answered(request: Request, refusal: Refusal) -> Response:
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
            405: f"expected another method than {request.method}, see /docs",
        }.get(error.status_code, str(error.detail))
        code = {404: "no_such_route", 405: "method"}.get(error.status_code, "invalid_request")
        return answered(request, Refusal(error.status_code, code, message, headers=error.headers))
