"""Words of what a user said, asked from the same model beside the conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.data.chat import answer_text
from pipelines.serving.errors import ApiError
from pipelines.serving.realtime.context import Block, Template
from pipelines.serving.realtime.dialogue import Dialogue
from pipelines.serving.realtime.items import Item
from pipelines.serving.realtime.speaking import TextReader
from pipelines.serving.resume import answer_alone
from pipelines.serving.stages import AnswerOptions, Rows

ASK = "what do you hear"
"""The words after a sound that ask for its own words."""
MOST_ROWS = 128


def asking(template: Template, heard: Sequence[NDArray[np.float32]]) -> Rows:
    """Prompt that asks for the words of a sound."""
    tokenizer = template.tokenizer
    values_ND = np.concatenate(list(heard))
    parts = [
        template.opening("user"),
        template.media(
            tokenizer.audio_pad_id, values_ND, before=[tokenizer.audio_begin_id], after=[tokenizer.audio_end_id]
        ),
        template.text(ASK),
        template.closing("user"),
        template.answering(False),
    ]
    return Rows.joined([part.rows for part in parts])


async def transcribe(
    dialogue: Dialogue, name: str, item: Item, closing: asyncio.Task[None], tell: Callable[[Mapping[str, Any]], None]
) -> None:
    """Tell the words of a user's item, as they come; ``closing`` gives the item its rows."""
    await asyncio.wait([closing])
    head = {"item_id": item.id, "content_index": 0}
    kind = "conversation.item.input_audio_transcription"
    heard = [values for block in item.blocks if not block.image for _, values in block.rows.features]
    ids: list[int] = []
    rows = asking(dialogue.template, heard) if heard else Rows.of_text([])
    try:
        if item.failure is not None:
            raise item.failure
        if heard:
            reader = TextReader(dialogue.template.tokenizer)
            options = AnswerOptions(max_tokens=MOST_ROWS)
            async with aclosing(answer_alone(dialogue.stages, name, rows, options)) as parts:  # type: ignore[type-var]
                async for part in parts:
                    ids += part.ids_R5[:, 0].tolist()
                    words = "".join(reader.push(int(i)) for i in part.ids_R5[:, 0])
                    if words:
                        tell({"type": f"{kind}.delta", **head, "delta": words})
    except ApiError as error:
        body = {"type": "server_error", "code": "transcription_failed", "message": str(error), "param": None}
        tell({"type": f"{kind}.failed", **head, "error": body})
        return
    finally:
        dialogue.stages.forget(name)
    words = answer_text(ids, dialogue.template.tokenizer)
    item.content[0]["transcript"] = words
    audio = sum(map(len, heard))
    usage = {
        "type": "tokens",
        "input_tokens": len(rows),
        "output_tokens": len(ids),
        "total_tokens": len(rows) + len(ids),
        "input_token_details": {"audio_tokens": audio, "text_tokens": len(rows) - audio},
    }
    tell({"type": f"{kind}.completed", **head, "transcript": words, "usage": usage})


__all__ = ["ASK", "Block", "asking", "transcribe"]
