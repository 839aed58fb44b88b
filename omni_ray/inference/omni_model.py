"""The whole model in one process: read a checkpoint, answer conversations, run packed batches.

``generate`` is four steps, each callable by itself, so that they can run on different machines: ``prepare`` (template
and media), ``requests`` (encoders), ``engine.generate`` (language), ``answers`` (codec).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omni_ray.checkpoint.store import check_whole
from omni_ray.config.model import OmniConfig
from omni_ray.data.chat import fill_codec_rows
from omni_ray.data.media import patch_rows, sound_rows
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.inference.engine import Engine
from omni_ray.inference.prompt import Answer, Conversation, PreparedPrompt, prepare, read_answer
from omni_ray.inference.requests import Generation, GenerationRequest
from omni_ray.inference.rows import Vocabulary
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.models.codec import Codec
from omni_ray.models.llm import LanguageModel, LanguageOutput
from omni_ray.models.vision_encoder import VisionEncoder
from omni_ray.types.batch import OmniBatch
from omni_ray.types.errors import PlanError
from omni_ray.types.modality import Modality

ENCODE_ITEMS = 32
"""Media items of one encoder call; more would only grow its memory."""


class OmniModel:
    """Vision encoder, audio encoder, language model, codec and tokenizer."""

    def __init__(
        self,
        *,
        language: LanguageModel,
        vision: VisionEncoder,
        audio: AudioEncoder,
        codec: Codec,
        tokenizer: Tokenizer,
    ) -> None:
        self.language, self.vision, self.audio, self.codec = (
            language.eval(),
            vision.eval(),
            audio.eval(),
            codec.eval(),
        )
        self.tokenizer = tokenizer
        self.config = OmniConfig(language=language.config, vision=vision.config, audio=audio.config, codec=codec.config)
        heard = codec.config if language.config.num_codebooks else None
        self.engine = Engine(language, Vocabulary.of(tokenizer, heard))

    @overload
    def generate(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        media: Mapping[str, bytes] | None = None,
        voice: bool = False,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Answer: ...

    @overload
    def generate(
        self,
        messages: Sequence[Conversation],
        *,
        media: None = None,
        voice: bool = False,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Answer]: ...

    def generate(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Conversation],
        *,
        media: Mapping[str, bytes] | None = None,
        voice: bool = False,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Answer | list[Answer]:
        """Answer one conversation, or many together.

        Args:
            messages: One conversation's messages (parts name members of ``media``, or hold bytes or a path), or a list
                of :class:`Conversation`.
            media: Encoded bytes by name, for a single conversation.
            voice: Answer aloud: words and codec rows, and their sound.
            max_tokens: Most rows of an answer (60 ms of sound each).
            temperature: 0 for the likeliest answer.
            seed: Of the draws; conversation i of a list takes seed + i.
        Returns:
            An answer, or a list of them for a list of conversations.
        Raises:
            DataError, MediaError: a conversation that cannot be read.  RequestError: it does not fit the model.
        """
        single = bool(messages) and not isinstance(messages[0], Conversation)
        if single:
            conversations = [Conversation.of(cast(Sequence[Mapping[str, Any]], messages), media)]
        else:
            conversations = list(cast(Sequence[Conversation], messages))
        prompts = [self.prepare(conversation, voice=voice) for conversation in conversations]
        requests = self.requests(prompts, max_tokens=max_tokens, temperature=temperature, seed=seed)
        answers = self.answers(prompts, self.engine.generate(requests))
        return answers[0] if single else answers

    def prepare(self, conversation: Conversation, *, voice: bool = False) -> PreparedPrompt:
        """Rows and decoded media of a conversation; see :func:`omni_ray.inference.prompt.prepare`."""
        return prepare(conversation, voice, self.tokenizer, self.config)

    def requests(
        self, prompts: Sequence[PreparedPrompt], *, max_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[GenerationRequest]:
        """Run the encoders of all prompts together and make the engine's requests."""
        rows = {
            modality: iter(self.encode(modality, [m for p in prompts for m in _media_of(p, modality)]))
            for modality in Modality
        }
        requests = []
        for number, prompt in enumerate(prompts):
            ids_T5, features = prompt.encoded.ids_T5.copy(), []
            for span in prompt.encoded.spans:
                values = next(rows[span.modality])
                if span.modality == Modality.SPEECH:
                    fill_codec_rows(ids_T5, ids_T5, span.offset, values.numpy(), target=False)
                else:
                    features.append((span.offset, values))
            requests.append(
                GenerationRequest(
                    ids_T5=torch.from_numpy(ids_T5),
                    features=tuple(features),
                    voice=prompt.voice,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    seed=seed + number,
                )
            )
        return requests

    @torch.no_grad()
    def encode(self, modality: Modality, media: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Rows of each media item.

        Args:
            modality: Which encoder.
            media: Vision: uint8 frames [1 or 2, h, w, 3]; audio, speech: float32 waves [S] at the network's
                rate, or stretches of a sound.
        Returns:
            [n, H] features, or [frames, 4] codes for speech.
        """
        if modality == Modality.SPEECH:
            rate_hz = self.config.codec.sample_rate_hz
            # Cloned: inference tensors could not serve a later training forward.
            return [self.codec.encode(wave, rate_hz).clone() for wave in media]
        out: list[Tensor] = []
        for start in range(0, len(media), ENCODE_ITEMS):
            part = media[start : start + ENCODE_ITEMS]
            if modality == Modality.VISION:
                patches_PC, grids = patch_rows(part, self.config.vision)
                rows = self.vision(torch.from_numpy(patches_PC), grids)
                lengths: Sequence[int] = [self.vision.tokens(grid) for grid in grids]
            else:
                rows, lengths = sound_rows(self.audio, part)
            out += rows.split(list(lengths))
        return out

    def answers(self, prompts: Sequence[PreparedPrompt], generations: Sequence[Generation]) -> list[Answer]:
        """Words of every answer, and sound for those asked aloud (none at all is an empty wave)."""
        out = []
        for prompt, generation in zip(prompts, generations, strict=True):
            answer = read_answer(generation, self.tokenizer)
            if prompt.voice:
                answer = self._aloud(answer)
            out.append(answer)
        return out

    def forward(self, batch: OmniBatch) -> LanguageOutput:
        """Packed rows through the language model; features stand where the placeholders are, in item order.

        Args:
            batch: Codec rows already filled; ``features`` in the order of their placeholders.
        Raises:
            PlanError: a modality has more or fewer rows than the batch has placeholders for it.
        """
        rows_TH = self.language.embed_rows(batch.ids_T5)
        placeholders = {
            Modality.VISION: self.tokenizer.image_pad_id,
            Modality.AUDIO: self.tokenizer.audio_pad_id,
        }
        for modality, features in batch.features.items():
            if modality not in placeholders:
                continue
            place = (batch.ids_T5[:, 0] == placeholders[modality]).nonzero().flatten()
            if len(place) != len(features.values_ID):
                raise PlanError(
                    f"the batch has {len(place)} {modality} placeholders and {len(features.values_ID)} {modality} "
                    "feature rows; make them equal"
                )
            rows_TH = rows_TH.index_copy(0, place, features.values_ID)
        output: LanguageOutput = self.language(rows_TH, batch.cu_seqlens, batch.positions)
        return output

    def _aloud(self, answer: Answer) -> Answer:
        wave_S = np.zeros(0, np.float32)
        if len(answer.codes_N4):
            wave_S = self.codec.decode(torch.from_numpy(answer.codes_N4)).numpy()
        return Answer(
            text=answer.text,
            ids_R5=answer.ids_R5,
            finished=answer.finished,
            codes_N4=answer.codes_N4,
            wave_S=wave_S,
            sample_rate_hz=self.config.codec.output_rate_hz,
        )


def load_model(path: str | Path) -> OmniModel:
    """Read a checkpoint folder: ``model/{language,vision,audio,codec}`` and ``tokenizer.json``; not its optimizer.

    Raises:
        CheckpointError: not a whole checkpoint, or a network in it does not fit.
    """
    folder = Path(path)
    check_whole(folder)
    networks = folder / "model"
    return OmniModel(
        language=LanguageModel.from_pretrained(networks / "language"),
        vision=VisionEncoder.from_pretrained(networks / "vision"),
        audio=AudioEncoder.from_pretrained(networks / "audio"),
        codec=Codec.from_pretrained(networks / "codec"),
        tokenizer=Tokenizer.load(folder / "tokenizer.json"),
    )


def _media_of(prompt: PreparedPrompt, modality: Modality) -> list[NDArray[Any]]:
    return [m for m, span in zip(prompt.media, prompt.encoded.spans, strict=True) if span.modality == modality]
