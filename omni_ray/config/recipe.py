"""The recipe: everything a run is, in one checked file."""

from __future__ import annotations

import hashlib
import json
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from omni_ray.config.curriculum import Stage
from omni_ray.config.model import Checked, OmniConfig, SizeName, model_preset
from omni_ray.config.parallel import Pools, Schedule, is_sharded, refuse_unbuilt
from omni_ray.config.serving import ServingConfig
from omni_ray.config.training import CheckpointConfig, DataConfig, OptimizerConfig
from omni_ray.types.errors import ConfigError


class Recipe(Checked):
    """A whole run. Names are public; further keys are added under them."""

    size: SizeName = "tiny"
    model: OmniConfig | None = None
    """Explicit networks instead of a size name."""
    seed: NonNegativeInt = 0
    components: str = "shipped"
    """``shipped``, ``train``, or a folder with vision/, audio/ and codec/."""
    placement: Literal["separate", "colocate"] = "separate"
    deterministic: bool = False
    """Only kernels whose bits do not vary from run to run; what that costs: ``omni-ray bench deterministic``."""
    schedule: Schedule = Field(default_factory=Schedule)
    pools: Pools = Field(default_factory=Pools)
    stages: tuple[Stage, ...] = ()
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    serving: ServingConfig = Field(default_factory=ServingConfig)

    @model_validator(mode="after")
    def can_run(self) -> Self:
        """Refuse duplicates, unknown sources and what is not built."""
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"stages holds {name!r} twice; give each stage its own name")
        for stage in self.stages:
            for source in stage.mixture.sources:
                if self.data.sources and source not in self.data.sources:
                    known = ", ".join(sorted(self.data.sources))
                    raise ConfigError(f"stage {stage.name} draws from {source!r}, which data.sources lacks ({known})")
        refuse_unbuilt(self.pools, self.schedule, self.placement)
        sharded = [name for name in ("vision", "audio") if is_sharded(getattr(self.pools, name))]
        for stage in self.stages:
            if sharded and stage.mixture.gap is not None:
                raise ConfigError(
                    f"stage {stage.name} measures its mixture (gap) between steps, when pools.{sharded[0]} with shard "
                    "hsdp has let go of its weights; choose shard none"
                )
        return self

    @property
    def networks(self) -> OmniConfig:
        """Explicit ``model`` section, or the size's preset."""
        return self.model or model_preset(self.size)

    @property
    def inner_dp(self) -> int:
        """Encoder ranks that belong to one language replica when colocated; 1 otherwise."""
        return self.pools.vision.actors // self.pools.language.actors if self.placement == "colocate" else 1

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage of a global step and the step's number inside it.

        Raises:
            ConfigError: the step lies beyond the last stage.
        """
        first = 0
        for stage in self.stages:
            if step < first + stage.steps:
                return stage, step - first
            first += stage.steps
        raise ConfigError(f"step {step} lies beyond the recipe's {first} steps")

    def numbers_fingerprint(self, without: tuple[str, ...] = ()) -> str:
        """Hash of everything that changes the numbers of a run; pool sizes, placement and schedule do not.

        Args:
            without: Keys of the stages that are left out, for instance ``mixture``.
        """
        keep = self.model_dump(mode="json", include={"size", "model", "seed", "stages", "optimizer"})
        keep["stages"] = [{key: value for key, value in s.items() if key not in without} for s in keep["stages"]]
        keep["reduce"] = self.schedule.reduce
        rounded = {name: getattr(self.pools, name).precision for name in ("vision", "audio", "language")}
        rounded = {name: precision for name, precision in rounded.items() if precision != "fp32"}
        if rounded:  # a run in fp32 keeps the fingerprint that it had before there was a choice
            keep["precision"] = rounded
        if self.deterministic:
            keep["deterministic"] = True
        keep["tile_items"] = self.data.tile_items
        keep["tokenizer"] = None if self.data.tokenizer is None else self.data.tokenizer.name
        for word in ("split", "form", "prompts"):
            keep[word] = {name: getattr(source, word) for name, source in sorted(self.data.sources.items())}
        return hashlib.sha256(json.dumps(keep, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path_or_preset: str, overrides: list[str] | None = None) -> Recipe:
        """Load a preset name or a YAML file; see ``omni_ray.config.load.load_recipe``."""
        from omni_ray.config.load import load_recipe

        return load_recipe(path_or_preset, overrides or [])
