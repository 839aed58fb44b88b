"""A checked conversation to prompt rows and decoded media, with errors that name the part; no network, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.config.model import OmniConfig
from omni_ray.config.serving import Limits
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.inference.prompt import Conversation, PreparedPrompt, prepare
from omni_ray.types.errors import DataError, MediaError
from omni_ray.types.modality import FEATURE_MODALITIES, Modality
from pipelines.serving.errors import ApiError, bad_request
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


class PromptMaker:
    """Makes prompts for one checkpoint."""

    def __init__(self, model: OmniConfig, tokenizer: Tokenizer, limits: Limits) -> None:
        self.model, self.tokenizer, self.limits = model, tokenizer, limits

    def make(self, conversation: Conversation, asked: ChatRequest, seed: int) -> Prompt:
        """Rows and decoded media of a conversation.

        Raises:
            ApiError: 400: media that cannot be decoded (names the part), or more rows than the model has positions.
        """
        try:
            prepared = prepare(conversation, asked.speaks, self.tokenizer, self.model)
        except DataError as error:
            raise _refusal(error, conversation) from None
        spans = {m: [span for span in prepared.encoded.spans if span.modality == m] for m in FEATURE_MODALITIES}
        rows = PromptRows(
            ids_T5=prepared.encoded.ids_T5,
            offsets={m: tuple(span.offset for span in spans[m]) for m in FEATURE_MODALITIES},
            voice=asked.speaks,
            max_tokens=self._most(len(prepared.encoded), asked),
            temperature=asked.temperature or 0.0,
            seed=seed,
        )
        image = sum(span.length for span in spans[Modality.VISION])
        heard = sum(span.length for span in spans[Modality.AUDIO])
        counts = {"text": len(prepared.encoded) - image - heard, "image": image, "audio": heard}
        return Prompt(rows=rows, media={m: _media(prepared, m) for m in FEATURE_MODALITIES}, counts=counts)

    def _most(self, taken: int, asked: ChatRequest) -> int:
        """Rows that the answer may have."""
        positions = self.model.language.max_position_embeddings
        most = asked.most_tokens or min(DEFAULT_TOKENS, self.limits.max_tokens, max(positions - taken, 1))
        if taken + most > positions:
            raise bad_request(
                f"the conversation takes {taken} rows and the answer up to {most}, yet the model has {positions} "
                "positions; send less, or lower max_tokens",
                param="messages",
                code="context_length_exceeded",
            )
        return most


def _media(prepared: PreparedPrompt, modality: Modality) -> tuple[NDArray[Any], ...]:
    pairs = zip(prepared.media, prepared.encoded.spans, strict=True)
    return tuple(item for item, span in pairs if span.modality == modality)


def _refusal(error: DataError, conversation: Conversation) -> ApiError:
    """A 400 whose text starts with the part, without this server's name for the sample."""
    words = str(error).replace("prompt/", "").replace("sample prompt ", "the conversation ")
    named = [name for name in conversation.media if name in words]  # a name may begin another's: the longest wins
    code = "unreadable_media" if isinstance(error, MediaError) else None
    return bad_request(words, param=max(named, key=len, default="messages"), code=code)
