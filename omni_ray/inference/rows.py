"""From the last hidden states to the next rows: the rules of text and of parallel text and speech, vectorised.

An answer in text is rows of a text id and codec PADs, ending with the end token.  An answer in speech is one or more
segments; in a segment of N frames (N + 1 rows) the text column holds the words, then ``</pause>`` or the end token,
then text-pads, and the acoustic ids come one row after their semantic id (networks.md section 3.1).
"""

# B answers in progress, V ids of a head, W frames looked back upon

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_ray.config.model import CodecConfig
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.inference.requests import AnswerOptions
from omni_ray.inference.row_memory import remember
from omni_ray.inference.row_weights import RowWeights, panels_of, product, product_into
from omni_ray.models.sampling import REPETITION_FRAMES, allowed_mask, choose, penalise_repeats
from omni_ray.types.batch import AUDIO_EOS, AUDIO_PAD, AUDIO_RESERVED, NUM_CODEBOOKS

HEADS = 1 + NUM_CODEBOOKS
STATE = ("voice_B", "temperature_B", "in_segment_B", "words_ended_B", "paused_B", "recent_B4W")


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


class _Draws:
    """Numbers in [0, 1) of one request, row after row, from its own seed; none are made for a greedy one."""

    def __init__(self, options: AnswerOptions) -> None:
        self._generator = torch.Generator().manual_seed(options.seed) if options.temperature > 0 else None

    def next_row(self) -> Tensor:
        if self._generator is None:
            return torch.zeros(HEADS)
        return torch.rand(HEADS, generator=self._generator)


class _TextMemory:
    """Buffers of a choice of text for a number of answers, and their views."""

    def __init__(self, weights: RowWeights, hidden_BH: Tensor) -> None:
        count, padded = len(hidden_BH), weights.padded(len(hidden_BH))
        self.weights = weights
        self.hidden_PH = hidden_BH.new_zeros(padded, hidden_BH.shape[1])
        self.real_BH = self.hidden_PH[:count]
        logits_PV = hidden_BH.new_zeros(padded, sum(panel.shape[1] for panel in weights.text_head))
        self.logits = panels_of(logits_PV, weights.text_head)
        self.real_BV = logits_PV[:count]
        self.values_BV = self.real_BV.numpy()
        self.ids_B5 = torch.full((count, HEADS), AUDIO_PAD, dtype=torch.int64)


class RowSampler:
    """State of the answers in progress; :meth:`next_rows` chooses one row for each.  Answers come and go."""

    def __init__(self, vocabulary: Vocabulary, text_size: int, codec_size: int, device: torch.device) -> None:
        self.vocabulary, self._device = vocabulary, device
        words, eos = list(vocabulary.text_ids), vocabulary.eos_id
        self._text_mask = allowed_mask(text_size, [*words, eos], device)
        self._voice_mask = allowed_mask(text_size, [*words, eos, vocabulary.pause_id, vocabulary.pad_id], device)
        self._pad_mask = allowed_mask(text_size, [vocabulary.pad_id], device)
        self._code_masks = [
            allowed_mask(codec_size, range(AUDIO_RESERVED, AUDIO_RESERVED + codes), device)
            for codes in vocabulary.code_sizes
        ]
        self._draws: list[_Draws] = []
        self._memories: dict[int, _TextMemory] = {}
        self.any_voice = self.any_drawn = False
        self.voice_B = torch.zeros(0, dtype=torch.bool, device=device)
        self.temperature_B = torch.zeros(0, device=device)
        self.in_segment_B = torch.zeros(0, dtype=torch.int64, device=device)
        self.words_ended_B = torch.zeros(0, dtype=torch.bool, device=device)
        self.paused_B = torch.zeros(0, dtype=torch.bool, device=device)
        self.recent_B4W = torch.zeros(0, NUM_CODEBOOKS, REPETITION_FRAMES, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self._draws)

    def add(self, options: AnswerOptions) -> None:
        """One more answer, behind the others."""
        self._draws.append(_Draws(options))
        fresh = {
            "voice_B": options.voice,
            "temperature_B": options.temperature,
            "in_segment_B": 0,
            "words_ended_B": False,
            "paused_B": False,
            "recent_B4W": -1,
        }
        for name in STATE:
            held = getattr(self, name)
            setattr(self, name, torch.cat([held, held.new_full((1, *held.shape[1:]), fresh[name])]))
        self._look()
        if options.made_R5 is not None:
            self._resume(options.made_R5.to(self._device))

    def _resume(self, made_R5: Tensor) -> None:
        """Bring the last answer to where it stood after rows that were chosen elsewhere."""
        last = len(self) - 1
        one = copy.copy(self)
        one.keep([last])
        for ids_5 in made_R5:
            if one.any_drawn:
                one._draws[0].next_row()
            if one.any_voice:
                one._after_text(ids_5[:1])
                one._after_codes(ids_5[None, 1:])
        for name in STATE:
            getattr(self, name)[last] = getattr(one, name)[0]

    def keep(self, index: list[int]) -> None:
        """Go on with these answers only, in this order."""
        self._draws = [self._draws[i] for i in index]
        rows = torch.tensor(index, dtype=torch.int64, device=self._device)
        for name in STATE:
            setattr(self, name, getattr(self, name).index_select(0, rows))
        self._look()

    def next_rows(self, hidden_BH: Tensor, weights: RowWeights, part: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Choose the next row of every answer.

        Args:
            hidden_BH: Final-normed hidden state of each answer's last row.  weights: For the heads.
            part: Which answers these are; None: all.
        Returns:
            ids [B, 5], and [B] bool: this row ended the answer.
        """
        if part is None:
            return self._next_rows(hidden_BH, weights)
        some = copy.copy(self)
        some.keep(part)
        made = some._next_rows(hidden_BH, weights)
        rows = torch.tensor(part, device=self._device)
        for name in STATE:
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(some, name)))
        return made

    def _next_rows(self, hidden_BH: Tensor, weights: RowWeights) -> tuple[Tensor, Tensor]:
        count = len(hidden_BH)
        if not self.any_voice and not self.any_drawn and hidden_BH.is_cpu and hidden_BH.dtype == torch.float32:
            return self._plain_text(hidden_BH, weights)
        padded = weights.padded(count)
        if padded > count:
            hidden_BH = torch.cat([hidden_BH, hidden_BH.new_zeros(padded - count, hidden_BH.shape[1])])
        uniform_B5 = torch.zeros(1, 1, device=self._device).expand(count, HEADS)
        if self.any_drawn:
            uniform_B5 = torch.stack([draws.next_row() for draws in self._draws]).to(self._device)
        ids_B5 = torch.full((count, HEADS), AUDIO_PAD, dtype=torch.int64, device=hidden_BH.device)
        logits_BV = product(hidden_BH, weights.text_head)[:count].float()
        if not self.any_voice:
            text_B = self._choose(logits_BV.add_(self._text_mask), uniform_B5[:, 0])
            ids_B5[:, 0] = text_B
            return ids_B5, text_B == self.vocabulary.eos_id
        ids_B5[:, 0] = self._text(logits_BV, uniform_B5[:, 0])
        ended_B = ~self.voice_B & (ids_B5[:, 0] == self.vocabulary.eos_id)
        raw_BV = [product(hidden_BH, head)[:count].float() for head in weights.audio_heads]
        return ids_B5, ended_B | self._speech(raw_BV, uniform_B5, ids_B5)

    def _plain_text(self, hidden_BH: Tensor, weights: RowWeights) -> tuple[Tensor, Tensor]:
        """The likeliest words on CPU, nothing else asked for: what most answers are, so its buffers are kept."""
        if any(memory.weights is not weights for memory in self._memories.values()):
            self._memories.clear()  # none may hold on to weights that were exchanged
        memory = self._memories.get(len(hidden_BH))
        if memory is None:
            memory = remember(self._memories, len(hidden_BH), _TextMemory(weights, hidden_BH))
        memory.real_BH.copy_(hidden_BH)
        product_into(memory.hidden_PH, weights.text_head, memory.logits)
        memory.real_BV.add_(self._text_mask)
        ids_B5 = memory.ids_B5.clone()
        ids_B5[:, 0] = torch.from_numpy(memory.values_BV.argmax(axis=-1))
        return ids_B5, ids_B5[:, 0] == self.vocabulary.eos_id

    def _look(self) -> None:
        self.any_voice = bool(self.voice_B.any())
        self.any_drawn = bool((self.temperature_B > 0).any())

    def _choose(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        if self.any_drawn:
            return choose(logits_BV, self.temperature_B, uniform_B)
        if logits_BV.is_cpu:
            # Torch's takes 7 microseconds a row on CPU; both name the first of equals.
            return torch.from_numpy(logits_BV.numpy().argmax(axis=-1))
        return logits_BV.argmax(dim=-1)

    def _text(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        mask_BV = torch.where(self.voice_B.unsqueeze(1), self._voice_mask, self._text_mask)
        mask_BV = torch.where((self.voice_B & self.words_ended_B).unsqueeze(1), self._pad_mask, mask_BV)
        text_B = self._choose(logits_BV + mask_BV, uniform_B)
        self._after_text(text_B)
        return text_B

    def _after_text(self, text_B: Tensor) -> None:
        paused_B = text_B == self.vocabulary.pause_id
        # A text-pad before any end token also ends the words: nothing but pads follows in a segment.
        ends_B = paused_B | (text_B == self.vocabulary.eos_id) | (text_B == self.vocabulary.pad_id)
        self.paused_B = torch.where(self.words_ended_B, self.paused_B, paused_B)
        self.words_ended_B = self.words_ended_B | (self.voice_B & ends_B)

    def _speech(self, raw: list[Tensor], uniform_B5: Tensor, ids_B5: Tensor) -> Tensor:
        first_B = self.in_segment_B == 0
        for codebook, (raw_BV, code_mask) in enumerate(zip(raw, self._code_masks, strict=True)):
            logits_BV = penalise_repeats(raw_BV, self.recent_B4W[:, codebook]) + code_mask
            if codebook == 0:
                # A segment has a frame at least, and its words end no later than its sound.
                may_end_B = ~first_B & self.words_ended_B
                logits_BV[:, AUDIO_EOS] = torch.where(may_end_B, raw_BV[:, AUDIO_EOS], float("-inf"))
            chosen_B = self._choose(logits_BV, uniform_B5[:, 1 + codebook])
            due_B = self.voice_B if codebook == 0 else self.voice_B & ~first_B
            ids_B5[:, 1 + codebook] = torch.where(due_B, chosen_B, AUDIO_PAD)
        return self._after_codes(ids_B5[:, 1:])

    def _after_codes(self, codes_B4: Tensor) -> Tensor:
        """Follow a row's codec ids; [B] bool: it ended the answer."""
        recent = torch.where(codes_B4 >= AUDIO_RESERVED, codes_B4, -1)
        self.recent_B4W = torch.cat([self.recent_B4W[:, :, 1:], recent.unsqueeze(2)], dim=2)
        segment_ends_B = self.voice_B & (codes_B4[:, 0] == AUDIO_EOS)
        again_B = segment_ends_B & self.paused_B
        self.in_segment_B = torch.where(again_B, 0, self.in_segment_B + 1)
        self.words_ended_B = self.words_ended_B & ~again_B
        self.paused_B = self.paused_B & ~again_B
        return segment_ends_B & ~again_B
