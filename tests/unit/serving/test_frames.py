"""Frames by hand: a close is answered with its own code, wherever it comes."""

from __future__ import annotations

import base64
import os
import socket
import struct
from pathlib import Path

import pytest
from local_server import running

pytestmark = [
    pytest.mark.slow,
    # Raised by ray.serve's own settings classes when they are imported.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

TEXT, CONTINUED, CLOSE = 0x1, 0x0, 0x8
BEGINNING = b'{"type": "input_'


def frame(opcode: int, data: bytes, last: bool = True) -> bytes:
    """A client's frame, masked with zeros."""
    assert len(data) < 126
    return bytes([opcode | 0x80 * last, 0x80 | len(data)]) + b"\0\0\0\0" + data


def opened(port: int) -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", port), timeout=20)
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        "GET /v1/realtime?model=omni-ray HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
    ]
    peer.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += peer.recv(1)
    assert reply.startswith(b"HTTP/1.1 101"), reply
    return peer


def exactly(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = peer.recv(count - len(data))
        assert part, "the connection ended without a close frame"
        data += part
    return data


def close_code(peer: socket.socket) -> int:
    """Code of the close frame that comes, whatever comes before it."""
    while True:
        opcode, size = exactly(peer, 2)
        if size >= 126:
            size = int.from_bytes(exactly(peer, 2 if size == 126 else 8), "big")
        data = exactly(peer, size)
        if opcode & 0x0F == CLOSE:
            return int(struct.unpack("!H", data[:2])[0])


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([frame(CLOSE, struct.pack("!H", 1000))], 1000),
        ([frame(TEXT, BEGINNING, last=False), frame(CLOSE, struct.pack("!H", 1000)), frame(CONTINUED, b"x")], 1000),
        ([frame(TEXT, BEGINNING, last=False), frame(TEXT, b"{}")], 1002),
        ([frame(CONTINUED, b"{}")], 1002),
        ([frame(TEXT | 0x40, b"{}")], 1002),
        ([frame(TEXT, b"\xce\xba\xe1\xbd\xb9\xcf\x83\xed\xa0\x80")], 1007),
    ],
    ids=["close", "inside a message", "two messages at once", "no beginning", "reserved bit", "no UTF-8"],
)
def test_a_connection_ends_with_the_code_of_its_reason(tiny_checkpoint: Path, frames: list[bytes], code: int) -> None:
    with running(tiny_checkpoint) as server, opened(server.port) as peer:
        for one in frames:
            peer.sendall(one)
        assert close_code(peer) == code
        peer.sendall(frame(CLOSE, struct.pack("!H", code)))
        server.wait_empty()
        assert not any(server.held().values())
