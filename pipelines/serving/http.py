"""The HTTP surface: chat completions, models, health, the page."""

from __future__ import annotations

import time
from importlib import resources
from pathlib import PurePosixPath
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as RoutingError

from omni_ray.observability.events import emit
from pipelines.serving.errors import ApiError
from pipelines.serving.guard import Asgi, Guard

PAGE_FILES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Model(Protocol):
    """What stands behind the endpoints."""

    name: str

    async def complete(self, request: Request) -> dict[str, Any]: ...
    async def ready(self) -> dict[str, bool]: ...


def build_http(model: Model, keys: tuple[bytes, ...], max_body_bytes: int) -> Asgi:
    """The ASGI application around a model.

    Args:
        model: Answers requests.  keys: Hashes of API keys, none for this machine alone.  max_body_bytes: Cap of a body.
    """
    app = FastAPI(title="omni_ray", docs_url=None, redoc_url=None)
    app.state.started = int(time.time())
    _errors(app)
    _health(app, model)
    _models(app, model)
    _page(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> JSONResponse:
        """Answer a conversation of text, pictures, sounds and films in text or speech."""
        try:
            return JSONResponse(await model.complete(request))
        except ApiError:
            raise
        except Exception as error:  # an error's words may hold a user's words: its kind and place alone are logged
            emit("request_failed", path=request.url.path, error=type(error).__name__, at=_place(error))
            message = "the server failed on this request; its log names the place"
            raise ApiError(500, message, code="internal_error") from None

    return Guard(app, keys, max_body_bytes)


def _health(app: FastAPI, model: Model) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether every stage answers; 503 names those that do not."""
        stages = await model.ready()
        whole = all(stages.values())
        body = {"status": "ready" if whole else "not ready", "stages": stages}
        return JSONResponse(body, status_code=200 if whole else 503)


def _models(app: FastAPI, model: Model) -> None:
    def card() -> dict[str, Any]:
        return {"id": model.name, "object": "model", "created": app.state.started, "owned_by": "omni_ray"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """Its card."""
        if name != model.name:
            raise ApiError(404, f"model {name[:80]!r} is not served here; {model.name!r} is", code="model_not_found")
        return card()


def _page(app: FastAPI) -> None:
    folder = resources.files("pipelines.serving").joinpath("page")
    texts = {name: folder.joinpath(name).read_text("utf-8") for name in PAGE_FILES}

    def send(name: str) -> Response:
        return Response(texts[name], media_type=PAGE_FILES[name], headers=_PAGE_HEADERS)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return send("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in texts or PurePosixPath(name).name != name:
            raise ApiError(404, "there is no such file")
        return send(name)


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return _answer(error)

    @app.exception_handler(RoutingError)
    @app.exception_handler(HTTPException)
    async def routing_error(request: Request, error: RoutingError) -> Response:
        known = {404: "there is no such address here", 405: f"{request.method} is not known at this address"}
        return _answer(ApiError(error.status_code, known.get(error.status_code, str(error.detail))))


def _answer(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def _place(error: BaseException) -> str:
    """File and line where an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{PurePosixPath(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "unknown"
