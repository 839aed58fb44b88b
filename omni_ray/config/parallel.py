"""Where and how pools run: actors, resources, precision, sharding, placement, schedule."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from omni_ray.config.model import Checked
from omni_ray.types.errors import ConfigError


class Resources(Checked):
    """What one actor of a pool asks of the cluster."""

    cpu: NonNegativeFloat = 1.0
    gpu: NonNegativeFloat = 0.0
    """GPUs, or a share of one; with any, the actor computes there."""
    custom: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Custom resource labels, for instance ``{vision_gpu: 1}``."""


class PoolConfig(Checked):
    """One pool of actors that own one modality's network."""

    actors: PositiveInt = 1
    resources: Resources = Field(default_factory=Resources)
    precision: Literal["fp32", "bf16"] = "fp32"
    """What weights and activations are computed in; what is trained and saved are fp32 masters either way."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward makes again instead of keeping it, with the same bits.

    ``full``: an encoder's whole forward, a language layer's; ``selective`` (language): norms, gates, gathered rows and
    attention probabilities.
    """
    keep_freed_memory: bool = False
    """Freed blocks stay with the process (glibc): steps with large tensors are faster, the process grows larger."""
    shard: Literal["none", "hsdp", "zero1", "zero2", "zero3"] = "none"
    """What ranks hold shares of, with the same bits.

    ``zero1``: masters and moments; ``zero2``: gradients as well, sent on term by term; ``zero3``: and, between steps,
    weights; ``hsdp``: as zero3, with terms that are sent on in one go at the end of a step.
    """
    offload: Literal["none", "cpu"] = "none"
    """``cpu``: masters and moments lie in host memory, and the optimizer steps there."""
    threads: PositiveInt = 1
    """Torch threads of an actor; results are bitwise comparable only at equal threads."""
    spares: NonNegativeInt = 0
    """Warm actors with this pool's resources, for its own ranks only; see also ``pools.spares``."""


class LanguagePoolConfig(PoolConfig):
    """The language pool; ``actors`` must equal dp x cp x pp."""

    backend: Literal["native", "deepspeed"] = "native"
    dp: NonNegativeInt = 0
    """Data-parallel replicas; 0 = as many as actors / (cp x pp)."""
    cp: PositiveInt = 1
    pp: PositiveInt = 1
    ep: PositiveInt = 1
    pipeline: Literal["1f1b", "zero_bubble_v"] = "1f1b"

    @model_validator(mode="after")
    def ranks_fit(self) -> Self:
        """dp x cp x pp is the number of actors."""
        inner = self.cp * self.pp
        if self.actors % inner or (self.dp and self.dp * inner != self.actors):
            raise ConfigError(
                f"pools.language.actors is {self.actors}, yet dp x cp x pp is {self.dp or 1} x {self.cp} x {self.pp}; "
                f"set actors to their product"
            )
        return self


class Pools(Checked):
    """The four pools."""

    vision: PoolConfig = Field(default_factory=PoolConfig)
    audio: PoolConfig = Field(default_factory=PoolConfig)
    speech: PoolConfig = Field(default_factory=PoolConfig)
    language: LanguagePoolConfig = Field(default_factory=LanguagePoolConfig)
    spares: NonNegativeInt = 1
    """Warm actors of the run: torch imported, ready to take over a rank that asks for nothing but CPUs."""
    wait_s: NonNegativeFloat = 0.0
    """How long to wait for an autoscaler when the cluster cannot hold the pools; 0 refuses at once."""

    def for_serving(self) -> Pools:
        """The same pools as replicas have them: however they were trained, each holds a whole network in fp32."""
        plain = {"precision": "fp32", "shard": "none", "offload": "none"}
        changed = {name: getattr(self, name).model_copy(update=plain) for name in ("vision", "audio", "speech")}
        language = self.language.model_copy(update=plain | {"backend": "native"})
        return self.model_copy(update=changed | {"language": language})


class Schedule(Checked):
    """When the calls of a step happen, and how sums are made."""

    kind: Literal["barrier", "pipelined"] = "pipelined"
    window: PositiveInt = 4
    """Micro-batches that encoders may run ahead of the language pool."""
    num_chunks: PositiveInt = 1
    """Pieces in which a micro-batch's features travel."""
    reduce: Literal["ordered", "fast"] = "ordered"
    """``ordered``: sums term by term, bit-equal over pool sizes.  ``fast``: packed batches and all-reduce."""
    timeout_s: PositiveFloat = 600.0
    """Longest time without any call of a step ending, and inside one collective; then the run counts as hung."""
    steps_ahead: PositiveInt = 2
    """Steps that the feeder prepares ahead."""


def is_sharded(pool: PoolConfig) -> bool:
    """Whether ranks of a pool hold shares of its network in the native way."""
    return pool.shard != "none" and pool.actors > 1 and not has_deepspeed(pool)


def has_deepspeed(pool: PoolConfig) -> bool:
    """Whether DeepSpeed shares a pool's state out."""
    return isinstance(pool, LanguagePoolConfig) and pool.backend == "deepspeed"


def sends_terms_on(pool: PoolConfig) -> bool:
    """Whether gradient terms go to their owners as soon as a micro-batch's backward has made them."""
    return is_sharded(pool) and pool.shard in ("zero2", "zero3")


def shares_weights(pool: PoolConfig) -> bool:
    """Whether ranks let go of each other's weights between two steps."""
    return is_sharded(pool) and pool.shard in ("hsdp", "zero3")


def check_sharded(name: str, pool: PoolConfig, schedule: Schedule) -> None:
    """Refuse what sharding cannot go with.

    Raises:
        ConfigError: names the settings and the mend.
    """
    if name == "speech" and (pool.shard, pool.offload) != ("none", "none"):
        raise ConfigError(
            f"pools.speech has shard {pool.shard} and offload {pool.offload}, yet the codec does not train: it has no "
            "optimizer state to share or to move; choose none"
        )
    if has_deepspeed(pool):
        check_deepspeed(pool, schedule)
        return
    if pool.shard == "none":
        return
    if schedule.reduce != "ordered":
        raise ConfigError(
            f"pools.{name}.shard is {pool.shard}, which has ordered sums alone; choose schedule.reduce ordered"
        )
    if pool.shard in ("hsdp", "zero3") and name != "language" and pool.recompute != "full":
        raise ConfigError(
            f"pools.{name}.shard is {pool.shard} with recompute {pool.recompute}: graphs that wait for their backward "
            "would keep the weights; choose recompute full, or zero2, which keeps them anyway"
        )


def check_deepspeed(pool: PoolConfig, schedule: Schedule) -> None:
    """Refuse what DeepSpeed's ZeRO cannot go with, or goes with nowhere yet.

    Raises:
        ConfigError: names the setting, its value and what to choose.
    """
    asked: list[tuple[str, object, bool, str]] = [
        ("schedule.reduce", schedule.reduce, schedule.reduce == "fast", "fast, or pools.language.backend native"),
        ("pools.language.shard", pool.shard, pool.shard in ("zero1", "zero2", "zero3"), "zero1, zero2 or zero3"),
        ("pools.language.actors", pool.actors, pool.actors > 1, "at least 2: there is nothing to share, or native"),
        ("pools.language.precision", pool.precision, pool.precision == "fp32", "fp32, or native"),
        ("pools.language.offload", pool.offload, pool.offload == "none", "none, or native"),
        ("pools.language.resources.gpu", pool.resources.gpu, not pool.resources.gpu, "0, or native"),
    ]
    for name, value, fits, choose in asked:
        if not fits:
            raise ConfigError(f"pools.language.backend is deepspeed and {name} is {value}; choose {choose}")


def refuse_unbuilt(pools: Pools, schedule: Schedule, placement: str) -> None:
    """Refuse, by name and when the recipe loads, what later versions bring.

    Raises:
        ConfigError: names the setting, its value and what to choose.
    """
    if placement == "colocate":
        check_colocated(pools)
    later: list[tuple[str, object, object]] = []
    for name in ("vision", "audio", "speech", "language"):
        pool: PoolConfig = getattr(pools, name)
        check_sharded(name, pool, schedule)
        if pool.recompute == "selective" and name != "language":
            raise ConfigError(f"pools.{name}.recompute is selective, which the language pool alone has; choose full")
    if pools.speech.precision != "fp32":
        raise ConfigError(
            f"pools.speech.precision is {pools.speech.precision}, yet the codec's ids are made in fp32; choose fp32"
        )
    language = pools.language
    later += [(f"pools.language.{axis}", getattr(language, axis), 1) for axis in ("cp", "pp", "ep")]
    for name, value, built in later:
        if value != built:
            raise ConfigError(f"{name} is {value}, which is not built yet in this version; choose {built}")
    if pools.speech.actors < 1:
        raise ConfigError("pools.speech.actors must be at least 1")


def refuse_gpus(where: str, resources: Resources) -> None:
    """Replicas compute on the CPU so far; one that held a GPU without using it would be a silent loss.

    Raises:
        ConfigError: names the setting, its value and what to choose.
    """
    if resources.gpu:
        raise ConfigError(
            f"{where}.resources.gpu is {resources.gpu:g}, which is not built yet in this version: replicas compute "
            "on the CPU; choose 0, and resources.custom to place them"
        )


def check_colocated(pools: Pools) -> None:
    """Colocated encoders stand on every device of the language replicas (report: world = dp x inner_dp).

    Raises:
        ConfigError: names the sizes and the rule.
    """
    vision, audio, language = pools.vision.actors, pools.audio.actors, pools.language.actors
    if vision != audio or vision % language:
        raise ConfigError(
            f"placement is colocate with vision {vision}, audio {audio} and language {language} actors; encoders stand "
            f"on every device of the language replicas: set pools.vision.actors and pools.audio.actors to one multiple "
            f"of {language}"
        )
    if pools.speech.actors > vision:
        raise ConfigError(f"placement is colocate with {pools.speech.actors} speech actors on {vision} devices")
