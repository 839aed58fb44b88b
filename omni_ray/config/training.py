"""Optimizer, checkpoints and data settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

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
    snapshot_every: PositiveInt = 10
    """Steps between in-memory snapshots; no more than these are lost when an actor dies."""
    accept_changed: tuple[Literal["mixture"], ...] = ()
    """What a resumed run may change: ``mixture`` goes on from every stream's position with the new weights."""


class SourceConfig(Checked):
    """Where one source of the mixtures lies."""

    path: str
    """Folder of shards, or one; a path or a URI (``s3://...``); ``{data}`` stands for the data root."""
    format: Literal["auto", "webdataset", "parquet", "jsonl", "llava", "arrow"] = "auto"
    """How its files are read; auto goes by their endings."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Known field -> the files' own name for it, for instance ``{image: jpg, text: alt}``."""
    media_roots: tuple[str, ...] = ()
    """Folders besides the records' own from which records may name media files."""
    allow_urls: bool = False
    """Whether records may name http addresses."""
    split: str = "train"
    """Shards whose name starts with this."""
    form: Literal["as_is", "asr", "tts", "asr_tts", "understand", "chunked", "interleave"] = "as_is"
    """What is made of its samples: dictation, reading aloud, a task for the audio encoder, sound between frames, speech
    between words (``omni_ray/data/forms.py``)."""
    prompts: tuple[str, ...] = ()
    """Wordings of the form's task, chosen at random; none = its own."""
    fallback: str | None = None
    """Source that takes over the share where this one's shards are absent (no human speech, say); None refuses."""


class DataConfig(Checked):
    """Sources by name, readers, failure budget."""

    root: Path | None = None
    """Data root; None = the tiny world in its cache folder."""
    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; None = the one in the data root."""
    workers: PositiveInt = 1
    """Ray Data decode tasks at a time."""
    tile_items: PositiveInt = 16
    """Items of one encoder tile (the unit of ordered reduction)."""
    max_bad_fraction: NonNegativeFloat = 0.01
    """Unusable share of the samples read from one source above which the run stops with their list."""
    read_timeout_s: PositiveFloat = 60.0
    """A read that takes longer counts as stalled and is tried again; the run stops, resumable, after the last try."""
    read_tries: PositiveInt = 3
    max_sample_bytes: PositiveInt = 2**30
    """Largest sample, media together, that is taken into memory."""
    cache_bytes: NonNegativeInt = 2**30
    """Decoded samples that one reader keeps for the next epoch; 0 keeps none."""
    prefetch_steps: NonNegativeInt = 4
