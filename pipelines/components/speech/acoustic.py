"""The acoustic stages on many workers: encoder and quantiser (1), 24 kHz decoder (2), speakers (3).

Legend: B crops, S samples, N codec frames, Z latent channels, K codebooks.
The mathematics is that of ``codec_latents.py`` and ``codec_decoder.py``; here it is cut into parts, and discriminators
may join.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.config.speech_training import EncoderStage, LossWeights, PhaseConfig
from omni_ray.models.audio_decoder import AudioDecoder
from omni_ray.models.codec import Codec
from omni_ray.models.codec_blocks import KERNEL
from omni_ray.models.discriminators import Discriminators
from omni_ray.training.adversarial import discriminator_loss, feature_loss, generator_loss
from pipelines.components.codec_decoder import MEL_BINS, FrameMel, WaveLoss
from pipelines.components.codec_latents import (
    FIT_CROPS,
    START_CROPS,
    MelReadout,
    fit_quantizer,
    readout_terms,
    unit_start,
)
from pipelines.components.codec_material import Clip
from pipelines.components.codec_stages import Cropper, Cut, code_clips, dropped_levels, front_end, known_latents
from pipelines.components.speech.group import Group
from pipelines.components.speech.loop import TOTAL, one_cycle, step_chance

BETAS, WEIGHT_DECAY, RISE = (0.8, 0.99), 1e-4, 0.08
JUDGE_DECAY = 0.999996
"""Of the discriminators' rate, a step (networks.md section 3)."""


def shared_codes(codec: Codec, clips: Sequence[Clip], group: Group, *, acoustic: bool) -> list[Tensor]:
    """Codes of all clips in order; every worker encodes its share."""
    own = code_clips(codec.eval(), clips[group.rank :: group.size], acoustic=acoustic)
    shares = group.gather_objects([codes.numpy() for codes in own])
    return [torch.from_numpy(shares[place % group.size][place // group.size]).clone() for place in range(len(clips))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crops:
    """A batch: crops, and how many levels of the quantiser each may use."""

    cut: Cut
    levels_B: Tensor

    def part(self, number: int, parts: int) -> Crops:
        """One of so many equal parts."""
        size = len(self.levels_B) // parts
        rows, cut = slice(number * size, (number + 1) * size), self.cut
        part = Cut(input_BS=cut.input_BS[rows], output_BS=cut.output_BS[rows], codes_BNK=cut.codes_BNK[rows])
        return Crops(cut=part, levels_B=self.levels_B[rows])


class AcousticObjective:
    """Crops of the clips, a generator with one cycle, discriminators from ``adversarial.start`` on."""

    def __init__(self, codec: Codec, cropper: Cropper, config: PhaseConfig, weights: LossWeights) -> None:
        self.codec, self.cropper, self.config, self.weights = codec, cropper, config, weights
        self.modules: dict[str, nn.Module] = {"codec": codec}
        self.players: dict[str, list[nn.Parameter]] = {}
        self.codebooks: int | None = None
        self.judges: Discriminators | None = None
        self._made: dict[int, tuple[Tensor, Tensor, dict[str, Tensor]]] = {}
        if config.adversarial.start is not None:
            self.judges = Discriminators(config.adversarial.discriminators)
            self.modules["discriminator"] = self.judges
            self.players["discriminator"] = list(self.judges.parameters())

    def generated(self, batch: Crops) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Made sound [B, S], the real one, and further terms of the loss, weighted."""
        raise NotImplementedError

    def turns(self, step: int) -> tuple[str, ...]:
        """The discriminators first, so that the generator meets what they have just learnt."""
        start = self.config.adversarial.start
        return ("discriminator", "generator") if start is not None and step >= start else ("generator",)

    def draw(self, chance: torch.Generator) -> Crops:
        """Crops and levels of the whole batch."""
        self.cropper.chance = chance
        cut = self.cropper.draw(self.config.batch, self.config.frames)
        levels_B = dropped_levels(self.config.batch, self.codec.config.levels, chance)
        if self.codebooks is not None:
            levels_B = torch.full_like(levels_B, self.codebooks - 1)
        self._made = {}
        return Crops(cut=cut, levels_B=levels_B)

    def optimizers(self) -> dict[str, tuple[torch.optim.Optimizer, Any]]:
        """One cycle for the generator, an all but constant rate for the discriminators."""
        groups = [{"params": self.players["generator"], "lr": self.config.lr}]
        made: dict[str, tuple[torch.optim.Optimizer, Any]] = {
            "generator": one_cycle(groups, self.config, betas=BETAS, weight_decay=WEIGHT_DECAY, rise=RISE)
        }
        if self.judges is not None:
            optimizer = torch.optim.AdamW(self.players["discriminator"], lr=self.config.adversarial.lr, betas=BETAS)
            made["discriminator"] = optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, JUDGE_DECAY)
        return made

    def losses(self, player: str, batch: Crops, part: int, step: int) -> dict[str, Tensor]:
        """The player's terms on one part, each over the number of parts."""
        if part not in self._made:
            self._made[part] = self.generated(batch.part(part, self.config.parts))
        made_BS, real_BS, terms = self._made[part]
        if player == "discriminator":
            assert self.judges is not None
            loss = discriminator_loss(self.judges(real_BS), self.judges(made_BS.detach()), self.config.adversarial.loss)
            return {TOTAL: loss / self.config.parts}
        del self._made[part]
        terms = terms | self._adversarial(made_BS, real_BS, step)
        told = {name: term / self.config.parts for name, term in terms.items()}
        return {TOTAL: torch.stack(list(told.values())).sum(), **told}

    def _adversarial(self, made_BS: Tensor, real_BS: Tensor, step: int) -> dict[str, Tensor]:
        config = self.config.adversarial
        if self.judges is None or config.start is None or step < config.start + config.warm_up:
            return {}
        with torch.no_grad():
            real = self.judges(real_BS)
        made = self.judges(made_BS)
        return {
            "adversarial": config.weight * generator_loss(made, config.loss),
            "feature": config.feature_weight * feature_loss(real, made),
        }

    def finish(self) -> None:
        """Packed weights of the codec are forgotten."""
        self.codec.eval()
        self.codec.train()


class Latents(AcousticObjective):
    """Stage 1, first: acoustic encoder and decoder's front against mel frames, then the quantiser from data."""

    def __init__(self, codec: Codec, cropper: Cropper, stage: EncoderStage, *, seed: int, coded: bool = False) -> None:
        """``coded``: the phase after it, through the quantiser as it was set; its read-out begins anew."""
        super().__init__(codec, cropper, stage.coded if coded else stage.latents, stage.weights)
        self.seed, self.coded = seed, coded
        self.readout = MelReadout(codec)
        trained = [codec.acoustic, codec.decoder.semantic, codec.decoder.glstm, codec.decoder.conv_in, self.readout]
        self.modules["readout"] = self.readout
        self.players["generator"] = weights_of(trained)
        if not coded:
            cropper.chance = step_chance(seed, "unit start", 0)
            unit_start(codec.acoustic, cropper.draw(START_CROPS, self.config.frames).input_BS.unsqueeze(1))

    def losses(self, player: str, batch: Crops, part: int, step: int) -> dict[str, Tensor]:
        """See :func:`readout_terms`."""
        mine = batch.part(part, self.config.parts)
        terms = readout_terms(self.codec, self.readout, mine.cut, mine.levels_B if self.coded else None)
        told = {name: term / self.config.parts for name, term in terms.items()}
        return {TOTAL: torch.stack([*told.values()]).sum(), **told}

    @torch.no_grad()
    def finish(self) -> None:
        """Set every level of the quantiser from the latents that occur, before the coded phase."""
        if self.coded:
            return
        self.cropper.chance = step_chance(self.seed, "fit crops", 0)
        cuts = [self.cropper.draw(START_CROPS, self.config.frames) for _ in range(FIT_CROPS // START_CROPS)]
        latents_BZN = torch.cat([self.codec.acoustic(cut.input_BS.unsqueeze(1)) for cut in cuts])
        fit_quantizer(self.codec.quantizer, latents_BZN, step_chance(self.seed, "fit", 0))


class Wave16(AcousticObjective):
    """Stage 1, then: the 16 kHz decoder on quantised latents; encoder and quantiser learn along if asked to."""

    def __init__(self, codec: Codec, cropper: Cropper, stage: EncoderStage, decoder: AudioDecoder) -> None:
        super().__init__(codec, cropper, stage.wave, stage.weights)
        self.share, self.decoder = stage.encoder_lr_share, decoder
        self.loss = WaveLoss(codec.config.sample_rate_hz)
        self.modules["decoder16"] = decoder
        encoder = weights_of([codec.acoustic, codec.quantizer]) if self.share else []
        self.groups = [(list(decoder.parameters()), 1.0), *([(encoder, self.share)] if encoder else [])]
        self.players["generator"] = [weight for weights, _ in self.groups for weight in weights]

    def optimizers(self) -> dict[str, tuple[torch.optim.Optimizer, Any]]:
        """As usual, the encoder with its share of the rate."""
        made = super().optimizers()
        groups = [{"params": weights, "lr": share * self.config.lr} for weights, share in self.groups]
        made["generator"] = one_cycle(groups, self.config, betas=BETAS, weight_decay=WEIGHT_DECAY, rise=RISE)
        return made

    def generated(self, batch: Crops) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """16 kHz sound of the crops' quantised latents."""
        with torch.set_grad_enabled(self.share > 0 and torch.is_grad_enabled()):
            latents_BZN = self.codec.acoustic(batch.cut.input_BS.unsqueeze(1))
            made = self.codec.quantizer(latents_BZN, batch.levels_B)
        sound_BS = self.decoder(batch.cut.codes_BNK[..., 0], made.values_BZT)[:, 0]
        terms = {"mel": self.weights.mel * self.loss(sound_BS, batch.cut.input_BS)}
        if self.share:
            terms |= {
                "commit": self.weights.commit * made.commit_loss,
                "codebook": self.weights.codebook * made.codebook_loss,
            }
        return sound_BS, batch.cut.input_BS, terms


class Decoding(AcousticObjective):
    """Stages 2 and 3: the 24 kHz decoder on codes that do not change; ``front_only`` stops at mel frames."""

    def __init__(
        self, codec: Codec, cropper: Cropper, config: PhaseConfig, weights: LossWeights, *, front_only: bool = False
    ) -> None:
        super().__init__(codec, cropper, config, weights)
        self.front_only = front_only
        self.mel, self.loss = FrameMel(codec, cropper), WaveLoss(codec.config.output_rate_hz)
        self.readout = nn.Conv1d(codec.config.decoder_dim // 2, MEL_BINS, 1)
        self.modules["readout"] = self.readout
        decoder = codec.decoder
        self.stages: list[Any] = list(decoder.stages)
        front = [decoder.semantic, decoder.glstm, decoder.conv_in, self.stages[0]]
        self.players["generator"] = weights_of([*(front if front_only else [decoder]), *self._readouts()])

    def _readouts(self) -> list[nn.Module]:
        return [self.readout] if self.front_only or self.weights.frame else []

    def losses(self, player: str, batch: Crops, part: int, step: int) -> dict[str, Tensor]:
        """Mel frames alone for the front, else the sound's terms."""
        if not self.front_only:
            return super().losses(player, batch, part, step)
        _, far = self._front(batch.part(part, self.config.parts))
        return {TOTAL: far / self.config.parts}

    def generated(self, batch: Crops) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """24 kHz sound of the crops' codes."""
        decoder = self.codec.decoder
        x_BCT, far = self._front(batch)
        for stage in self.stages[1:]:
            x_BCT = stage(x_BCT)
        made_BS = torch.tanh(decoder.conv_out(F.pad(decoder.snake_out(x_BCT), (KERNEL - 1, 0))))[:, 0]
        terms = {"mel": self.weights.mel * self.loss(made_BS, batch.cut.output_BS)}
        if self.weights.frame:
            terms["frame"] = self.weights.frame * far
        return made_BS, batch.cut.output_BS, terms

    def _front(self, batch: Crops) -> tuple[Tensor, Tensor]:
        """First-stage rows, and how far their read-out is from the clip's mel frames (0 where nobody asks)."""
        codes_BNK = batch.cut.codes_BNK
        latents_BZN = known_latents(self.codec, codes_BNK, batch.levels_B)
        x_BCT = self.stages[0](front_end(self.codec, codes_BNK[..., 0], latents_BZN))
        if not self._readouts():
            return x_BCT, x_BCT.new_zeros(())
        return x_BCT, (self.readout(x_BCT).transpose(1, 2) - self.mel(batch.cut.output_BS)).abs().mean()


def weights_of(parts: Iterable[nn.Module]) -> list[nn.Parameter]:
    """All parameters of some modules in order."""
    return [weight for part in parts for weight in part.parameters()]


def checked_modules(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What a stage leaves besides the codec: discriminators and the 16 kHz decoder, not read-outs and heads."""
    return {name: module for name, module in modules.items() if name in ("discriminator", "decoder16")}
