"""Stages of the curriculum: steps, mixture, what trains, loss weights, learning rates (networks.md section 6)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from omni_ray.config.mixture import Mixture
from omni_ray.config.model import Checked
from omni_ray.types.errors import ConfigError

Trainable = Literal["language", "audio_heads", "vision", "vision_projector", "audio", "audio_projector"]


class LossWeights(Checked):
    """Weights of the stage's objective: a text, b audio, c audio_text, d first_audio, vision."""

    text: NonNegativeFloat = 1.0
    audio: NonNegativeFloat = 0.25
    audio_text: NonNegativeFloat = 1.0
    first_audio: NonNegativeFloat = 0.1
    vision: NonNegativeFloat = 1.0
    pad_text: NonNegativeFloat = 0.1
    """Weight of text-pad targets beside codec rows, inside the audio_text term."""
    balance: NonNegativeFloat = 1e-4
    """Alpha of the expert load-balance loss."""
    z: NonNegativeFloat = 1e-6
    """Hidden-state z-loss."""
    mtp: NonNegativeFloat = 0.1
    """Text predicted one token further, by a model with ``mtp_layers: 1``; over the weight of the text it predicts."""


class LearningRate(Checked):
    """Linear warm-up to ``peak``, then a line or a cosine to ``end``."""

    peak: PositiveFloat = 2e-3
    end: NonNegativeFloat = 2e-3
    warmup_steps: int = Field(default=20, ge=0)
    shape: Literal["linear", "cosine"] = "linear"
    vision_scale: NonNegativeFloat = 0.3
    """Vision encoder's rate over the language model's."""
    audio_scale: NonNegativeFloat = 0.2
    projector_scale: NonNegativeFloat = 1.0


class Packing(Checked):
    """How drawn samples become the packed sequences of a step."""

    kind: Literal["balance", "best_fit", "split"] = "balance"
    """``balance``: the step's samples in sequences of equal work; ``best_fit``: whole samples that fill ``budget``
    rows; ``split``: one after another, cut at ``budget`` rows (never inside a media item)."""
    budget: PositiveInt | None = None
    """Rows of one packed sequence; None = the stage's seq_len."""
    lookahead: PositiveInt = Field(default=64, ge=2, le=4096)
    """Samples that best_fit chooses from; what it has not placed waits in the state."""


class Stage(Checked):
    """One curriculum stage."""

    name: str
    steps: PositiveInt
    mixture: Mixture
    """What it draws from: samples per step by source, or nested shares (``omni_ray/config/mixture.py``)."""
    packing: Packing = Field(default_factory=Packing)
    trainable: tuple[Trainable, ...]
    loss: LossWeights = Field(default_factory=LossWeights)
    lr: LearningRate = Field(default_factory=LearningRate)
    seq_len: PositiveInt = 256
    """Longest sample in rows; a longer one is refused by name."""
    micro_batches: PositiveInt = 4
    """Packed micro-batches a step is split into, whatever the pool sizes."""
    rope_base: PositiveFloat | None = None
    """RoPE base of this stage; None = the model's."""

    @model_validator(mode="after")
    def can_train(self) -> Self:
        """A stage must train something and draw something."""
        if not self.trainable:
            raise ConfigError(f"stage {self.name} has an empty trainable list; name at least one part")
        if not self.mixture.sources:
            raise ConfigError(f"stage {self.name} has an empty mixture; name at least one source")
        packed, take = self.packing.kind != "balance", self.mixture.take
        if packed and take is not None:
            raise ConfigError(
                f"stage {self.name} packs by {self.packing.kind}, which says how much a step takes; drop take"
            )
        if not packed and take is None and self.mixture.counts is None:
            raise ConfigError(f"stage {self.name} does not say how much a step takes; add mixture.take or a packing")
        if self.packing.kind == "best_fit" and self.sequence_rows < self.seq_len:
            raise ConfigError(
                f"stage {self.name} packs whole samples of up to seq_len {self.seq_len} rows into sequences of "
                f"{self.sequence_rows}; raise packing.budget or lower seq_len"
            )
        return self

    @property
    def sequence_rows(self) -> int:
        """Rows of one packed sequence."""
        return self.packing.budget or self.seq_len
