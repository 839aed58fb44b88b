"""How long a connection lasts: idle, too old, silent, unread, too many, and the code that each is closed with."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import websockets
from local_server import Server, running
from websockets.exceptions import ConnectionClosed, InvalidStatus

from omni_ray.config.load import check_recipe
from omni_ray.types.errors import ConfigError

pytestmark = [
    pytest.mark.slow,
    # Raised by ray.serve's own settings classes when they are imported.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

KEYS = ("the-first-key-of-some-length", "the-other-key-of-some-length")
Go = Callable[[Any], Awaitable[None]]


async def wait(socket: Any) -> None:
    """Take what comes."""
    async for _ in socket:
        pass


async def chat(socket: Any) -> None:
    """Say something ten times a second."""
    while True:
        await socket.send('{"type": "input_audio_buffer.clear"}')
        await asyncio.sleep(0.1)


async def rave(socket: Any) -> None:
    """Nothing that can be followed."""
    for _ in range(300):
        await socket.send("{}")
        await asyncio.sleep(0)
    await wait(socket)


async def stuff(socket: Any) -> None:
    """One frame of more than may be."""
    await socket.send("x" * (23 * 2**20))
    await wait(socket)


async def to_the_end(go: Go, socket: Any) -> None:
    await go(socket)
    await socket.recv()


@pytest.mark.parametrize(
    ("limits", "go", "code", "reason", "seconds"),
    [
        ({"idle_s": 0.7}, wait, 1000, "nothing came for 0.7 s", 0.7),
        ({"max_session_s": 1.0}, chat, 1001, "a conversation lasts at most 1 s; open another", 1.0),
        ({"idle_s": 0.7, "max_session_s": 1.5}, chat, 1001, "a conversation lasts at most 1.5 s; open another", 1.5),
        ({}, rave, 1008, "events could not be followed", 0.0),
        ({}, stuff, 1009, "", 0.0),
    ],
    ids=["idle", "too old", "too old though lively", "abuse", "too large"],
)
def test_a_connection_is_closed_with_its_code(
    tiny_checkpoint: Path, limits: dict[str, float], go: Go, code: int, reason: str, seconds: float
) -> None:
    async def talk(url: str) -> tuple[ConnectionClosed, float]:
        async with websockets.connect(url, max_size=None) as socket:
            assert json.loads(await socket.recv())["type"] == "session.created"
            began = time.monotonic()
            with pytest.raises(ConnectionClosed) as closed:
                await to_the_end(go, socket)
            return closed.value, time.monotonic() - began

    with running(tiny_checkpoint, limits=limits) as server:
        closed, lasted = asyncio.run(asyncio.wait_for(talk(address(server)), 60))
        assert closed.rcvd is not None
        assert closed.rcvd.code == code
        assert reason in closed.rcvd.reason
        assert lasted >= seconds - 0.15
        assert not any(server.wait_empty(10).values())


def test_a_peer_that_answers_no_ping_is_let_go_and_one_that_does_stays(tiny_checkpoint: Path) -> None:
    """Half-open: it reads nothing and writes nothing, and its connection is never closed from its side."""

    async def talk(server: Server) -> None:
        there = await websockets.connect(address(server), ping_interval=None)
        gone = await websockets.connect(address(server), ping_interval=None)
        for socket in (there, gone):
            await socket.recv()
        gone.transport.pause_reading()
        began = time.monotonic()
        while len(server.gateway.sessions) == 2 and time.monotonic() < began + 20:
            await asyncio.sleep(0.02)
        assert len(server.gateway.sessions) == 1
        assert time.monotonic() - began >= 0.6
        await asyncio.sleep(1.5)
        await there.send('{"type": "input_audio_buffer.clear"}')
        assert json.loads(await there.recv())["type"] == "input_audio_buffer.cleared"
        await there.close()
        gone.transport.resume_reading()
        await gone.close()

    with running(tiny_checkpoint, limits={"ping_s": 0.3, "half_open_s": 1.0}) as server:
        asyncio.run(asyncio.wait_for(talk(server), 60))
        assert not any(server.wait_empty(10).values())


def test_a_client_that_does_not_read_is_told_to_come_again(tiny_checkpoint: Path) -> None:
    """It goes on asking and takes none of the answers."""

    async def talk(server: Server) -> None:
        socket = await websockets.connect(address(server), ping_interval=None, compression=None, close_timeout=1)
        await socket.recv()
        socket.transport.pause_reading()
        words = "x" * 20_000
        item = {"id": "long", "type": "message", "role": "user", "content": [{"type": "input_text", "text": words}]}
        await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
        began = time.monotonic()
        while server.gateway.sessions and time.monotonic() < began + 30:
            # Each is answered with the whole item, and nobody reads the answers.
            await socket.send('{"type": "conversation.item.retrieve", "item_id": "long"}')
            await asyncio.sleep(0.001)
        assert not server.gateway.sessions
        socket.transport.resume_reading()
        await socket.close()

    limits = {"slow_reader_s": 0.5, "ping_s": 20.0, "half_open_s": 40.0}
    with running(tiny_checkpoint, limits=limits) as server:
        asyncio.run(asyncio.wait_for(talk(server), 60))
        assert server.gateway.metrics.closed.labels("1013")._value.get() == 1
        assert not any(server.wait_empty(10).values())


def test_one_key_takes_no_place_of_another(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n".join(KEYS) + "\n")

    async def talk(url: str) -> None:
        def connect(key: str) -> Any:
            return websockets.connect(url, additional_headers={"authorization": f"Bearer {key}"})

        async with connect(KEYS[0]) as first:
            assert json.loads(await first.recv())["type"] == "session.created"
            async with connect(KEYS[0]) as second:
                refused = json.loads(await second.recv())
                assert (refused["type"], refused["error"]["code"]) == ("error", "rate_limit_exceeded")
                with pytest.raises(ConnectionClosed) as closed:
                    await second.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1013
            async with connect(KEYS[1]) as other:
                assert json.loads(await other.recv())["type"] == "session.created"
            with pytest.raises(InvalidStatus, match="403"):
                await connect("a-key-that-nobody-has-got")

    with running(tiny_checkpoint, file, {"max_per_key": 1}) as server:
        asyncio.run(asyncio.wait_for(talk(address(server)), 60))


def test_pings_that_could_never_be_answered_in_time_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"limits\.half_open_s is 10, no longer than ping_s 10; a peer could never"):
        check_recipe({"size": "tiny", "serving": {"limits": {"half_open_s": 10.0}}})


def address(server: Server) -> str:
    return server.url.replace("http", "ws", 1) + "/v1/realtime"
