"""A conversation to prompt rows and decoded media, and generated rows to words and codes; no network, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.config.model import OmniConfig
from omni_ray.config.serving import Limits
from omni_ray.data.chat import answer_text, generation_prompt, undo_delay
from omni_ray.data.media import decode_span
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.types.batch import AUDIO_EOS, AUDIO_PAD, NUM_CODEBOOKS
from omni_ray.types.errors import DataError, MediaError
from omni_ray.types.modality import FEATURE_MODALITIES, Modality
from omni_ray.types.sample import EncodedSample, Sample
from pipelines.serving.conversation import Conversation
from pipelines.serving.errors import bad_request
from pipelines.serving.media import unreadable
from pipelines.serving.protocol import ChatRequest

DEFAULT_TOKENS = 256
"""Rows of an answer where the client names no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRows:
    """What the language stage needs besides features."""

    ids_T5: NDArray[np.int64]
    """[T, 5] rows, ending in the role that answers."""
    offsets: Mapping[Modality, tuple[int, ...]]
    """First row of every item of a modality, in the order of its media."""
    voice: bool
    """Answer in words and codec rows."""
    max_tokens: int
    """Most rows of the answer."""
    temperature: float
    """0: the likeliest."""
    seed: int
    """Of the draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prepared request."""

    rows: PromptRows
    """For the language stage."""
    media: Mapping[Modality, tuple[NDArray[Any], ...]]
    """For the encoders: uint8 frames, or waves at the encoder's rate."""
    counts: Mapping[str, int]
    """Rows by kind: text, image, audio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRows:
    """Generated rows taken apart."""

    text: str
    """The words."""
    codes_N4: NDArray[np.int64]
    """Codec frames of all segments."""
    audio_rows: int
    """Rows that carry codec ids."""


class PromptMaker:
    """Makes prompts for one checkpoint."""

    def __init__(self, model: OmniConfig, tokenizer: Tokenizer, limits: Limits) -> None:
        self.model, self.tokenizer, self.limits = model, tokenizer, limits

    def make(self, conversation: Conversation, asked: ChatRequest, seed: int) -> Prompt:
        """Rows and decoded media of a conversation.

        Raises:
            ApiError: 400: media that cannot be decoded (names the part), or more rows than the model has positions.
        """
        encoded = self._rows(conversation, asked.speaks)
        room = self.model.language.max_position_embeddings - len(encoded)
        most = asked.most_tokens or min(DEFAULT_TOKENS, self.limits.max_tokens, max(room, 1))
        if most > room:
            raise bad_request(
                f"the conversation takes {len(encoded)} rows and the answer up to {most}, yet the model has "
                f"{self.model.language.max_position_embeddings} positions; send less, or lower max_tokens",
                param="messages",
                code="context_length_exceeded",
            )
        media = self._decode(conversation, encoded)
        spans = {m: [span for span in encoded.spans if span.modality == m] for m in FEATURE_MODALITIES}
        rows = PromptRows(
            ids_T5=encoded.ids_T5,
            offsets={m: tuple(span.offset for span in spans[m]) for m in FEATURE_MODALITIES},
            voice=asked.speaks,
            max_tokens=most,
            temperature=asked.temperature or 0.0,
            seed=seed,
        )
        image = sum(span.length for span in spans[Modality.VISION])
        heard = sum(span.length for span in spans[Modality.AUDIO])
        counts = {"text": len(encoded) - image - heard, "image": image, "audio": heard}
        return Prompt(rows=rows, media=media, counts=counts)

    def _rows(self, conversation: Conversation, voice: bool) -> EncodedSample:
        try:
            return generation_prompt(
                conversation.messages, voice, self.tokenizer, self.model, media=conversation.media, key="request"
            )
        except MediaError as error:
            raise unreadable(_plain(error), _part_of(error, conversation)) from None
        except DataError as error:
            raise bad_request(str(_plain(error)), param="messages") from None

    def _decode(self, conversation: Conversation, encoded: EncodedSample) -> dict[Modality, tuple[NDArray[Any], ...]]:
        sample = Sample(key="request", kind="prompt", messages=conversation.messages, media=conversation.media)
        media: dict[Modality, list[NDArray[Any]]] = {modality: [] for modality in FEATURE_MODALITIES}
        memory: dict[str, Any] = {}
        for span in encoded.spans:
            try:
                media[span.modality].append(decode_span(sample, span, self.model, memory))
            except MediaError as error:
                raise unreadable(_plain(error), span.name) from None
        return {modality: tuple(items) for modality, items in media.items()}


def split_rows(ids_R5: NDArray[np.int64], tokenizer: Tokenizer) -> SplitRows:
    """Words and codec frames of generated rows; speech comes in segments, each closed by the semantic end id."""
    heard_R = (ids_R5[:, 1:] != AUDIO_PAD).any(axis=1)
    ends = [int(row) + 1 for row in np.flatnonzero(ids_R5[:, 1] == AUDIO_EOS)]
    pieces = [undo_delay(part) for part in np.split(ids_R5[:, 1:], ends) if (part != AUDIO_PAD).any()]
    codes_N4 = np.concatenate(pieces) if pieces else np.zeros((0, NUM_CODEBOOKS), np.int64)
    return SplitRows(text=answer_text(ids_R5[:, 0], tokenizer), codes_N4=codes_N4, audio_rows=int(heard_R.sum()))


def _part_of(error: Exception, conversation: Conversation) -> str:
    """The part that an error's text names (a part's name may begin another's: the longest wins)."""
    named = [name for name in conversation.media if name in str(error)]
    return max(named, key=len, default="messages")


def _plain(error: DataError) -> DataError:
    """The error without this server's name for the sample."""
    return type(error)(str(error).replace("request/", "").replace("sample request ", "the conversation "))
