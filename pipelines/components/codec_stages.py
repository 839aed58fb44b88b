"""What the stages of the codec's acoustic training share: crops of clips, the decoder's front, the loop of a stage.

``codec_latents.py`` trains encoder and quantiser, then ``codec_decoder.py`` the decoder on the fixed codes, as in the
report's stages 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.models.codec import Codec
from pipelines.components.codec_material import Clip, by_kind
from pipelines.components.codec_semantic import whole_frames


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecipe:
    """One stage of acoustic training."""

    steps: int
    """Optimiser steps."""
    batch: int
    """Crops a step."""
    frames: int
    """Codec frames of a crop (60 ms each)."""
    lr: float
    """Peak of the one-cycle schedule (AdamW)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A batch of crops."""

    input_BS: Tensor
    """16 kHz, [B, 960 N]."""
    output_BS: Tensor
    """24 kHz, [B, 1440 N]."""
    codes_BNK: Tensor
    """Codes [B, N, 1 + levels known so far]."""


class Cropper:
    """Draws crops in a fixed random order; the assistant's voice most often."""

    def __init__(self, clips: Sequence[Clip], codes: Sequence[Tensor], codec: Codec, *, seed: int) -> None:
        config = codec.config
        self.hop, self.output_hop = config.hop, config.output_hop
        self.inputs = [whole_frames(clip.input_S, self.hop) for clip in clips]
        self.outputs = [
            fitted(clip.output_S, len(wave) // self.hop * self.output_hop)
            for clip, wave in zip(clips, self.inputs, strict=True)
        ]
        self.codes = codes
        self.kinds = by_kind(clips)
        self.chance = torch.Generator().manual_seed(seed)

    def draw(self, batch: int, frames: int) -> Cut:
        """Half the crops are the assistant's, a quarter each other kind's (the assistant's where there is none)."""
        places = [self._place(("assistant", "synthetic", "assistant", "human")[i % 4]) for i in range(batch)]
        spans = [self._span(len(self.codes[place]), frames) for place in places]
        return Cut(
            input_BS=self._stack(self.inputs, places, spans, self.hop),
            output_BS=self._stack(self.outputs, places, spans, self.output_hop),
            codes_BNK=self._stack(self.codes, places, spans, 1),
        )

    @classmethod
    def _stack(cls, rows: Sequence[Tensor], places: list[int], spans: list[tuple[int, int]], unit: int) -> Tensor:
        return torch.stack([cls._cut(rows[place], span, unit) for place, span in zip(places, spans, strict=True)])

    def _place(self, kind: str) -> int:
        group = self.kinds.get(kind) or self.kinds.get("assistant") or next(iter(self.kinds.values()))
        return group[int(torch.randint(0, len(group), (), generator=self.chance))]

    def _span(self, length: int, frames: int) -> tuple[int, int]:
        # One draw in three is the clip's start, where the decoder wakes from silence.
        room = max(0, length - frames)
        start = int(torch.randint(-(room // 2) - 1, room + 1, (), generator=self.chance))
        return max(0, start), frames

    @staticmethod
    def _cut(row: Tensor, span: tuple[int, int], unit: int) -> Tensor:
        start, frames = span
        return fitted(row[start * unit : (start + frames) * unit], frames * unit)


def fitted(row: Tensor, length: int) -> Tensor:
    """The first ``length`` entries, the last frame of codes or silence repeated where there are fewer."""
    missing = length - row.shape[0]
    if missing <= 0:
        return row[:length]
    if row.is_floating_point():
        return F.pad(row, (0, missing))
    return torch.cat([row, row[-1:].expand(missing, *row.shape[1:])])


def optimise(
    name: str,
    trained: list[nn.Parameter],
    recipe: StageRecipe,
    loss_of: Callable[[int], Tensor],
    log: Callable[[str], None],
) -> None:
    """AdamW with a one-cycle schedule over a fixed number of steps."""
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, betas=(0.8, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.08, cycle_momentum=False, final_div_factor=50
    )
    total = 0.0
    for step in range(recipe.steps):
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if step % 50 == 49 or step + 1 == recipe.steps:
            log(f"{name} {step + 1}/{recipe.steps} loss {total / (step % 50 + 1):.4f}")
            total = 0.0


def front_end(codec: Codec, semantic_BN: Tensor, latents_BZN: Tensor) -> Tensor:
    """The decoder up to its symmetric convolution; [B, C, N]."""
    decoder = codec.decoder
    x_BND = torch.cat([decoder.semantic(semantic_BN), latents_BZN.transpose(1, 2)], dim=-1)
    return decoder.conv_in(decoder.glstm(x_BND).transpose(1, 2))


@torch.no_grad()
def read_latents(codec: Codec, codes_BNK: Tensor, chance: torch.Generator) -> Tensor:
    """Latents of known codes, some crops with fewer levels."""
    return known_latents(codec, codes_BNK, dropped_levels(codes_BNK.shape[0], codec.config.levels, chance))


@torch.no_grad()
def known_latents(codec: Codec, codes_BNK: Tensor, levels_B: Tensor) -> Tensor:
    """Latents [B, Z, N] of known codes, every crop with so many levels."""
    levels: Iterable[Any] = codec.quantizer.levels
    parts = [
        level.read(codes_BNK[..., 1 + number]) * (number < levels_B).view(-1, 1, 1)
        for number, level in enumerate(levels)
    ]
    return torch.stack(parts).sum(dim=0)


def dropped_levels(batch: int, levels: int, chance: torch.Generator) -> Tensor:
    """Levels each crop may use: all for three quarters, else uniform from 1 (train more, use less)."""
    drawn_B = torch.randint(1, levels + 1, (batch,), generator=chance)
    whole_B = torch.rand(batch, generator=chance) < 0.75
    return torch.where(whole_B, torch.full_like(drawn_B, levels), drawn_B)


@torch.no_grad()
def code_clips(codec: Codec, clips: Sequence[Clip], *, acoustic: bool) -> list[Tensor]:
    """Codes of whole clips: the semantic column, or all four."""
    if acoustic:
        return [codec.encode(clip.input_S, codec.config.sample_rate_hz) for clip in clips]
    waves = [whole_frames(clip.input_S, codec.config.hop) for clip in clips]
    return [codec.semantic.codes(codec.fbank(wave_S).unsqueeze(0))[0].unsqueeze(1) for wave_S in waves]
