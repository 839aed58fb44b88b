"""Twenty turns of pipecat's OpenAI realtime service, unmodified, against a running server.

Runs in an environment of its own (``make clients``): ``python pipecat_dialogue.py URL SPEECH.npy`` prints one JSON
document: turns finished, seconds of sound heard, errors.  SPEECH holds [turns, samples] int16 at 24 kHz.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from loguru import logger
from pipecat.frames.frames import (
    BotStoppedSpeakingFrame,
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    InputImageRawFrame,
    LLMContextFrame,
    LLMFullResponseEndFrame,
    TTSAudioRawFrame,
    TTSTextFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineParams, PipelineTask
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.openai.realtime import events
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService

RATE_HZ = 24000
PIECE = RATE_HZ // 50
TURNS = 20
TURN_S = 60.0


class Ear(FrameProcessor):
    """What came out of the service."""

    def __init__(self) -> None:
        super().__init__()
        self.sound_s = 0.0
        self.words = ""
        self.ended = 0
        self.errors: list[str] = []
        self.news = asyncio.Event()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Note a frame, hand it on."""
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            self.sound_s += len(frame.audio) / 2 / frame.sample_rate
        elif isinstance(frame, TTSTextFrame):
            self.words += frame.text
        elif isinstance(frame, LLMFullResponseEndFrame):
            self.ended += 1
            # What an output transport says when it has played everything.
            await self.push_frame(BotStoppedSpeakingFrame(), FrameDirection.UPSTREAM)
        elif isinstance(frame, ErrorFrame):
            self.errors.append(frame.error)
        self.news.set()
        await self.push_frame(frame, direction)

    async def until(self, found: Any) -> None:
        """Wait until ``found()``."""
        while not found() and not self.errors:
            self.news.clear()
            await asyncio.wait_for(self.news.wait(), TURN_S)


class Talk:
    """The script: the first turn is text, then speech; every third shows a picture, every fifth is interrupted."""

    def __init__(self, url: str, speech: np.ndarray) -> None:
        properties = events.SessionProperties(
            instructions="answer in one word",
            max_output_tokens=30,
            audio=events.AudioConfiguration(
                input=events.AudioInput(
                    transcription=events.InputAudioTranscription(model="any"),
                    turn_detection=events.TurnDetection(silence_duration_ms=600),
                ),
                output=events.AudioOutput(voice="alloy"),
            ),
        )
        self.llm = OpenAIRealtimeLLMService(
            api_key="none",
            base_url=url,
            settings=OpenAIRealtimeLLMService.Settings(model="any", session_properties=properties),
        )
        self.ear, self.speech = Ear(), speech
        params = PipelineParams(audio_in_sample_rate=RATE_HZ, audio_out_sample_rate=RATE_HZ)
        self.task = PipelineTask(Pipeline([self.llm, self.ear]), params=params, enable_rtvi=False)
        self.turns = self.interrupts = self.reconnects = 0

    async def say(self, wave: np.ndarray, until: Any) -> None:
        """Sound at the pace of speech, then a quiet room, until an answer ends."""
        quiet = np.zeros(PIECE, np.int16)
        pieces = [wave[i : i + PIECE] for i in range(0, len(wave) - PIECE, PIECE)]
        clock = asyncio.get_running_loop().time
        due, number = clock(), 0
        while not until() and not self.ear.errors and number < len(pieces) + TURN_S / 0.02:
            piece = pieces[number] if number < len(pieces) else quiet
            await self.task.queue_frame(InputAudioRawFrame(piece.tobytes(), RATE_HZ, 1))
            number, due = number + 1, due + 0.02
            await asyncio.sleep(max(0.0, due - clock()))

    async def turn(self, number: int) -> None:
        """One turn of the script."""
        ear, wave = self.ear, self.speech[number % len(self.speech)]
        ended, heard = ear.ended, ear.sound_s
        if number == 0:
            context = LLMContext([{"role": "user", "content": "which digit is it"}])
            await self.task.queue_frame(LLMContextFrame(context))
            await ear.until(lambda: ear.ended > ended)
        else:
            if number % 3 == 0:
                picture = np.full((48, 48, 3), (200, 30, 30), np.uint8)
                await self.task.queue_frame(InputImageRawFrame(picture.tobytes(), (48, 48), "RGB"))
            await self.say(wave, lambda: ear.ended > ended)
            if number % 5 == 0:
                # Speak over the answer of one more question: the client truncates what it was playing.
                await self.say(wave, lambda: ear.sound_s > heard)
                self.interrupts += 1
                ended = ear.ended
                await self.say(wave, lambda: ear.ended > ended)
        assert ear.errors or ear.sound_s > heard, f"turn {number} had no sound"
        self.turns += not ear.errors

    async def script(self) -> None:
        """All turns, one reconnection half way."""
        try:
            for number in range(TURNS):
                await self.turn(number)
                if self.ear.errors:
                    break
                if number == TURNS // 2 - 1:
                    await self.llm.reset_conversation()
                    self.reconnects += 1
                    await asyncio.sleep(1.0)
        except Exception as error:
            self.ear.errors.append(f"{type(error).__name__}: {error}")
        finally:
            await self.task.cancel()

    async def run(self) -> dict[str, Any]:
        """The figures."""
        runner = PipelineRunner(handle_sigint=False)
        await asyncio.gather(runner.run(self.task), self.script())
        return {
            "turns": self.turns,
            "sound_s": round(self.ear.sound_s, 2),
            "words": len(self.ear.words),
            "interrupts": self.interrupts,
            "reconnects": self.reconnects,
            "errors": self.ear.errors,
        }


if __name__ == "__main__":
    logger.remove()
    logger.add(sys.stderr, level="INFO")
    print(json.dumps(asyncio.run(Talk(sys.argv[1], np.load(sys.argv[2])).run())))
