"""Figures of the serving bench that need no clock of a client: rollbacks in a session, and batched decoding."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_ray.config.serving import ServingConfig
from omni_ray.inference.omni_model import OmniModel, load_model
from omni_ray.inference.requests import GenerationRequest
from omni_ray.inference.vad import voice_activity
from omni_ray.types.modality import Modality
from pipelines.bench.serve_material import RATE_HZ, quiet, speech
from pipelines.serving.local_stages import LocalStages
from pipelines.serving.realtime.context import Template
from pipelines.serving.realtime.items import Item
from pipelines.serving.realtime.session import Session
from pipelines.serving.rooms import AudioRoom, Packet
from pipelines.serving.session_engine import SessionEngine
from pipelines.serving.sound import Format, SoundReader
from pipelines.serving.stages import AnswerOptions, Rows

ROWS = 24
SPECULATE_MS = 250
PAUSE_S = 0.32
"""Longer than the speculative silence; shorter than the end of a turn even where the next words begin with a gap."""


class Watched(LocalStages):
    """Notes which packets are encoded again after which rollback."""

    def __init__(self, model: OmniModel) -> None:
        super().__init__(model)
        self.session: Session | None = None
        self._given: set[tuple[str, int, int]] = set()
        self.again: dict[tuple[str, int], set[int]] = {}
        """(session, rollbacks so far) to the packets given before and now again."""

    async def hear(self, session: str, turn: int, packet: int, wave_S: Any, final: bool) -> Any:
        """See the protocol."""
        if (session, turn, packet) in self._given and self.session is not None:
            self.again.setdefault((session, self.session.turns.rollbacks), set()).add(packet)
        self._given.add((session, turn, packet))
        return await super().hear(session, turn, packet, wave_S, final)


def rollbacks(checkpoint: Path, count: int, seed: int) -> dict[str, Any]:
    """Force rollbacks; what is left must be what a single process makes of the same sound, encoded and prefilled whole.

    Returns:
        turns that differ, rollbacks forced, packets encoded again after one of them at most, sessions left in the
        stages, times of the cache's cuts in ms.
    """
    model = load_model(checkpoint)
    stages = Watched(model)
    found: dict[str, Any] = {"mismatches": 0, "forced": 0, "turns": 0, "cuts_ms": _timed_cuts(stages.language.engine)}

    async def main() -> None:
        while found["forced"] < count:
            equal, rolled = await _session(model, stages, _turn(seed + found["turns"]))
            found["mismatches"] += not equal
            found["forced"] += rolled
            found["turns"] += 1
        await asyncio.sleep(0.2)
        found["left"] = len(stages.language.engine) + len(stages.ears) + len(stages.mouth)
        await stages.close()

    asyncio.run(main())
    return found | {"again": max(map(len, stages.again.values()), default=0)}


def batch(checkpoint: Path, sessions: int, steps: int) -> float:
    """Generated rows per second with this many sessions in one batch."""
    model = load_model(checkpoint)
    engine = SessionEngine(model.engine)
    names = [f"s{i}" for i in range(sessions)]
    prompt = Rows.of_text(model.tokenizer.encode("USER:which digit is it\nVOICE ASSISTANT:"))
    for number, name in enumerate(names):
        engine.start(name, 0, prompt, AnswerOptions(voice=True, max_tokens=steps + 4, seed=number))
    for _ in range(3):
        engine.step(engine.running)
    made, began = 0, time.perf_counter()
    for _ in range(steps):
        running = engine.running
        engine.step(running)
        made += len(running)
    return made / (time.perf_counter() - began)


def hearing(checkpoint: Path, sessions: int, packets: int) -> tuple[float, float]:
    """Packets of a second encoded per second of this process's time, all sessions together and one by one."""
    encoder = load_model(checkpoint).audio
    draws = np.random.default_rng(sessions)
    wave_S = (0.1 * draws.normal(size=16000)).astype(np.float32)
    rates = []
    for together in (True, False):
        room = AudioRoom(encoder)
        room.hear("warm", 1, 0, wave_S, False)
        began = time.process_time()
        for number in range(packets):
            asked = [Packet(str(session), 1, number, wave_S, False) for session in range(sessions)]
            for group in [asked] if together else [[one] for one in asked]:
                room.hear_together(group)
        rates.append(sessions * packets / (time.process_time() - began))
    return rates[0], rates[1]


def _turn(seed: int) -> np.ndarray:
    """Speech, pauses in which an answer is begun, more speech, and the end."""
    draws = np.random.default_rng(seed)
    parts = [quiet(0.3, seed)]
    for number in range(4):
        parts += [speech(float(draws.uniform(0.5, 1.6)), seed * 7 + number), quiet(PAUSE_S, seed + number)]
    return np.concatenate([*parts, speech(0.6, seed * 7 + 5), quiet(1.0, seed)])


async def _session(model: OmniModel, stages: Watched, sound: np.ndarray) -> tuple[bool, int]:
    """Whether the turn's rows and its answer are those of the offline prompt, and rollbacks on the way."""
    told: list[dict[str, Any]] = []

    async def send(frame: str) -> None:
        told.append(json.loads(frame))

    session = Session(
        stages=stages,
        template=Template(model.tokenizer, model.config),
        serving=ServingConfig(),
        activity=voice_activity("silero"),
        model="bench",
        send=send,
    )
    stages.session = session
    pump = asyncio.create_task(session.outbox.run())
    settings = {"type": "realtime", "max_output_tokens": ROWS}
    await session.handle(json.dumps({"type": "session.update", "session": settings}))
    piece = RATE_HZ // 50
    for start in range(0, len(sound), piece):
        audio = base64.b64encode(sound[start : start + piece].tobytes()).decode()
        await session.handle(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
        while session.turns.attempt is not None and not session.turns.attempt.response.done.rows:
            await asyncio.sleep(0.001)  # an answer is under way when it is thrown away
        await asyncio.sleep(0)
    while session.dialogue._running or not any(event["type"] == "response.done" for event in told):
        await asyncio.sleep(0.001)
    turn, answer = session.dialogue.conversation.items[:2]
    start_ms = next(e["audio_start_ms"] for e in told if e["type"] == "input_audio_buffer.speech_started")
    end_ms = next(e["audio_end_ms"] for e in told if e["type"] == "input_audio_buffer.speech_stopped")
    heard_S = SoundReader(Format()).push(sound.astype("<i2").tobytes())
    equal = _is_offline(model, session, heard_S[start_ms * 16 : (end_ms + SPECULATE_MS) * 16], turn, answer)
    rolled = session.turns.rollbacks
    pump.cancel()
    await asyncio.gather(pump, return_exceptions=True)
    await session.close()
    return equal, rolled


def _is_offline(model: OmniModel, session: Session, wave_S: np.ndarray, turn: Item, answer: Item) -> bool:
    features_ND = model.encode(Modality.AUDIO, [wave_S])[0]
    rows = Rows.joined([block.rows for block in turn.blocks])
    values_ND = np.concatenate([values for _, values in rows.features])
    if not np.array_equal(values_ND, features_ND.numpy()) or answer.spoken is None:
        return False
    answering = session.dialogue.template.answering(True)
    request = GenerationRequest(
        ids_T5=torch.from_numpy(np.concatenate([rows.ids_T5, answering.rows.ids_T5])),
        features=tuple((offset, torch.from_numpy(values.copy())) for offset, values in rows.features),
        voice=True,
        max_tokens=ROWS,
    )
    (offline,) = model.engine.generate([request])
    return np.array_equal(offline.ids_R5.numpy(), answer.spoken.ids_R5)


def _timed_cuts(engine: SessionEngine) -> list[float]:
    """Time of every cut that an append makes, in ms."""
    times: list[float] = []
    plain = engine.cut

    def timed(session: str, at: int) -> Any:
        began = time.perf_counter()
        found = plain(session, at)
        times.append(1000 * (time.perf_counter() - began))
        return found

    engine.cut = timed  # type: ignore[method-assign]
    return times
