"""Twenty turns of livekit's OpenAI realtime plugin, unmodified, against a running server.

Runs in an environment of its own (``make clients``): ``python livekit_dialogue.py URL SPEECH.npy`` prints one JSON
document: turns finished, seconds of sound heard, errors.  SPEECH holds [turns, samples] int16 at 24 kHz.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from livekit import rtc
from livekit.agents import llm
from livekit.plugins.openai.realtime import RealtimeModel
from openai.types.beta.realtime.session import TurnDetection

RATE_HZ = 24000
PIECE = RATE_HZ // 50
TURNS = 20
TURN_S = 60.0
RECYCLE_S = 90.0
"""The client opens a new connection after this and sends the history again; half way the script waits for it, for the
client gives up when an answer that was cut at the token limit is under way just then."""


class Talk:
    """The script: the first turn is text, then speech; every third shows a picture, every fifth is interrupted."""

    def __init__(self, url: str, speech: np.ndarray) -> None:
        detection = TurnDetection(type="server_vad", silence_duration_ms=600)
        model = RealtimeModel(
            base_url=url, api_key="none", model="any", turn_detection=detection, max_session_duration=RECYCLE_S
        )
        self.speech, self.session = speech, model.session()
        self.turns = self.interrupts = self.reconnects = self.ended = self.transcripts = 0
        self.sound_s = 0.0
        self.errors: list[str] = []
        self.message = ""
        self.tasks: set[asyncio.Task[None]] = set()
        self.session.on("generation_created", self._generation)
        self.session.on("error", lambda error: self.errors.append(str(error.error)))
        self.session.on("session_reconnected", self._reconnected)
        self.session.on("input_audio_transcription_completed", self._transcribed)

    def _generation(self, made: llm.GenerationCreatedEvent) -> None:
        task = asyncio.create_task(self._listen(made))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _reconnected(self, _: Any) -> None:
        self.reconnects += 1

    def _transcribed(self, _: Any) -> None:
        self.transcripts += 1

    async def _listen(self, made: llm.GenerationCreatedEvent) -> None:
        async for message in made.message_stream:
            self.message = message.message_id
            async for frame in message.audio_stream:
                self.sound_s += frame.duration
        self.ended += 1

    async def say(self, wave: np.ndarray, until: Callable[[], bool]) -> None:
        """Sound at the pace of speech, then a quiet room, until something was heard."""
        quiet = np.zeros(PIECE, np.int16)
        pieces = [wave[i : i + PIECE] for i in range(0, len(wave) - PIECE, PIECE)]
        clock = asyncio.get_running_loop().time
        due, number = clock(), 0
        while not until() and not self.errors:
            assert number < len(pieces) + TURN_S / 0.02, "no answer came"
            piece = pieces[number] if number < len(pieces) else quiet
            self.session.push_audio(rtc.AudioFrame(piece.tobytes(), RATE_HZ, 1, PIECE))
            number, due = number + 1, due + 0.02
            await asyncio.sleep(max(0.0, due - clock()))

    async def turn(self, number: int) -> None:
        """One turn of the script."""
        wave, ended, heard = self.speech[number % len(self.speech)], self.ended, self.sound_s
        if number == 0:
            context = llm.ChatContext.empty()
            context.add_message(role="user", content="which digit is it")
            await self.session.update_instructions("answer in one word")
            await self.session.update_chat_ctx(context)
            await self.session.generate_reply()
            while self.ended == ended and not self.errors:
                await asyncio.sleep(0.02)
        else:
            if number % 3 == 0:
                picture = np.full((48, 48, 4), (200, 30, 30, 255), np.uint8)
                self.session.push_video(rtc.VideoFrame(48, 48, rtc.VideoBufferType.RGBA, picture.tobytes()))
            if number % 5 == 0:
                await self.say(wave, lambda: self.sound_s > heard)
                self.session.interrupt()
                self.session.truncate(message_id=self.message, modalities=["audio"], audio_end_ms=60)
                self.interrupts += 1
            await self.say(wave, lambda: self.ended > ended)
        assert self.errors or self.sound_s > heard, f"turn {number} had no sound"
        self.turns += not self.errors

    async def run(self) -> dict[str, Any]:
        """The figures."""
        try:
            for number in range(TURNS):
                await self.turn(number)
                if self.errors:
                    break
                if number == TURNS // 2 - 1:
                    while not self.reconnects:
                        await asyncio.sleep(0.1)
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")
        finally:
            await self.session.aclose()
        return {
            "turns": self.turns,
            "sound_s": round(self.sound_s, 2),
            "interrupts": self.interrupts,
            "reconnects": self.reconnects,
            "transcripts": self.transcripts,
            "errors": self.errors,
        }


async def main() -> None:
    """Run the script and print what was seen."""
    print(json.dumps(await Talk(sys.argv[1], np.load(sys.argv[2])).run()))


if __name__ == "__main__":
    asyncio.run(main())
