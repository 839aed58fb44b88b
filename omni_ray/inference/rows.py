"""From the last hidden states to the next rows: the rules of text and of parallel text and speech, vectorised.

An answer in text is rows of a text id and codec PADs, ending with the end token.  An answer in speech is one or more
segments; in a segment of N frames (N + 1 rows) the text column holds the words, then ``</pause>`` or the end token,
then text-pads, and the acoustic ids come one row after their semantic id (models.md section 3.1).
"""

# B sequences, V ids of a head, W frames looked back upon

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from omni_ray.config.model import CodecConfig
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.inference.requests import GenerationRequest
from omni_ray.models.layers import row_padded
from omni_ray.models.llm import LanguageModel
from omni_ray.models.sampling import REPETITION_FRAMES, allowed_mask, choose, penalise_repeats
from omni_ray.types.batch import AUDIO_EOS, AUDIO_PAD, AUDIO_RESERVED, NUM_CODEBOOKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Which ids an answer may hold."""

    eos_id: int
    """Ends an answer."""
    pad_id: int
    """Text-pad beside codec rows."""
    pause_id: int
    """Ends the words of a segment that is not the last."""
    text_ids: tuple[int, ...]
    """Ids that are words: neither reserved nor placeholders."""
    code_sizes: tuple[int, ...]
    """Codes of each codebook; empty for a model without codec heads."""

    @staticmethod
    def of(tokenizer: Tokenizer, codec: CodecConfig | None) -> Vocabulary:
        """Every id that is not special is a word; codes as many as the codec has."""
        special = set(tokenizer.special_ids)
        return Vocabulary(
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            pause_id=tokenizer.pause_id,
            text_ids=tuple(i for i in range(len(tokenizer)) if i not in special),
            code_sizes=() if codec is None else (codec.semantic_codes, *[codec.group_codes**2] * codec.levels),
        )


class RowSampler:
    """State of B answers in progress; :meth:`next_rows` chooses one row for each."""

    def __init__(self, model: LanguageModel, vocabulary: Vocabulary, requests: Sequence[GenerationRequest]) -> None:
        self.model, self.vocabulary = model, vocabulary
        device = model.model.embed_tokens.weight.device
        count, size = len(requests), model.config.vocab_size
        words, eos = list(vocabulary.text_ids), vocabulary.eos_id
        self._text_mask = allowed_mask(size, [*words, eos], device)
        self._voice_mask = allowed_mask(size, [*words, eos, vocabulary.pause_id, vocabulary.pad_id], device)
        self._pad_mask = allowed_mask(size, [vocabulary.pad_id], device)
        self._code_masks = [
            allowed_mask(model.config.codec_vocab_size, range(AUDIO_RESERVED, AUDIO_RESERVED + codes), device)
            for codes in vocabulary.code_sizes
        ]
        self.voice_B = torch.tensor([r.voice for r in requests], dtype=torch.bool, device=device)
        self.temperature_B = torch.tensor([r.temperature for r in requests], dtype=torch.float32, device=device)
        self.limit_B = torch.tensor([r.max_tokens for r in requests], dtype=torch.int64, device=device)
        self._uniforms = _uniforms(requests, device)
        self.row = 0
        self.in_segment_B = torch.zeros(count, dtype=torch.int64, device=device)
        self.words_ended_B = torch.zeros(count, dtype=torch.bool, device=device)
        self.paused_B = torch.zeros(count, dtype=torch.bool, device=device)
        self.recent_B4W = torch.full((count, NUM_CODEBOOKS, REPETITION_FRAMES), -1, dtype=torch.int64, device=device)

    def next_rows(self, hidden_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the next row of every answer.

        Args:
            hidden_BH: Final-normed hidden state of each answer's last row.
        Returns:
            ids [B, 5], and [B] bool: this row ended the answer.
        """
        ids_B5 = torch.full((len(hidden_BH), 1 + NUM_CODEBOOKS), AUDIO_PAD, dtype=torch.int64, device=hidden_BH.device)
        ids_B5[:, 0] = self._text(hidden_BH)
        ended_B = ~self.voice_B & (ids_B5[:, 0] == self.vocabulary.eos_id)
        if bool(self.voice_B.any()):
            ended_B = ended_B | self._speech(hidden_BH, ids_B5)
        self.row += 1
        return ids_B5, ended_B

    def keep(self, index: Tensor) -> None:
        """Go on with these answers only."""
        for name in (
            "voice_B",
            "temperature_B",
            "limit_B",
            "in_segment_B",
            "words_ended_B",
            "paused_B",
            "recent_B4W",
            "_uniforms",
        ):
            setattr(self, name, getattr(self, name).index_select(0, index))

    def _text(self, hidden_BH: Tensor) -> Tensor:
        logits_BV = row_padded(self.model.text_logits, hidden_BH).float()
        mask_BV = torch.where(self.voice_B.unsqueeze(1), self._voice_mask, self._text_mask)
        mask_BV = torch.where((self.voice_B & self.words_ended_B).unsqueeze(1), self._pad_mask, mask_BV)
        text_B = choose(logits_BV + mask_BV, self.temperature_B, self._uniforms[:, self.row, 0])
        paused_B = text_B == self.vocabulary.pause_id
        # A text-pad before any end token also ends the words: nothing but pads follows in a segment.
        ends_B = paused_B | (text_B == self.vocabulary.eos_id) | (text_B == self.vocabulary.pad_id)
        self.paused_B = torch.where(self.words_ended_B, self.paused_B, paused_B)
        self.words_ended_B = self.words_ended_B | (self.voice_B & ends_B)
        return text_B

    def _speech(self, hidden_BH: Tensor, ids_B5: Tensor) -> Tensor:
        first_B = self.in_segment_B == 0
        for codebook, code_mask in enumerate(self._code_masks):
            raw_BV = row_padded(partial(self.model.audio_logits, codebook=codebook), hidden_BH).float()
            logits_BV = penalise_repeats(raw_BV, self.recent_B4W[:, codebook]) + code_mask
            if codebook == 0:
                # A segment has a frame at least, and its words end no later than its sound.
                may_end_B = ~first_B & self.words_ended_B
                logits_BV[:, AUDIO_EOS] = torch.where(may_end_B, raw_BV[:, AUDIO_EOS], float("-inf"))
            chosen_B = choose(logits_BV, self.temperature_B, self._uniforms[:, self.row, 1 + codebook])
            due_B = self.voice_B if codebook == 0 else self.voice_B & ~first_B
            ids_B5[:, 1 + codebook] = torch.where(due_B, chosen_B, AUDIO_PAD)
        codes_B4 = ids_B5[:, 1:]
        recent = torch.where(codes_B4 >= AUDIO_RESERVED, codes_B4, -1)
        self.recent_B4W = torch.cat([self.recent_B4W[:, :, 1:], recent.unsqueeze(2)], dim=2)
        segment_ends_B = self.voice_B & (codes_B4[:, 0] == AUDIO_EOS)
        again_B = segment_ends_B & self.paused_B
        self.in_segment_B = torch.where(again_B, 0, self.in_segment_B + 1)
        self.words_ended_B = self.words_ended_B & ~again_B
        self.paused_B = self.paused_B & ~again_B
        return segment_ends_B & ~again_B


def _uniforms(requests: Sequence[GenerationRequest], device: torch.device) -> Tensor:
    """[B, rows, heads] draws in [0, 1), each request's from its own seed."""
    rows, heads = max(r.max_tokens for r in requests), 1 + NUM_CODEBOOKS
    if not any(r.temperature > 0 for r in requests):
        return torch.zeros(1, device=device).expand(len(requests), rows, heads)
    draws = torch.zeros(len(requests), rows, heads)
    for draw, request in zip(draws, requests, strict=True):
        generator = torch.Generator().manual_seed(request.seed)
        # Row by row, so that a longer limit continues the same draws.
        draw[: request.max_tokens] = torch.rand(request.max_tokens, heads, generator=generator)
    return draws.to(device)
