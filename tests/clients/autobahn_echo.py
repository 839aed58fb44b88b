"""An echo behind the gateway's own server settings, for Autobahn's WebSocket suite.

    python tests/clients/autobahn_echo.py 9007
    wstest -m fuzzingclient -s SPEC.json        # url ws://127.0.0.1:9007; autobahntestsuite 25.10.1 runs on Python 2.7

The suite's largest messages are larger than the gateway takes, so that one limit is raised here.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvicorn

from omni_ray.config.serving import Limits
from pipelines.serving.listener import patient_socket, server_config

LARGEST_BYTES = 64 * 2**20


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Every message back as it came."""
    assert scope["type"] == "websocket"
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] != "websocket.disconnect":
        kind = "text" if event.get("text") is not None else "bytes"
        await send({"type": "websocket.send", kind: event[kind]})


def main(port: int) -> None:
    """Serve until stopped."""
    limits = Limits()
    config = server_config(echo, limits, {})
    config.ws_max_size = LARGEST_BYTES
    asyncio.run(uvicorn.Server(config).serve(sockets=[patient_socket("127.0.0.1", port, limits.half_open_s)]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
