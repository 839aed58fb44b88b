"""A live session in one process: sound for it, its server events, and their strict check against the public types."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omni_ray.config.serving import ServingConfig
from omni_ray.inference.omni_model import load_model
from omni_ray.inference.vad import voice_activity
from pipelines.serving.local_stages import LocalStages
from pipelines.serving.realtime.context import Template
from pipelines.serving.realtime.session import Session

RATE_HZ = 24000
SHORT = {"type": "realtime", "max_output_tokens": 14}
"""A session whose answers stay short."""
RESPONSE_ORDER = (
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
)


def voiced(seconds: float, rate_hz: int = RATE_HZ, seed: int = 0) -> np.ndarray:
    """A vowel-like sound that every detector takes for speech; ``seed`` changes its pitch."""
    time_s = np.arange(int(seconds * rate_hz)) / rate_hz
    base = 110 + 10 * (seed % 8)
    pitch = 2 * np.pi * np.cumsum(base + 6 * np.sin(2 * np.pi * 5 * time_s)) / rate_hz
    wave = np.zeros_like(time_s)
    for harmonic in range(1, 30):
        hz = base * harmonic
        gain = np.exp(-(((hz - 700) / 200) ** 2)) + 0.6 * np.exp(-(((hz - 1200) / 250) ** 2)) + 0.05 / harmonic
        wave += gain * np.sin(harmonic * pitch)
    return (0.15 * wave * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_s))).astype(np.float32)


def room(seconds: float, rate_hz: int = RATE_HZ) -> np.ndarray:
    """A quiet room."""
    return np.random.default_rng(1).normal(0, 2e-4, int(seconds * rate_hz)).astype(np.float32)


def pcm(wave: np.ndarray) -> bytes:
    return np.clip(np.round(wave * 32767), -32768, 32767).astype("<i2").tobytes()


class Client:
    """Speaks to a session object directly."""

    def __init__(self, session: Session, pump: asyncio.Task[None]) -> None:
        self.session, self._pump = session, pump
        self.events: list[dict[str, Any]] = []
        self.news = asyncio.Event()

    async def receive(self, frame: str) -> None:
        self.events.append(json.loads(frame))
        self.news.set()

    async def send(self, kind: str, **fields: Any) -> None:
        await self.session.handle(json.dumps({"type": kind, **fields}))

    async def say(self, *waves: np.ndarray, piece: int = 480) -> None:
        """Append sound in pieces, with a turn of the event loop between them (much faster than real time)."""
        raw = pcm(np.concatenate(waves))
        for start in range(0, len(raw), 2 * piece):
            audio = base64.b64encode(raw[start : start + 2 * piece]).decode()
            await self.send("input_audio_buffer.append", audio=audio)
            await asyncio.sleep(0)

    async def wait(self, kind: str, count: int = 1, timeout_s: float = 180.0) -> dict[str, Any]:
        """The ``count``-th event of a type, waited for."""

        async def found() -> dict[str, Any]:
            while len(self.of(kind)) < count:
                self.news.clear()
                await self.news.wait()
            return self.of(kind)[count - 1]

        return await asyncio.wait_for(found(), timeout_s)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    def kinds(self) -> list[str]:
        """Types in order, runs of deltas as one."""
        out: list[str] = []
        for event in self.events:
            if not (out and out[-1] == event["type"] and event["type"].endswith(".delta")):
                out.append(event["type"])
        return out

    async def close(self) -> None:
        await self.session.close()
        self._pump.cancel()


async def open_client(stages: Any, model: Any, beta: bool = False, **serving: Any) -> Client:
    """A session over stages of one process."""
    template = Template(model.tokenizer, model.config)
    box: list[Client] = []

    async def send(frame: str) -> None:
        await box[0].receive(frame)

    session = Session(
        stages=stages,
        template=template,
        serving=ServingConfig.model_validate(serving),
        activity=voice_activity("energy"),  # the same on every machine, whatever is installed
        model="omni-ray-tiny",
        send=send,
        beta=beta,
    )
    client = Client(session, asyncio.create_task(session.outbox.run()))
    box.append(client)
    session.open()
    await client.wait("session.created")
    return client


def local(checkpoint: Path) -> tuple[Any, LocalStages]:
    model = load_model(checkpoint)
    return model, LocalStages(model)


def check_ga(event: Mapping[str, Any]) -> None:
    """Strict check against the general-availability types of the official client: known type, no unknown field.

    Raises:
        AssertionError: names the field.
    """
    from openai.types.realtime import RealtimeServerEvent
    from pydantic import TypeAdapter

    parsed: Any = TypeAdapter(RealtimeServerEvent).validate_python(dict(event))
    assert parsed.type == event["type"], f"{event['type']} is not a known type"
    _no_extra(parsed, event["type"])
    assert event["event_id"]


def _no_extra(value: Any, where: str) -> None:
    extra = getattr(value, "model_extra", None)
    # The types of the two session events are those of a request; what servers send has an id and a kind besides.
    # ``omni`` is this server's extension, told only to clients that asked for it.
    allowed = {"id", "object", "omni"} if where in ("session.created.session", "session.updated.session") else set()
    assert not set(extra or {}) - allowed, f"{where} has unknown fields {sorted(extra)}"
    if hasattr(value, "model_fields_set"):
        for name in value.model_fields_set:
            _no_extra(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _no_extra(inner, f"{where}[{number}]")


Talk = Callable[[Client], Awaitable[None]]


def held(stages: Any) -> tuple[int, int, int]:
    """Sessions that each stage holds."""
    return len(stages.ears), len(stages.mouth), len(stages.language.engine)


def run(parts: Any, talk: Talk, **options: Any) -> Client:
    """One conversation; every event is checked, and afterwards the stages hold nothing of it."""
    model, stages = parts

    async def main() -> Client:
        client = await open_client(stages, model, **options)
        try:
            await talk(client)
        finally:
            await client.close()
        return client

    client = asyncio.run(main())
    if not options.get("beta"):
        for event in client.events:
            check_ga(event)
    end = time.monotonic() + 30
    while held(stages) != (0, 0, 0) and time.monotonic() < end:
        time.sleep(0.005)
    assert held(stages) == (0, 0, 0)
    return client


def png(side: int = 40, red: int = 200) -> str:
    out = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), (red, 30, 30), np.uint8)).save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


async def settled(client: Client) -> None:
    """Wait until nothing runs for this session."""
    while client.session.dialogue._running:
        await asyncio.sleep(0.002)


def generated(client: Client) -> list[list[int]]:
    """Rows of every spoken item in the history."""
    items = client.session.dialogue.conversation.items
    return [item.spoken.ids_R5.tolist() for item in items if item.spoken is not None]
