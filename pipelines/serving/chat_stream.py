"""A chat answer as server-sent events, in the shape of chat completion chunks."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from omni_ray.data.tokenizer import Tokenizer
from pipelines.serving.answers import AUDIO_LIFE_S, Transcripts, usage_of
from pipelines.serving.chat_turn import ChatTurn, Logprob, Piece
from pipelines.serving.errors import ApiError
from pipelines.serving.prompt import Prompt
from pipelines.serving.protocol import ChatRequest
from pipelines.serving.sound import encode


class ChunkWriter:
    """Writes the frames of one stream."""

    def __init__(self, model: str, with_usage: bool) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
            "service_tier": "default",
        }
        self._absent = {"usage": None} if with_usage else {}

    def delta(self, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> str:
        """A piece of the one choice."""
        choice = {"index": 0, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish}
        return _frame({**self._head, "choices": [choice], **self._absent})

    def usage(self, counts: Mapping[str, Any]) -> str:
        """The chunk that counts."""
        return _frame({**self._head, "choices": [], "usage": counts})


async def chunks(
    pieces: AsyncIterator[Piece],
    turn: ChatTurn,
    prompt: Prompt,
    asked: ChatRequest,
    *,
    model: str,
    tokenizer: Tokenizer,
    transcripts: Transcripts,
) -> AsyncIterator[str]:
    """Frames of the stream; a failure in its middle is its last event."""
    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    write = ChunkWriter(model, with_usage)
    audio_id, said = (transcripts.keep("") if asked.speaks else ""), ""
    first: dict[str, Any] = {"role": "assistant", "refusal": None}
    yield write.delta({**first, "audio": {"id": audio_id}} if asked.speaks else {**first, "content": ""})
    try:
        async for piece in pieces:
            said += piece.text
            logprobs = logprobs_of(piece.logprobs, tokenizer) if piece.logprobs else None
            for delta in _deltas(piece, asked.speaks, audio_id):
                yield write.delta(delta, logprobs=logprobs)
                logprobs = None
    except ApiError as error:
        yield _frame(error.body)
        return
    if asked.speaks:
        transcripts.put(audio_id, said.strip())
        yield write.delta({"audio": {"id": audio_id, "expires_at": int(time.time()) + AUDIO_LIFE_S}})
    yield write.delta({}, finish=turn.finish_reason)
    if with_usage:
        yield write.usage(usage_of(prompt.counts, turn.text_rows, turn.audio_rows))
    yield "data: [DONE]\n\n"


def logprobs_of(found: Sequence[Logprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """The ``logprobs`` of a choice."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    content = [{**one(token, own), "top_logprobs": [one(t, p) for t, p in best]} for token, own, best in found]
    return {"content": content, "refusal": None}


def _deltas(piece: Piece, speaks: bool, audio_id: str) -> list[dict[str, Any]]:
    if not speaks:
        return [{"content": piece.text}] if piece.text else []
    out: list[dict[str, Any]] = []
    if piece.text:
        out.append({"audio": {"id": audio_id, "transcript": piece.text}})
    if len(piece.wave_S):
        data = base64.b64encode(encode(piece.wave_S, "audio/pcm")).decode()
        out.append({"audio": {"id": audio_id, "data": data}})
    return out


def _frame(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
