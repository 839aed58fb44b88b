"""Paced clients of the serving bench, in a process of their own: sound leaves at the pace of speech.

``python -m pipelines.bench.serve_clients`` reads a plan as JSON from standard input and writes what it saw to standard
output.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.bench.serve_material import RATE_HZ, last_sound, quiet, speech

PIECE_S = 0.020
SILENCE_S = 0.600
AFTER_S = 0.4
"""Between the end of an answer's sound and the next turn."""
LONGEST_WAIT_S = 30.0


@dataclass
class Seen:
    """What one client measured."""

    first_audio_ms: list[float] = field(default_factory=list)
    """From the sample at t2 + silence leaving, t2 being the end of the recorded speech."""
    after_detected_ms: list[float] = field(default_factory=list)
    """The same with the server's own t2."""
    early: int = 0
    """Sounds that came before the end of the turn."""
    underruns: int = 0
    gaps_ms: list[float] = field(default_factory=list)
    turns: int = 0
    errors: list[str] = field(default_factory=list)
    after_cancel_ms: list[float] = field(default_factory=list)
    unpunctuated: int = 0


class Voice:
    """One conversation."""

    def __init__(self, url: str, plan: dict[str, Any], number: int) -> None:
        self.url, self.plan, self.number, self.seen = url, plan, number, Seen()
        self.sent = 0
        self.departures: list[tuple[int, float]] = []
        self.events: asyncio.Queue[tuple[float, dict[str, Any]]] = asyncio.Queue()

    async def run(self) -> Seen:
        """All turns of the plan."""
        import websockets

        async with websockets.connect(self.url, max_size=None, compression=None) as self.socket:
            reader = asyncio.create_task(self._read())
            omni = {"statistics": True, **self.plan.get("omni", {})}
            session = {"type": "realtime", "max_output_tokens": self.plan.get("rows", 40), "omni": omni}
            await self._send({"type": "session.update", "session": session})
            await self._until("session.updated")
            await asyncio.sleep(self.plan.get("stagger_s", 0.0) * self.number)
            if self.plan["kind"] == "interrupts":
                await self._interrupts()
            else:
                await self._turns()
            reader.cancel()
        return self.seen

    async def _turns(self) -> None:
        began = time.monotonic()
        for turn in range(self.plan["turns"]):
            if time.monotonic() - began > self.plan.get("for_s", 1e9):
                break
            words = self.plan.get("seed", 0) + self.number * 31 + turn
            said = speech(self.plan["speech_s"], words)
            await self._turn(np.concatenate([quiet(0.3, turn), _lead(self.plan.get("lead_s", 0.0), words), said]))

    async def _turn(self, spoken: np.ndarray) -> None:
        """Speak at the pace of speech, stay silent until the answer was heard."""
        base = self.sent
        end = base + last_sound(spoken)
        due_sample = end + int(SILENCE_S * RATE_HZ)
        sound = np.concatenate([spoken, quiet(LONGEST_WAIT_S, self.number)])
        piece = int(PIECE_S * RATE_HZ)
        self.departures = []
        answer = asyncio.create_task(self._hear(due_sample))
        start, next_at = 0, time.monotonic()
        while not answer.done() and start < len(sound):
            raw = sound[start : start + piece].tobytes()
            await self._send({"type": "input_audio_buffer.append", "audio": base64.b64encode(raw).decode()})
            start += piece
            self.sent = base + start
            self.departures.append((self.sent, time.monotonic()))
            next_at += PIECE_S
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
        if answer.done():
            answer.result()  # a turn that broke is no turn: the bench ends with its reason
        else:
            answer.cancel()
            self.seen.errors.append(f"no answer within {len(sound) / RATE_HZ:.0f} s of sound")
        self.seen.turns += 1

    def _left(self, sample: int) -> float:
        """When a sample left; before the piece that holds it was sent, it has not."""
        return next((at for until, at in self.departures if until >= sample), time.monotonic())

    async def _hear(self, due_sample: int) -> None:
        first, audio_ms, stopped_ms = 0.0, 0.0, 0.0
        longest_s = LONGEST_WAIT_S + self.plan["speech_s"] + self.plan.get("lead_s", 0.0)
        while True:
            async with asyncio.timeout(longest_s):
                at, event = await self.events.get()
            kind = event["type"]
            if kind == "error":
                self.seen.errors.append(event["error"]["message"][:200])
            elif kind == "input_audio_buffer.speech_stopped":
                stopped_ms = event["audio_end_ms"]
            elif kind == "response.output_audio.delta":
                if not first:
                    first = at
                    self.seen.first_audio_ms.append(1000 * (at - self._left(due_sample)))
                    detected = int(stopped_ms / 1000 * RATE_HZ) + int(SILENCE_S * RATE_HZ)
                    self.seen.after_detected_ms.append(1000 * (at - self._left(detected)))
                    self.seen.early += self.sent < detected
                else:
                    late_ms = 1000 * (at - first) - audio_ms
                    if late_ms > 0:
                        self.seen.underruns += 1
                        self.seen.gaps_ms.append(late_ms)
                audio_ms += len(event["delta"]) * 3 / 4 / 2 / RATE_HZ * 1000
            elif kind == "response.done":
                if event["response"]["status"] == "failed":
                    self.seen.errors.append(str(event["response"]["status_details"])[:200])
                left_s = first + audio_ms / 1000 - time.monotonic() if first else 0.0
                await asyncio.sleep(max(0.0, left_s) + AFTER_S)
                return

    async def _interrupts(self) -> None:
        """Ask in words, cancel in the middle of the sound, count the sound that still comes."""
        draws = np.random.default_rng(self.number)
        content = [{"type": "input_text", "text": "say blue two"}]
        for _ in range(self.plan["turns"]):
            item = {"type": "message", "role": "user", "content": content}
            await self._send({"type": "conversation.item.create", "item": item})
            await self._send({"type": "response.create"})
            await self._until("response.output_audio.delta")
            await asyncio.sleep(float(draws.uniform(0.0, 0.8)))
            await self._send({"type": "response.cancel"})
            cancelled, late_ms = time.monotonic(), 0.0
            while True:
                async with asyncio.timeout(LONGEST_WAIT_S):
                    at, event = await self.events.get()
                if event["type"] == "response.output_audio.delta" and at > cancelled:
                    late_ms += len(event["delta"]) * 3 / 4 / 2 / RATE_HZ * 1000
                if event["type"] == "response.done":
                    break
            self.seen.after_cancel_ms.append(late_ms)
            said = event["response"]["output"][0]["content"][0]["transcript"]
            self.seen.unpunctuated += bool(said) and said[-1] not in ".!?,;:"
            self.seen.turns += 1
            await self._send({"type": "conversation.item.delete", "item_id": event["response"]["output"][0]["id"]})

    async def _until(self, kind: str) -> dict[str, Any]:
        while True:
            async with asyncio.timeout(LONGEST_WAIT_S):
                _, event = await self.events.get()
            if event["type"] == "error":
                self.seen.errors.append(event["error"]["message"][:200])
            if event["type"] == kind:
                return event

    async def _read(self) -> None:
        async for frame in self.socket:
            self.events.put_nowait((time.monotonic(), json.loads(frame)))

    async def _send(self, event: dict[str, Any]) -> None:
        await self.socket.send(json.dumps(event))


def _lead(seconds: float, words: int) -> np.ndarray:
    """What a longer turn says before the words that a short one consists of; a whole number of pieces long."""
    if not seconds:
        return np.zeros(0, np.int16)
    return np.concatenate([speech(seconds - PIECE_S * 4, words + 7), quiet(PIECE_S * 4, words)])


async def _refusals(url: str, plan: dict[str, Any]) -> list[float]:
    """Fill the server, then measure from the connection's beginning to the reason."""
    import websockets

    held = [await websockets.connect(url, max_size=None) for _ in range(plan["fill"])]
    for socket in held:
        await socket.recv()
    waits = []
    for _ in range(plan["turns"]):
        began = time.monotonic()
        async with websockets.connect(url) as one_more:
            event = json.loads(await one_more.recv())
        waits.append(1000 * (time.monotonic() - began) if event["type"] == "error" else float("nan"))
    for socket in held:
        await socket.close()
    return waits


async def _main(plan: dict[str, Any]) -> Any:
    if plan["kind"] == "refusals":
        return await _refusals(plan["url"], plan)
    voices = [Voice(plan["url"], plan, number) for number in range(plan.get("clients", 1))]
    return [vars(seen) for seen in await asyncio.gather(*(voice.run() for voice in voices))]


if __name__ == "__main__":
    json.dump(asyncio.run(_main(json.load(sys.stdin))), sys.stdout)
