"""The surface: chat completions, audio, live conversations, models, health, metrics, the page."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from importlib import metadata, resources
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as RoutingError
from starlette.requests import ClientDisconnect

from omni_ray.observability.events import emit
from pipelines.serving.audio_api import TRANSCRIPT_FORMS, SpeechRequest, speech, transcriptions
from pipelines.serving.errors import ApiError
from pipelines.serving.guard import Asgi, Guard, Receive, Scope, Send
from pipelines.serving.metrics import Metrics
from pipelines.serving.protocol import ChatRequest
from pipelines.serving.realtime.socket import serve_socket

if TYPE_CHECKING:
    from pipelines.serving.gateway import Gateway

PAGE_FILES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "live.js": "text/javascript",
    "microphone.js": "text/javascript",
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "connect-src 'self' ws: wss:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "microphone=(self), camera=(self)",
    "cache-control": "no-cache",
}


def build_http(gateway: Gateway, keys: tuple[bytes, ...], max_body_bytes: int) -> Asgi:
    """The ASGI application around a gateway.

    Args:
        gateway: Answers requests.
        keys: Hashes of API keys, none for this machine alone.  max_body_bytes: Cap of a body.
    """
    app = FastAPI(title="omni_ray", version=_version(), docs_url=None, redoc_url=None)
    app.state.started = int(time.time())
    _errors(app)
    _health(app, gateway)
    _models(app, gateway)
    _page(app)
    _answering(app, gateway)

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await serve_socket(gateway, socket)

    return Guard(_Counted(app, gateway.metrics), keys, max_body_bytes)


def _answering(app: FastAPI, gateway: Gateway) -> None:
    async def guarded(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            return await call(request)
        except (ApiError, ClientDisconnect):
            raise
        except Exception as error:  # an error's words may hold a user's words: its kind and place alone are logged
            emit("request_failed", path=request.url.path, error=type(error).__name__, at=_place(error))
            message = "the server failed on this request; its log names the place"
            raise ApiError(500, message, code="internal_error") from None

    @app.post("/v1/chat/completions", openapi_extra=_body("application/json", ChatRequest), responses=_REFUSALS)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation of text, pictures, sounds and films in text or speech; whole or as a stream."""
        return await guarded(request, gateway.chat)

    @app.post("/v1/audio/speech", openapi_extra=_body("application/json", SpeechRequest), responses=_REFUSALS)
    async def audio_speech(request: Request) -> Response:
        """Read a text aloud."""

        async def call(request: Request) -> Response:
            check_json(request)
            return await _admitted(gateway, request, speech)

        return await guarded(request, call)

    @app.post("/v1/audio/transcriptions", openapi_extra=_FORM, responses=_REFUSALS)
    async def audio_transcriptions(request: Request) -> Response:
        """Write down what is said in a sound."""
        return await guarded(request, lambda request: _admitted(gateway, request, transcriptions))

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type=gateway.metrics.content_type)


async def _admitted(gateway: Gateway, request: Request, call: Callable[[Gateway, Request], Any]) -> Response:
    """A streamed answer counts as in flight until its end."""
    held = contextlib.ExitStack()
    held.enter_context(gateway.admitted(request))
    with held:
        response: Response = await call(gateway, request)
        if isinstance(response, StreamingResponse):
            response.body_iterator = _held(response.body_iterator, held.pop_all())
        return response


async def _held(pieces: Any, held: contextlib.ExitStack) -> Any:
    with held:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece


class _Counted:
    """Counts requests by path and status."""

    def __init__(self, app: Asgi, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in KNOWN_PATHS else "other"
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)


def check_json(request: Request) -> None:
    """Only JSON: a page of another origin can send other types without asking first.

    Raises:
        ApiError: 415.
    """
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found != "application/json":
        raise ApiError(415, f"the content type is {found[:40] or 'missing'}; send application/json")


def _body(kind: str, model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    inlined = _inline(schema, definitions)
    return {"requestBody": {"required": True, "content": {kind: {"schema": inlined}}}}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """References replaced by what they point to: a path's schema stands alone."""
    if isinstance(schema, list):
        return [_inline(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inline(part, definitions) for name, part in schema.items() if name != "discriminator"}


def _version() -> str:
    try:
        return metadata.version("omni-ray")
    except metadata.PackageNotFoundError:
        return "0"


KNOWN_PATHS = frozenset(
    {
        "/",
        "/healthz",
        "/readyz",
        "/metrics",
        "/openapi.json",
        "/v1/models",
        "/v1/chat/completions",
        "/v1/audio/speech",
        "/v1/audio/transcriptions",
    }
)
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": "Refused; the body says why"} for status in (400, 401, 403, 413, 415, 429, 500, 503)
}
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "model": {"type": "string"},
                        "response_format": {"type": "string", "enum": list(TRANSCRIPT_FORMS)},
                        "stream": {"type": "boolean"},
                    },
                }
            }
        },
    }
}


def _health(app: FastAPI, model: Gateway) -> None:
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


def _models(app: FastAPI, model: Gateway) -> None:
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
