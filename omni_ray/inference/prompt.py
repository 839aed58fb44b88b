"""A conversation made ready for the networks, and generated rows made into an answer; no network here."""

# T prompt rows, R generated rows, N codec frames, S samples of sound

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.config.model import OmniConfig
from omni_ray.data.chat import answer_text, generation_prompt, undo_delay
from omni_ray.data.media import decode_spans
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.inference.requests import Generation
from omni_ray.types.batch import AUDIO_EOS, AUDIO_PAD, NUM_CODEBOOKS
from omni_ray.types.errors import MediaError
from omni_ray.types.sample import EncodedSample, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages that wait for the model's turn, and their media."""

    messages: tuple[Mapping[str, Any], ...]
    """As in ``types.sample.Sample``; ``content`` may be plain text."""
    media: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded bytes by the names that the parts use."""

    @staticmethod
    def of(messages: Sequence[Mapping[str, Any]], media: Mapping[str, bytes] | None = None) -> Conversation:
        """Messages whose parts may hold their media themselves: ``"media"`` as bytes or as a path.

        Raises:
            MediaError: a file that is not there.
        """
        found, turned = dict(media or {}), []
        for message in messages:
            content = message.get("content", ())
            if not isinstance(content, str):
                content = tuple(_named(part, found) for part in content)
            turned.append({**message, "content": content})
        return Conversation(messages=tuple(turned), media=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedPrompt:
    """A prompt's rows and what its encoders must see."""

    encoded: EncodedSample
    """Rows ending in the role that answers, and media spans."""
    media: tuple[NDArray[Any], ...]
    """Decoded media in the order of the spans: uint8 frames or float32 waves (``data.media.decode_span``)."""
    voice: bool
    """Answer with words and sound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A model's turn."""

    text: str
    """Its words."""
    ids_R5: NDArray[np.int64]
    """Generated rows, the ending one included."""
    finished: bool
    """False: cut at max_tokens."""
    codes_N4: NDArray[np.int64]
    """Codec frames of all segments; none in a written answer."""
    wave_S: NDArray[np.float32] | None = None
    """Its sound; None in a written answer."""
    sample_rate_hz: int = 0
    """Of the sound."""


def prepare(conversation: Conversation, voice: bool, tokenizer: Tokenizer, model: OmniConfig) -> PreparedPrompt:
    """Rows and decoded media of a conversation.

    Raises:
        DataError: a role, part or member that is not there.
        MediaError: media that cannot be decoded.
    """
    encoded = generation_prompt(conversation.messages, voice, tokenizer, model, media=conversation.media)
    sample = Sample(key=encoded.key, kind="prompt", messages=conversation.messages, media=conversation.media)
    media = decode_spans(sample, encoded.spans, model)
    return PreparedPrompt(encoded=encoded, media=media, voice=voice)


def read_answer(generation: Generation, tokenizer: Tokenizer) -> Answer:
    """Words and codec frames of generated rows; speech comes in segments, each closed by the semantic end id."""
    ids_R5 = generation.ids_R5.numpy()
    ends = [int(row) + 1 for row in np.flatnonzero(ids_R5[:, 1] == AUDIO_EOS)]
    segments = [undo_delay(part) for part in np.split(ids_R5[:, 1:], ends) if (part != AUDIO_PAD).any()]
    codes_N4 = np.concatenate(segments) if segments else np.zeros((0, NUM_CODEBOOKS), np.int64)
    text = answer_text(ids_R5[:, 0].tolist(), tokenizer)
    return Answer(text=text, ids_R5=ids_R5, finished=generation.finished, codes_N4=codes_N4)


def _named(part: Mapping[str, Any], media: dict[str, bytes]) -> Mapping[str, Any]:
    value = part.get("media")
    if isinstance(value, bytes):
        name = f"media-{len(media)}"
        media[name] = value
    elif isinstance(value, Path):
        name = f"media-{len(media)}-{value.name}"
        try:
            media[name] = value.read_bytes()
        except OSError as error:
            raise MediaError(f"{value} cannot be read: {error.strerror}; name a media file") from error
    else:
        return part
    return {**part, "media": name}
