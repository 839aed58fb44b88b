"""How the speech codec is trained on Ray Train: data, stages, losses and their weights; loads without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from omni_ray.config.model import Checked, SizeName
from omni_ray.types.errors import ConfigError

AdversarialLoss = Literal["lsgan", "hinge"]
SpeechStage = Literal["semantic-pretrain", "semantic-ctc", "kmeans", "1", "2", "3"]
STAGES: tuple[SpeechStage, ...] = ("semantic-pretrain", "semantic-ctc", "kmeans", "1", "2", "3")
"""In order; each starts from what the one before it left."""


class SpeechDataConfig(Checked):
    """What is trained on."""

    folder: Path | None = None
    """Own recordings (wav, flac, ogg, mp3), found below this folder; words stand beside them as ``NAME.txt``.
    None: the tiny world's voices, and people's digits where OMNI_RAY_REAL_DATA names them."""
    longest_s: PositiveFloat = 12.0
    """Longer own recordings are cut into pieces of this length (and their words left out)."""
    held_out_every: PositiveInt = 20
    """Of own recordings every n-th is kept for the report."""
    hold_out: str = "yweweler"
    """Person of the human digits whom training never hears."""


class BestRqConfig(Checked):
    """Random-projection targets."""

    codes: PositiveInt = 8192
    width: PositiveInt = 16
    mask_share: PositiveFloat = 0.06
    """Chance that a codec frame begins a masked stretch."""
    mask_s: PositiveFloat = 0.4


class DiscriminatorConfig(Checked):
    """Multi-period and multi-band STFT discriminators."""

    periods: tuple[PositiveInt, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[PositiveInt, ...] = (32, 128, 512, 1024, 1024)
    windows: tuple[PositiveInt, ...] = (2048, 1024, 512)
    band_channels: PositiveInt = 32

    @model_validator(mode="after")
    def someone_judges(self) -> Self:
        """At least one member."""
        if not self.periods and not self.windows:
            raise ConfigError("adversarial.discriminators has neither periods nor windows; give it at least one")
        return self


class AdversarialConfig(Checked):
    """The generator against its discriminators."""

    start: NonNegativeInt | None = None
    """Step of the phase at which the discriminators come in; None = never."""
    warm_up: NonNegativeInt = 0
    """Steps in which they learn alone before the generator hears them."""
    loss: AdversarialLoss = "lsgan"
    weight: NonNegativeFloat = 1.0
    feature_weight: NonNegativeFloat = 2.0
    lr: PositiveFloat = 1e-4
    discriminators: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)


class PhaseConfig(Checked):
    """One cycle of the learning rate with one objective."""

    steps: NonNegativeInt
    """0 leaves the phase out."""
    batch: PositiveInt
    """Clips or crops of a step, over all workers."""
    parts: PositiveInt = 4
    """Equal parts of a batch whose gradients are summed in order: numbers depend on parts, not on workers."""
    frames: PositiveInt = 12
    """Codec frames of a crop (60 ms each); clips are whole in the semantic stages."""
    lr: PositiveFloat = 1e-4
    clip_norm: PositiveFloat = 1.0
    adversarial: AdversarialConfig = Field(default_factory=AdversarialConfig)

    @model_validator(mode="after")
    def parts_divide(self) -> Self:
        """Parts are equal, so that their mean is the batch's."""
        if self.batch % self.parts:
            raise ConfigError(f"batch {self.batch} is not a multiple of parts {self.parts}; make it one")
        return self


class LossWeights(Checked):
    """Weights of the reconstruction stages."""

    mel: NonNegativeFloat = 15.0
    """Multi-resolution log mel and line power."""
    commit: NonNegativeFloat = 0.25
    codebook: NonNegativeFloat = 1.0
    frame: NonNegativeFloat = 0.0
    """Mel frames read out of the decoder's front, beside the waveform."""


class PretrainStage(Checked):
    """BEST-RQ of the semantic branch."""

    targets: BestRqConfig = Field(default_factory=BestRqConfig)
    train: PhaseConfig


class CtcStage(Checked):
    """Fine-tuning on spelling."""

    train: PhaseConfig
    gain_log: NonNegativeFloat = 1.5
    """Largest change of log energy, up or down."""


class KmeansStage(Checked):
    """The semantic codebook."""

    rounds: PositiveInt = 40
    rows: PositiveInt = 40000
    """Frames that choose the first centres, evenly spread; every frame counts in the rounds."""


class EncoderStage(Checked):
    """Stage 1: acoustic encoder and quantiser, with a 16 kHz decoder."""

    latents: PhaseConfig
    """The encoder against mel frames, before there is a quantiser (docs/decisions/0014)."""
    coded: PhaseConfig = Field(default_factory=lambda: PhaseConfig(steps=0, batch=4))
    """The encoder on, through the quantiser that was set from its latents; 0 steps leave it as it was (0037)."""
    wave: PhaseConfig
    """The 16 kHz decoder on quantised latents, mel first, then discriminators."""
    encoder_lr_share: NonNegativeFloat = 0.0
    """The encoder's and quantiser's share of the wave phase's rate; 0 keeps them as the phases before left them."""
    weights: LossWeights = Field(default_factory=LossWeights)


class DecoderStage(Checked):
    """Stage 2: the 24 kHz decoder with encoder and quantiser frozen."""

    mel: PhaseConfig
    """The front against mel frames."""
    wave: PhaseConfig
    """The whole decoder against the waveform."""
    polish: PhaseConfig
    """A gentler cycle; its discriminators make the sound, its mel loss keeps the words."""
    weights: LossWeights = Field(default_factory=LossWeights)
    codebooks: PositiveInt | None = None
    """Decode with so many codebooks only (the report's 2 or 4); None: all, some crops with fewer."""


class SpeakerStage(Checked):
    """Stage 3: a few speakers, small rate."""

    speakers: tuple[str, ...] = ()
    """Names of voices (of own recordings: folders); none = the assistant's, or everybody where there is none."""
    polish: PhaseConfig
    weights: LossWeights = Field(default_factory=LossWeights)


class SpeechRecipe(Checked):
    """All stages of one codec."""

    size: SizeName = "tiny"
    seed: NonNegativeInt = 0
    data: SpeechDataConfig = Field(default_factory=SpeechDataConfig)
    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints; a lost worker costs no more than these."""
    max_failures: NonNegativeInt = 2
    """Worker groups that may be lost and started again from the last checkpoint."""
    samples: NonNegativeInt = 4
    """Held-out recordings of the report."""
    pretrain: PretrainStage
    ctc: CtcStage
    kmeans: KmeansStage = Field(default_factory=KmeansStage)
    encoder: EncoderStage
    decoder: DecoderStage
    speaker: SpeakerStage

    def phases(self, stage: SpeechStage) -> dict[str, PhaseConfig]:
        """Phases of a stage in order, those with no step left out."""
        of: dict[str, dict[str, Any]] = {
            "semantic-pretrain": {"pretrain": self.pretrain.train},
            "semantic-ctc": {"ctc": self.ctc.train},
            "kmeans": {},
            "1": {"latents": self.encoder.latents, "coded": self.encoder.coded, "wave16": self.encoder.wave},
            "2": {"mel": self.decoder.mel, "wave": self.decoder.wave, "polish": self.decoder.polish},
            "3": {"speaker": self.speaker.polish},
        }
        return {name: phase for name, phase in of[stage].items() if phase.steps}
