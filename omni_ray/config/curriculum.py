"""Stages of the curriculum: steps, mixture, what trains, loss weights, learning rates (models.md section 6)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

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


class Stage(Checked):
    """One curriculum stage."""

    name: str
    steps: PositiveInt
    mixture: dict[str, PositiveFloat]
    """Samples per step by source; a fraction is met on average, exactly over the stage (pure arithmetic)."""
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
        if not self.mixture:
            raise ConfigError(f"stage {self.name} has an empty mixture; name at least one source")
        return self
