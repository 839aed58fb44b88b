"""``/v1/audio/transcriptions`` and ``/v1/audio/speech``: the model asked in words of its own training."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from omni_ray.inference.prompt import Conversation
from pipelines.serving.answers import usage_of
from pipelines.serving.chat_turn import ChatTurn, Piece
from pipelines.serving.errors import ApiError, bad_request
from pipelines.serving.media import sound_bytes_checked
from pipelines.serving.prompt import Prompt
from pipelines.serving.protocol import ChatRequest, read_json, refusal_of
from pipelines.serving.realtime.transcripts import ASK
from pipelines.serving.sound import encode

if TYPE_CHECKING:
    from pipelines.serving.gateway import Gateway

SAY = "say {}"
MOST_CHARACTERS = 4096
TRANSCRIPT_FORMS = ("json", "text", "verbose_json")
_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg", "pcm": "audio/pcm"}
_FILES = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
}


class SpeechRequest(BaseModel):
    """Body of ``POST /v1/audio/speech``."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    input: str = Field(min_length=1, max_length=MOST_CHARACTERS)
    model: str | None = None
    voice: Any = None
    """Accepted and not used: the model has one voice."""
    instructions: str | None = None
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] = "mp3"
    speed: float | None = Field(default=None, ge=1.0, le=1.0)
    stream_format: Literal["audio", "sse"] = "audio"


async def speech(gateway: Gateway, request: Request) -> Response:
    """Read a text aloud.

    Raises:
        ApiError: 400 a request that cannot be, 429 too many, 503 a stage is down.
    """
    raw = await request.body()
    body = read_json(raw)
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object with input")
    try:
        asked = SpeechRequest.model_validate(body)
    except ValidationError as error:
        raise refusal_of(error) from None
    content = [{"type": "text", "text": SAY.format(asked.input)}]
    prompt = await gateway.beside(
        _prompt, gateway, Conversation(messages=({"role": "user", "content": content},)), True
    )
    turn = gateway.turn([])
    pieces = turn.pieces(prompt, True)
    if asked.stream_format == "sse":
        return StreamingResponse(_speech_events(pieces, turn, prompt), media_type="text/event-stream")
    if asked.response_format == "pcm":
        return StreamingResponse(_pcm(pieces), media_type=_TYPES["pcm"])
    waves = [piece.wave_S async for piece in pieces]
    wave_S = np.concatenate(waves) if waves else np.zeros(0, np.float32)
    rate_hz = gateway.recipe.networks.codec.output_rate_hz
    raw = await gateway.beside(_file, wave_S, rate_hz, asked.response_format)
    return Response(raw, media_type=_TYPES[asked.response_format])


async def transcriptions(gateway: Gateway, request: Request) -> Response:
    """Write down what is said in a sound.

    Raises:
        ApiError: 400 no sound that can be read, 413 too large, 429 too many, 503 a stage is down.
    """
    form = await _form(request)
    try:
        raw, shape, streamed = await _uploaded(form)
    finally:
        await form.close()
    seconds = await gateway.beside(sound_bytes_checked, raw, "file", gateway.limits)
    content = [{"type": "audio", "media": "file"}, {"type": "text", "text": ASK}]
    conversation = Conversation(messages=({"role": "user", "content": content},), media={"file": raw})
    prompt = await gateway.beside(_prompt, gateway, conversation, False)
    turn = gateway.turn([])
    pieces = turn.pieces(prompt, False)
    if streamed:
        return StreamingResponse(_transcript_events(pieces, turn, prompt), media_type="text/event-stream")
    text = "".join([piece.text async for piece in pieces]).strip()
    if shape == "text":
        return PlainTextResponse(text + "\n")
    body: dict[str, Any] = {"text": text, "usage": _usage(prompt, turn)}
    if shape == "verbose_json":
        segment = {"id": 0, "seek": 0, "start": 0.0, "end": seconds, "text": text, "tokens": [], "temperature": 0.0}
        segment |= {"avg_logprob": 0.0, "compression_ratio": 1.0, "no_speech_prob": 0.0}
        body |= {"task": "transcribe", "language": "english", "duration": seconds, "segments": [segment]}
        body["usage"] = {"type": "duration", "seconds": seconds}
    return JSONResponse(body)


async def _uploaded(form: FormData) -> tuple[bytes, str, bool]:
    """The sound, the form of the answer, and whether it is streamed."""
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise bad_request("the form has no file; send the sound as field file", param="file")
    shape = str(form.get("response_format") or "json")
    if shape not in TRANSCRIPT_FORMS:
        raise bad_request(
            f"response_format is {shape[:40]!r}; forms are {', '.join(TRANSCRIPT_FORMS)}", param="response_format"
        )
    return await upload.read(), shape, str(form.get("stream") or "").lower() in ("true", "1")


def _prompt(gateway: Gateway, conversation: Conversation, speaks: bool) -> Prompt:
    asked = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "-"}], "modalities": ["text", "audio"] if speaks else ["text"]}
    )
    return gateway.maker.make(conversation, asked, seed=0)


async def _form(request: Request) -> FormData:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "send the sound as multipart/form-data with a field file")
    try:
        return await request.form(max_files=2, max_fields=32)
    except HTTPException as error:
        raise bad_request(f"the form cannot be read ({str(error.detail)[:80]})", code="invalid_form") from None


async def _pcm(pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        if len(piece.wave_S):
            yield encode(piece.wave_S, "audio/pcm")


async def _speech_events(pieces: AsyncIterator[Piece], turn: ChatTurn, prompt: Prompt) -> AsyncIterator[str]:
    async for piece in pieces:
        if len(piece.wave_S):
            data = base64.b64encode(encode(piece.wave_S, "audio/pcm")).decode()
            yield _event({"type": "speech.audio.delta", "audio": data})
    usage = _usage(prompt, turn)
    counts = {name: usage[name] for name in ("input_tokens", "output_tokens", "total_tokens")}
    yield _event({"type": "speech.audio.done", "usage": counts})


async def _transcript_events(pieces: AsyncIterator[Piece], turn: ChatTurn, prompt: Prompt) -> AsyncIterator[str]:
    said = ""
    async for piece in pieces:
        if piece.text:
            said += piece.text
            yield _event({"type": "transcript.text.delta", "delta": piece.text})
    yield _event({"type": "transcript.text.done", "text": said.strip(), "usage": _usage(prompt, turn)})
    yield "data: [DONE]\n\n"


def _usage(prompt: Prompt, turn: ChatTurn) -> dict[str, Any]:
    counts = usage_of(prompt.counts, turn.text_rows, turn.audio_rows)
    details = counts["prompt_tokens_details"]
    return {
        "type": "tokens",
        "input_tokens": counts["prompt_tokens"],
        "output_tokens": counts["completion_tokens"],
        "total_tokens": counts["total_tokens"],
        "input_token_details": {"audio_tokens": details["audio_tokens"], "text_tokens": details["text_tokens"]},
    }


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _file(wave_S: NDArray[np.float32], rate_hz: int, form: str) -> bytes:
    import soundfile

    out = io.BytesIO()
    kind, subtype = _FILES[form]
    soundfile.write(out, wave_S, rate_hz, format=kind, subtype=subtype)
    return out.getvalue()


Handler = Callable[["Gateway", Request], Any]
