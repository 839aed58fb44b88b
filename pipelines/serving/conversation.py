"""A checked request to the chat template's messages and media; runs in the gateway, before any network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_ray.config.serving import Limits
from omni_ray.inference.prompt import Conversation
from pipelines.serving.answers import Transcripts
from pipelines.serving.errors import bad_request
from pipelines.serving.media import audio_bytes, image_bytes, video_bytes
from pipelines.serving.protocol import AudioPart, ChatRequest, ImagePart, Message, Part, TextPart

_ROLES = {"developer": "system"}


def read_conversation(request: ChatRequest, limits: Limits, transcripts: Transcripts) -> Conversation:
    """Take a request apart; every media item is measured, none is decoded.

    Returns:
        Media are named by the part they came from, for instance ``messages[0].content[1]``.
    Raises:
        ApiError: 400: media where none may be, media out of bounds (names the part), an unknown spoken answer.
    """
    media: dict[str, bytes] = {}
    messages = [_message(message, i, limits, transcripts, media) for i, message in enumerate(request.messages)]
    if request.messages[-1].role == "assistant":
        where = f"messages[{len(messages) - 1}]"
        raise bad_request(f"{where} is the assistant's; end with a user's turn", param=where)
    return Conversation(messages=tuple(messages), media=media)


def _message(
    message: Message, index: int, limits: Limits, transcripts: Transcripts, media: dict[str, bytes]
) -> Mapping[str, Any]:
    content: list[dict[str, str]] = []
    for number, part in enumerate(message.content):
        where = f"messages[{index}].content[{number}]"
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
            continue
        if message.role != "user":
            raise bad_request(
                f"{where} is {part.type} in a turn of role {message.role}; only users send media", param=where
            )
        media[where], kind = _bytes(part, where, limits)
        content.append({"type": kind, "media": where})
    if message.role == "assistant" and message.audio is not None and not content:
        content.append({"type": "text", "text": _said(message.audio.id, index, transcripts)})
    if not content:
        where = f"messages[{index}].content"
        raise bad_request(f"{where} is empty; send text or a list of parts", param=where)
    return {"role": _ROLES.get(message.role, message.role), "content": content}


def _bytes(part: Part, where: str, limits: Limits) -> tuple[bytes, str]:
    if isinstance(part, ImagePart):
        return image_bytes(part.image_url.url, where, limits), "image"
    if isinstance(part, AudioPart):
        return audio_bytes(part.input_audio.data, part.input_audio.format, where, limits), "audio"
    assert not isinstance(part, TextPart)
    return video_bytes(part.video_url.url, where, limits), "video"


def _said(name: str, index: int, transcripts: Transcripts) -> str:
    said = transcripts.find(name)
    if said is None:
        where = f"messages[{index}].audio.id"
        raise bad_request(f"{where} is unknown or has expired; send the words as content", param=where)
    return said
