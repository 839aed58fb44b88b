"""Serving: replicas per pool, turn-taking, limits."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from omni_ray.config.model import Checked
from omni_ray.config.parallel import Resources, refuse_gpus
from omni_ray.types.errors import ConfigError


class ServePool(Checked):
    """One deployment."""

    replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    """Above ``replicas``, Ray Serve autoscales between the two."""
    resources: Resources = Field(default_factory=lambda: Resources(cpu=0.25))
    """Of one replica; Ray's CPUs are tickets, and all five deployments fit on two cores."""
    surge_percent: int = Field(default=1, ge=0, le=100)
    """New replicas that a redeploy may start before old ones end, in percent of ``replicas``, at least one; needs their
    room.  0: none, so that a stage of one replica is away while its successor loads, and answers fail meanwhile."""


class ServePools(Checked):
    """One deployment a modality, and the gateway."""

    gateway: ServePool = Field(default_factory=ServePool)
    vision: ServePool = Field(default_factory=ServePool)
    audio: ServePool = Field(default_factory=ServePool)
    speech: ServePool = Field(default_factory=ServePool)
    language: ServePool = Field(default_factory=ServePool)
    prefill: ServePool = Field(default_factory=ServePool)
    """Reads prompts where ``serving.prefill_decode`` is ``separate``; ``language`` then makes the answers alone."""

    @model_validator(mode="after")
    def no_idle_gpus(self) -> Self:
        """See :func:`omni_ray.config.parallel.refuse_gpus`."""
        for name in ("gateway", "vision", "audio", "speech", "language", "prefill"):
            refuse_gpus(f"serving.pools.{name}", getattr(self, name).resources)
        return self


class TurnConfig(Checked):
    """Turn-taking of live conversations: what counts as speech, and how long a silence means what."""

    detector: Literal["silero", "energy"] = "silero"
    """Voice activity detector; silero falls back to energy, with a notice, where its package is not installed."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Probability from which a window of 32 ms is speech."""
    release: float = Field(default=0.15, ge=0, lt=1)
    """A window inside speech counts as silence when its probability is below ``threshold - release``."""
    start_ms: PositiveInt = 64
    """Speech this long begins a turn (t1); shorter sounds are clicks."""
    interrupt_ms: PositiveInt = 96
    """Speech this long while the assistant speaks is a barge-in (t5)."""
    prefix_ms: NonNegativeInt = 300
    """Sound kept from before the first window of speech."""
    speculate_ms: PositiveInt = 250
    """Silence after which answering begins unseen (t3)."""
    silence_ms: PositiveInt = 600
    """Silence that ends a turn (t4)."""
    max_turn_s: PositiveFloat = 60.0
    """A turn this long is ended as if silence had come."""

    @model_validator(mode="after")
    def silences_are_ordered(self) -> Self:
        """Speculation comes before the end, or it has no use."""
        if self.speculate_ms > self.silence_ms:
            raise ConfigError(
                f"turn.speculate_ms is {self.speculate_ms}, after the end of the turn at silence_ms {self.silence_ms}; "
                "choose speculate_ms <= silence_ms (equal: no speculation)"
            )
        return self


class FetchConfig(Checked):
    """Fetching media from addresses that requests name; off unless a host is allowed."""

    enabled: bool = False
    hosts: tuple[str, ...] = ()
    """``example.org``, ``*.example.org``, or ``*`` for everything that is not a private network."""
    max_mib: PositiveFloat = 16.0
    timeout_s: PositiveFloat = 5.0
    """For everything together: name, connection, redirects, body."""


class Limits(Checked):
    """What one request may ask for; beyond it the request is refused with the number."""

    max_body_mib: PositiveFloat = 32.0
    max_image_pixels: PositiveInt = 40_000_000
    max_audio_s: PositiveFloat = 120.0
    max_video_frames: PositiveInt = 512
    max_messages: PositiveInt = 64
    max_tokens: PositiveInt = 1024
    fetch: FetchConfig = Field(default_factory=FetchConfig)
    max_concurrent: PositiveInt = 32
    """Requests in flight; the next one is answered 429 at once."""
    max_per_key: PositiveInt = 32
    """Requests and live sessions in flight of one API key."""
    max_sessions: PositiveInt = 16
    """Live conversations of one gateway; the next one is refused at once."""
    max_session_s: PositiveFloat = 7200.0
    """Longest live conversation."""
    idle_s: PositiveFloat = 300.0
    """A live conversation whose client sends nothing for so long is closed."""
    slow_reader_s: PositiveFloat = 10.0
    """A client that takes nothing for so long while events wait for it is let go."""
    ping_s: PositiveFloat = 10.0
    """A WebSocket ping is sent so often."""
    half_open_s: PositiveFloat = 30.0
    """A peer that has answered no ping for so long is let go."""
    stage_s: PositiveFloat = 3.0
    """A stage that gives no sign of life for so long has failed on what was asked of it, and the client is told."""
    unused_s: PositiveFloat = 900.0
    """A stage forgets a session that nobody has used for so long; it is built again where it is asked for."""

    @model_validator(mode="after")
    def pings_come_before_the_end(self) -> Self:
        """A peer gets at least one ping before it is let go."""
        if self.half_open_s <= self.ping_s:
            raise ConfigError(
                f"limits.half_open_s is {self.half_open_s:g}, no longer than ping_s {self.ping_s:g}; a peer could "
                "never answer in time: choose half_open_s > ping_s"
            )
        return self


class ServingConfig(Checked):
    """The serving section of a recipe."""

    pools: ServePools = Field(default_factory=ServePools)
    prefill_decode: Literal["together", "separate"] = "together"
    """``separate``: prompts are read by a deployment of their own, which hands the cache over; the same tokens."""
    turn: TurnConfig = Field(default_factory=TurnConfig)
    limits: Limits = Field(default_factory=Limits)
