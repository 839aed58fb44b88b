"""Serving: replicas per pool, turn-taking, limits."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from omni_ray.config.model import Checked
from omni_ray.config.parallel import Resources


class ServePool(Checked):
    """One deployment."""

    replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    """Above ``replicas``, Ray Serve autoscales between the two."""
    resources: Resources = Field(default_factory=lambda: Resources(cpu=0.25))
    """Of one replica; Ray's CPUs are tickets, and all five deployments fit on two cores."""


class ServePools(Checked):
    """One deployment a modality, and the gateway."""

    gateway: ServePool = Field(default_factory=ServePool)
    vision: ServePool = Field(default_factory=ServePool)
    audio: ServePool = Field(default_factory=ServePool)
    speech: ServePool = Field(default_factory=ServePool)
    language: ServePool = Field(default_factory=ServePool)


class TurnConfig(Checked):
    """Turn-taking of live conversations (used by the realtime endpoint)."""

    silence_ms: PositiveInt = 600
    speculate_ms: PositiveInt = 250


class Limits(Checked):
    """What one request may ask for; beyond it the request is refused with the number."""

    max_body_mib: PositiveFloat = 32.0
    max_image_pixels: PositiveInt = 40_000_000
    max_audio_s: PositiveFloat = 120.0
    max_video_frames: PositiveInt = 512
    max_messages: PositiveInt = 64
    max_tokens: PositiveInt = 1024
    max_concurrent: PositiveInt = 32
    """Requests in flight; the next one is answered 429 at once."""


class ServingConfig(Checked):
    """The serving section of a recipe."""

    pools: ServePools = Field(default_factory=ServePools)
    turn: TurnConfig = Field(default_factory=TurnConfig)
    limits: Limits = Field(default_factory=Limits)
