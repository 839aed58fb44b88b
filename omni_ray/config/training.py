"""Optimizer, checkpoints and data settings."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from omni_ray.config.model import Checked


class OptimizerConfig(Checked):
    """AdamW, one for every pool."""

    beta1: PositiveFloat = 0.9
    beta2: PositiveFloat = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: NonNegativeFloat = 1.0
    """Global norm over all pools; 0 = no clipping."""
    expert_bias_rate: NonNegativeFloat = 1e-3
    """Mu of the expert-bias controller, scaled with the learning rate."""


class CheckpointConfig(Checked):
    """When state is kept."""

    every_steps: PositiveInt = 200
    keep: PositiveInt = 2
    """Newest whole checkpoints that stay on disk."""
    snapshot_every: PositiveInt = 50
    """Steps between in-memory snapshots (supervision, a later issue)."""


class SourceConfig(Checked):
    """Where one source of the mixtures lies."""

    path: str
    """Folder (or tar) of WebDataset shards; ``{data}`` stands for the data root."""
    split: str = "train"
    """Shards whose name starts with this."""
    fallback: str | None = None
    """Source that takes over the share where this one's shards are absent (no human speech, say); None refuses."""


class DataConfig(Checked):
    """Sources by name, readers, failure budget."""

    root: Path | None = None
    """Data root; None = the tiny world in its cache folder."""
    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    workers: PositiveInt = 1
    """Ray Data decode tasks at a time."""
    tile_items: PositiveInt = 16
    """Items of one encoder tile (the unit of ordered reduction)."""
    max_bad_fraction: NonNegativeFloat = 0.01
    """Undecodable share of the samples drawn above which the run stops."""
    prefetch_steps: NonNegativeInt = 4
