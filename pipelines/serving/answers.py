"""Answers in the shape of chat completions: message, sound, usage."""

from __future__ import annotations

import base64
import io
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

AUDIO_LIFE_S = 3600
"""How long a spoken answer may be named by its id in a later request."""
MAX_REMEMBERED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """The sound of an answer."""

    wave_S: NDArray[np.float32]
    """Mono samples in -1..1; empty when the model said nothing."""
    sample_rate_hz: int
    """Of the wave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was generated for one request."""

    text: str
    """The words, stop words and what follows them left out."""
    finish_reason: str
    """``stop`` or ``length``."""
    prompt_rows: Mapping[str, int]
    """Rows of the prompt by kind: text, image, audio."""
    text_rows: int
    """Generated rows that carry no codec frame."""
    audio_rows: int
    """Generated rows that carry codec ids."""
    spoken: Spoken | None = None
    """Sound, where it was asked for."""
    logprobs: dict[str, Any] | None = None
    """Log-probabilities in their wire form, where they were asked for."""


def completion(answer: Answer, model: str, audio_form: str, audio_id: str) -> dict[str, Any]:
    """Body of a chat completion.

    Args:
        answer: What was generated.  model: Name to report.  audio_form: wav or pcm16.  audio_id: Id of the sound.
    """
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.spoken is not None:
        message["content"] = None
        message["audio"] = {
            "id": audio_id,
            "data": base64.b64encode(sound_bytes(answer.spoken, audio_form)).decode(),
            "transcript": answer.text,
            "expires_at": int(time.time()) + AUDIO_LIFE_S,
        }
    choice = {"index": 0, "message": message, "logprobs": answer.logprobs, "finish_reason": answer.finish_reason}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage_of(answer.prompt_rows, answer.text_rows, answer.audio_rows),
        "service_tier": "default",
        "system_fingerprint": None,
    }


def usage_of(prompt_rows: Mapping[str, int], text_rows: int, audio_rows: int) -> dict[str, Any]:
    """Rows in and out: one row of the language sequence counts as one token."""
    prompt = sum(prompt_rows.values())
    generated = text_rows + audio_rows
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "text_tokens": prompt_rows.get("text", 0),
            "image_tokens": prompt_rows.get("image", 0),
            "audio_tokens": prompt_rows.get("audio", 0),
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "text_tokens": text_rows,
            "audio_tokens": audio_rows,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def sound_bytes(spoken: Spoken, form: str) -> bytes:
    """wav (16 bit, with header) or pcm16 (bare little-endian samples at the codec's rate)."""
    pcm_S = np.clip(np.round(spoken.wave_S * 32767.0), -32768, 32767).astype("<i2")
    if form == "pcm16":
        return pcm_S.tobytes()
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, pcm_S, spoken.sample_rate_hz, format="WAV", subtype="PCM_16")
    return out.getvalue()


class Transcripts:
    """What earlier spoken answers said, by id, so that a client may name one instead of repeating its words.

    Held by one gateway replica for :data:`AUDIO_LIFE_S`, at most :data:`MAX_REMEMBERED` of them.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def keep(self, transcript: str) -> str:
        """Remember a transcript; returns its id, which cannot be guessed."""
        name = f"audio_{uuid.uuid4().hex}"
        self._kept[name] = (time.monotonic() + AUDIO_LIFE_S, transcript)
        while len(self._kept) > MAX_REMEMBERED:
            self._kept.popitem(last=False)
        return name

    def put(self, name: str, transcript: str) -> None:
        """Say what an answer said whose id was given out before its end."""
        if name in self._kept:
            self._kept[name] = (self._kept[name][0], transcript)

    def find(self, name: str) -> str | None:
        """The transcript, unless unknown or expired."""
        until, transcript = self._kept.get(name, (0.0, ""))
        return transcript if time.monotonic() < until else None
