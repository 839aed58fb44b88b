"""Items that a client writes itself: checked, media decoded within limits, rows made when it is their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.config.serving import Limits
from omni_ray.data.image import decode_image, fit_size, resize
from omni_ray.types.errors import MediaError
from omni_ray.types.modality import Modality
from pipelines.serving.errors import ApiError
from pipelines.serving.media import image_bytes, read_base64
from pipelines.serving.realtime.client_events import EventError
from pipelines.serving.realtime.context import Block
from pipelines.serving.realtime.dialogue import Dialogue
from pipelines.serving.realtime.items import Conversation, Item, new_id
from pipelines.serving.resume import encode
from pipelines.serving.sound import Format, SoundReader

MOST_ID = 64
_PARTS = {
    "system": ("input_text",),
    "user": ("input_text", "input_audio", "input_image"),
    "assistant": ("output_text", "output_audio", "text", "audio"),
}
Build = Callable[[], Awaitable[None]]


class MessageReader:
    """Reads items for one session."""

    def __init__(self, dialogue: Dialogue, limits: Limits) -> None:
        self._dialogue, self._limits = dialogue, limits

    def read(self, body: Any, form: Format, known: Conversation | None = None) -> tuple[Item, Build]:
        """An item, and the work that gives it its rows.

        Args:
            body: As the client sent it.  form: Of sound in it.  known: Where an ``item_reference`` may point to.
        Raises:
            EventError: another shape, or media that cannot be read.
        """
        if not isinstance(body, Mapping):
            raise EventError("an item must be an object", "item")
        kind = body.get("type", "message")
        item_id = body.get("id") or new_id("item")
        if not isinstance(item_id, str) or not 1 <= len(item_id) <= MOST_ID:
            raise EventError(f"item.id must be a text of 1..{MOST_ID} characters", "item.id")
        if kind == "item_reference" and known is not None:
            found = known.find(item_id)
            return found, _nothing
        if kind in ("function_call", "function_call_output"):
            return self._function(kind, item_id, body)
        if kind != "message":
            raise EventError(
                f"item.type is {str(kind)[:40]!r}; this server keeps messages and function calls", "item.type"
            )
        return self._message(item_id, body, form)

    def frame(self, url: str) -> NDArray[np.uint8]:
        """A camera's frame at the encoder's size.

        Raises:
            ApiError: no picture, or too large a one.
        """
        raw = image_bytes(url, "image", self._limits)
        try:
            pixels = decode_image(raw, "image")
        except MediaError as error:
            raise ApiError(400, str(error), param="image", code="unreadable_media") from None
        size = fit_size(pixels.shape[0], pixels.shape[1], self._dialogue.template.model.vision)
        return resize(pixels, size)

    def _message(self, item_id: str, body: Mapping[str, Any], form: Format) -> tuple[Item, Build]:
        role, content = body.get("role"), body.get("content")
        if not isinstance(role, str) or role not in _PARTS:
            raise EventError(f"item.role is {str(role)[:40]!r}; roles are {', '.join(_PARTS)}", "item.role")
        if not isinstance(content, list) or not content:
            raise EventError("item.content must be a list of parts", "item.content")
        told, work = [], []
        for number, part in enumerate(content):
            where = f"item.content[{number}]"
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in _PARTS[role]:
                raise EventError(
                    f"{where}.type is {str(kind)[:40]!r}; {role} sends {', '.join(_PARTS[role])}", f"{where}.type"
                )
            shown, block = self._part(kind, part, where, form)
            told.append(shown)
            work.append(block)
        item = Item(id=item_id, role=str(role), content=told)

        async def build() -> None:
            template = self._dialogue.template
            parts = [await part() for part in work]
            item.blocks = [template.opening(item.role), *parts, template.closing(item.role)]

        return item, build

    def _part(
        self, kind: str, part: Mapping[str, Any], where: str, form: Format
    ) -> tuple[dict[str, Any], Callable[[], Awaitable[Block]]]:
        template = self._dialogue.template
        if kind == "input_image":
            url = _text(part, "image_url", where)
            frame = _refused(lambda: self.frame(url), where)

            async def image() -> Block:
                return template.image(await self._dialogue.see(frame[None]))

            return {"type": kind, "image_url": None, "detail": part.get("detail", "auto")}, image
        if kind == "input_audio":
            wave_S = self._wave(_text(part, "audio", where), where, form)

            async def sound() -> Block:
                values_ND = (await encode(self._dialogue.stages, Modality.AUDIO, [wave_S]))[0]
                tokenizer = template.tokenizer
                begin, end = [tokenizer.audio_begin_id], [tokenizer.audio_end_id]
                return template.media(tokenizer.audio_pad_id, values_ND, before=begin, after=end)

            return {"type": kind, "transcript": part.get("transcript")}, sound
        name = "transcript" if kind in ("output_audio", "audio") else "text"
        words = _text(part, name, where)

        async def text() -> Block:
            return template.text(words)

        full = {"text": "output_text", "audio": "output_audio"}
        return {"type": full.get(kind, kind), name: words}, text

    def _function(self, kind: str, item_id: str, body: Mapping[str, Any]) -> tuple[Item, Build]:
        """The model calls no functions; what clients bring along is kept, and outputs are read as words."""
        names = ("call_id", "output") if kind == "function_call_output" else ("call_id", "name", "arguments")
        extra = {name: _text(body, name, "item") for name in names}
        item = Item(id=item_id, kind=kind, extra=extra)

        async def build() -> None:
            if kind == "function_call_output":
                item.blocks = [self._dialogue.message("user", extra["output"])]

        return item, build

    def _wave(self, text: str, where: str, form: Format) -> NDArray[np.float32]:
        raw = _refused(lambda: read_base64(text, where), where)
        seconds = form.ms(len(raw)) / 1000
        if seconds > self._limits.max_audio_s:
            raise EventError(f"{where} lasts {seconds:.1f} s, more than {self._limits.max_audio_s:g} s; cut it", where)
        if seconds < 0.025:
            raise EventError(f"{where} lasts {1000 * seconds:.0f} ms; send at least 25 ms", where)
        reader = SoundReader(form)
        return np.concatenate([reader.push(raw), reader.flush()])


async def _nothing() -> None:
    await asyncio.sleep(0)


def _text(part: Mapping[str, Any], name: str, where: str) -> str:
    value = part.get(name)
    if not isinstance(value, str):
        raise EventError(f"{where}.{name} must be a text", f"{where}.{name}", "missing_required_parameter")
    return value


def _refused(read: Callable[[], Any], where: str) -> Any:
    try:
        return read()
    except ApiError as error:
        raise EventError(str(error), where, error.code) from None
