"""Clients of the chaos bench, in a process of their own: they talk, and some of them break off, fall silent or rave.

``python -m pipelines.bench.chaos_clients`` reads a plan, one line of JSON, from standard input, writes what happened as
one line of JSON, and holds on to its half-open connections until its standard input ends.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.bench.chaos_scripts import GARBAGE, Script, first_turn, script, second_turn, settings, written

HANG_S = 5.0
"""Longest wait for an event that is due."""
SLOW_BYTES, SLOW_READS = 1000, 90
"""A slow reader takes this many bytes a second, so often at most."""
HELD: list[Any] = []
"""Half-open connections."""


class HangError(Exception):
    """Nothing came where something was due."""


class BefallenError(Exception):
    """The session's own fault has happened; it ends here."""


@dataclass
class Seen:
    """What became of one session."""

    number: int
    fault: str
    """The fault that befell it, or empty."""
    kind: str
    began: float = 0.0
    ended: float = 0.0
    """Wall clock."""
    sound: str = ""
    """Hash of all the sound of its two answers."""
    sound_bytes: int = 0
    statuses: list[str] = field(default_factory=list)
    """How its responses ended."""
    hang: str = ""
    """What it waited for in vain."""
    broken: str = ""
    """What ended it, where nothing of its own did."""
    longest_wait_s: float = 0.0
    last: str = ""
    """The last event that came."""
    errors: list[str] = field(default_factory=list)
    """Error events beyond those that its garbage asked for."""


class Talk:
    """One session."""

    def __init__(self, url: str, one: Script) -> None:
        self.url, self.one = url, one
        self.seen = Seen(one.number, one.fault, one.kind)
        self._hash = hashlib.sha256()
        self._events = 0

    async def run(self) -> Seen:
        """From connecting to closing."""
        from websockets.exceptions import ConnectionClosed

        self.seen.began = time.time()
        try:
            await (self._slowly() if self.one.fault == "slow_reader" else self._talk())
        except HangError as hang:
            self.seen.hang = str(hang)
        except BefallenError:
            pass
        except ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd is not None else 1006
            if not (self.one.fault == "garbage" and self.one.utf8 and code in (1002, 1007)):
                self.seen.broken = f"closed {code}"
        except OSError as error:
            self.seen.broken = type(error).__name__
        self.seen.sound = self._hash.hexdigest()
        self.seen.ended = time.time()
        return self.seen

    async def _talk(self) -> None:
        import websockets

        opening = websockets.connect(self.url, max_size=None, compression=None, ping_interval=None)
        try:
            async with asyncio.timeout(HANG_S):
                self.socket = await opening
        except TimeoutError:
            raise HangError("connection") from None
        try:
            await self._until("session.created")
            await self._send([{"type": "session.update", "session": settings(self.one.kind, self.one.fault)}])
            await self._until("session.updated")
            await self._send(first_turn(self.one)[0])
            await self._until("response.done")
            if self.one.fault == "garbage":
                await self._rave()
            await self._send(second_turn(self.one))
            await self._until("response.done")
        finally:
            if self.socket not in HELD:
                await self.socket.close()

    async def _send(self, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            await self.socket.send(json.dumps(event))

    async def _until(self, kind: str) -> None:
        """Take events up to one of this kind; each must come in time."""
        while True:
            self._befall()
            began = time.monotonic()
            try:
                async with asyncio.timeout(HANG_S):
                    event = json.loads(await self.socket.recv())
            except TimeoutError:
                raise HangError(kind) from None
            self.seen.longest_wait_s = max(self.seen.longest_wait_s, time.monotonic() - began)
            self._events += 1
            self.seen.last = event["type"]
            self._note(event)
            if event["type"] == kind:
                return

    def _note(self, event: dict[str, Any]) -> None:
        if event["type"] == "response.output_audio.delta":
            raw = base64.b64decode(event["delta"])
            self._hash.update(raw)
            self.seen.sound_bytes += len(raw)
        elif event["type"] == "response.done":
            self.seen.statuses.append(event["response"]["status"])
        elif event["type"] == "error":
            self.seen.errors.append(str(event["error"].get("code") or event["error"]["message"])[:80])

    def _befall(self) -> None:
        """Break off, or fall silent, when the moment has come."""
        if self._events < self.one.moment or self.one.fault not in ("reset", "half_open"):
            return
        transport = self.socket.transport
        if self.one.fault == "half_open":
            transport.pause_reading()
            HELD.append(self.socket)
        else:
            # Lingering for no time: the system sends RST and forgets.
            raw = transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        raise BefallenError

    async def _rave(self) -> None:
        """Garbage, each answered with an error event; then a frame that may end the connection."""
        for number in self.one.garbage:
            await self.socket.send(GARBAGE[number])
            before = len(self.seen.errors)
            await self._until("error")
            del self.seen.errors[before:]
        if self.one.utf8:
            await self.socket.send(b"\xc3\x28\xa0\xff", text=True)
            await self._until("error")

    async def _slowly(self) -> None:
        """Ask for a long answer and take 1 kB of it a second, until the server lets go."""
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        host, port, path = _place(self.url)
        await asyncio.get_running_loop().sock_connect(raw, (host, port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=SLOW_BYTES)
        try:
            writer.write(_handshake(host, port, path))
            asked = [{"type": "session.update", "session": settings("text", "slow_reader")}]
            for event in [*asked, *written([{"type": "input_text", "text": self.one.words[0]}])]:
                writer.write(_frame(json.dumps(event).encode()))
            for _ in range(SLOW_READS):
                await asyncio.sleep(1.0)
                async with asyncio.timeout(HANG_S):
                    if not await reader.read(SLOW_BYTES):
                        return
        except (TimeoutError, ConnectionError):
            return  # let go: that is how it should end
        finally:
            writer.transport.abort()


def _place(url: str) -> tuple[str, int, str]:
    host, _, path = url.partition("://")[2].partition("/")
    name, _, port = host.partition(":")
    return name, int(port), "/" + path


def _handshake(host: str, port: int, path: str) -> bytes:
    head = (
        f"GET {path} HTTP/1.1",
        f"Host: {host}:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version: 13",
    )
    return ("\r\n".join(head) + "\r\n\r\n").encode()


def _frame(payload: bytes) -> bytes:
    """One masked text frame; the mask is zero, which is one."""
    size = len(payload)
    length = struct.pack("!BB", 0x81, 0x80 | size) if size < 126 else struct.pack("!BBH", 0x81, 0x80 | 126, size)
    return length + bytes(4) + payload


async def silenced(url: str, after: int) -> tuple[str, Any]:
    """A relay to the server that falls silent towards the client after so many bytes: a hang put in on purpose."""
    host, port, path = _place(url)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, port)

        async def pour(source: asyncio.StreamReader, sink: asyncio.StreamWriter, most: int) -> None:
            while most > 0 and (data := await source.read(min(most, 1 << 14))):
                most -= len(data)
                sink.write(data)

        tasks = [asyncio.create_task(pour(reader, back, 1 << 30)), asyncio.create_task(pour(there, writer, after))]
        try:
            await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
            back.close()
            writer.close()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    return f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}", server


async def converse(plan: dict[str, Any]) -> dict[str, Any]:
    """Sessions of the plan, so many together, one beginning when another has ended; over again until its file is there.

    The file says that the storm is over: it lasts as long as its kills do.
    """
    over = Path(plan["until"]) if plan.get("until") else None
    numbers = itertools.chain(
        plan["numbers"],
        itertools.takewhile(lambda _: over is not None and not over.exists(), itertools.cycle(plan["numbers"])),
    )
    seen: list[Seen] = []

    async def one_after_another() -> None:
        for number in numbers:
            seen.append(await Talk(plan["url"], script(number, plan["seed"], plan["faults"])).run())

    await asyncio.gather(*(one_after_another() for _ in range(plan["together"])))
    control = None
    if plan.get("hang"):
        url, server = await silenced(plan["url"], 2500)
        control = vars(await Talk(url, script(plan["numbers"][0], plan["seed"], False)).run())
        server.close()
    await asyncio.sleep(0.5)
    left = len(asyncio.all_tasks()) - 1 - len(HELD)  # a held connection has its reader
    return {"seen": [vars(one) for one in seen], "control": control, "held": len(HELD), "tasks_left": left}


async def _main(plan: dict[str, Any]) -> None:
    print(json.dumps(await converse(plan)), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for held in HELD:
        held.transport.abort()


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.stdin.readline())))
