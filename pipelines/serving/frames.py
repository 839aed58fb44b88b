"""WebSocket frames: uvicorn's protocol, with one rule of RFC 6455 that its library reads more strictly."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol


class _GivesUpHalfMessages(ServerProtocol):
    """A peer may close in the middle of a message in fragments: it is answered like any close, not as an error.

    Source: RFC 6455, sections 5.4 (control frames may stand between fragments) and 5.5.1; Autobahn case 7.1.5.
    """

    def recv_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None
        super().recv_frame(frame)


class FrameProtocol(WebSocketsSansIOProtocol):
    """One WebSocket connection of the gateway's own server."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.conn.__class__ = _GivesUpHalfMessages  # uvicorn names its class itself; state and calls are the same
