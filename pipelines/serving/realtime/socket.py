"""The WebSocket: admission, frames, idle time, slow readers, and the close codes that clients act upon."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from omni_ray.observability.events import emit
from pipelines.serving.errors import ApiError
from pipelines.serving.guard import KEY_PROTOCOL
from pipelines.serving.realtime.session import MOST_ERRORS, Session

if TYPE_CHECKING:
    from pipelines.serving.gateway import Gateway

DONE, GONE_AWAY, POLICY, TOO_BIG, FAILED, FULL = 1000, 1001, 1008, 1009, 1011, 1013
MOST_FRAME_CHARACTERS = 22 * 2**20
"""An append of 15 MiB in base64, and its frame."""


async def serve_socket(gateway: Gateway, socket: WebSocket) -> None:
    """One client, from its handshake to its close."""
    refusal = _refusal(gateway, socket)
    await socket.accept(subprotocol=_subprotocol(socket))
    if refusal is not None:
        gateway.metrics.refused.labels(refusal.code or "limit").inc()
        body = {"type": "rate_limit_error", "code": refusal.code, "message": str(refusal), "param": None}
        await socket.send_json({"type": "error", "event_id": "event_refused", "error": body})
        await socket.close(FULL, str(refusal)[:120])
        return
    with gateway.admitted(socket):
        await _converse(gateway, socket)


async def _converse(gateway: Gateway, socket: WebSocket) -> None:
    session = Session(
        stages=gateway.stages,
        template=gateway.template,
        serving=gateway.serving,
        activity=gateway.activity,
        model=socket.query_params.get("model") or gateway.name,
        send=socket.send_text,
        beta=socket.headers.get("openai-beta", "") == "realtime=v1",
        metrics=gateway.metrics,
    )
    gateway.sessions.add(session)
    gateway.metrics.sessions.inc()
    code, reason = FAILED, "the server failed"
    pump = asyncio.create_task(session.outbox.run())
    try:
        session.open()
        code, reason = await _until_closed(gateway, socket, session, pump)
        await session.outbox.drained(1.0)
    except Exception as error:  # one session's failure is its own; its words stay out of the log
        emit("session_failed", error=type(error).__name__)
    finally:
        pump.cancel()
        gateway.sessions.discard(session)
        gateway.metrics.sessions.dec()
        gateway.metrics.closed.labels(str(code)).inc()
        await session.close()
        session.note()
        with contextlib.suppress(RuntimeError, OSError, WebSocketDisconnect):
            if socket.application_state != WebSocketState.DISCONNECTED:
                async with asyncio.timeout(2.0):
                    await socket.close(code, reason[:120])


async def _until_closed(
    gateway: Gateway, socket: WebSocket, session: Session, pump: asyncio.Task[None]
) -> tuple[int, str]:
    """Follow the client's frames until somebody ends it; the close code and its reason."""
    limits = gateway.limits
    began = time.monotonic()
    stuck = asyncio.create_task(session.outbox.stuck.wait())
    receiving: asyncio.Task[Any] | None = None
    try:
        while True:
            receiving = receiving or asyncio.create_task(_receive(socket))
            now = time.monotonic()
            left = min(limits.idle_s - (now - session.last_event), limits.max_session_s - (now - began))
            done, _ = await asyncio.wait(
                {receiving, stuck, pump}, timeout=max(left, 0.0), return_when="FIRST_COMPLETED"
            )
            if receiving in done:
                frame, receiving = receiving.result(), None
                ended = await _follow(session, frame)
                if ended is not None:
                    return ended
            elif stuck in done:
                return FULL, "the client does not read"
            elif pump in done:
                return GONE_AWAY, "the client is gone"
            elif time.monotonic() - began >= limits.max_session_s:
                return GONE_AWAY, f"a conversation lasts at most {limits.max_session_s:g} s; open another"
            elif time.monotonic() - session.last_event >= limits.idle_s:
                return DONE, f"nothing came for {limits.idle_s:g} s"
    finally:
        for task in (receiving, stuck):
            if task is not None:
                task.cancel()


async def _follow(session: Session, frame: Any) -> tuple[int, str] | None:
    if frame["type"] == "websocket.disconnect":
        return int(frame.get("code") or 1005), "the client closed"
    text = frame.get("text")
    if text is None:
        raw = frame.get("bytes") or b""
        if len(raw) > MOST_FRAME_CHARACTERS:
            return TOO_BIG, "a frame is too large"
        await session.handle("")  # an error event: frames are text
    elif len(text) > MOST_FRAME_CHARACTERS:
        return TOO_BIG, "a frame is too large"
    else:
        await session.handle(text)
    if session.errors > MOST_ERRORS:
        return POLICY, f"{session.errors} events could not be followed"
    return None


async def _receive(socket: WebSocket) -> Any:
    try:
        return await socket.receive()
    except (WebSocketDisconnect, RuntimeError):
        return {"type": "websocket.disconnect", "code": 1006}


def _refusal(gateway: Gateway, socket: WebSocket) -> ApiError | None:
    """Why there is no room, or None."""
    if len(gateway.sessions) >= gateway.limits.max_sessions:
        text = f"{len(gateway.sessions)} conversations are held, as many as this server takes; try again later"
        return ApiError(429, text, code="session_limit_exceeded")
    try:
        with gateway.admitted(socket):
            return None
    except ApiError as error:
        return error


def _subprotocol(socket: WebSocket) -> str | None:
    """A browser drops a socket whose server chooses none of what it offered; never the one that holds the key."""
    offered = [name for name in socket.scope.get("subprotocols", []) if not name.startswith(KEY_PROTOCOL)]
    return "realtime" if "realtime" in offered else (offered[0] if offered else None)
