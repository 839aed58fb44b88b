"""Train the codec's stages on Ray Train: one TorchTrainer a stage, the next from what the one before it left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omni_ray.config.speech_training import STAGES, SpeechRecipe, SpeechStage
from omni_ray.models.codec import Codec
from omni_ray.types.errors import CheckpointError, ConfigError, OmniError
from pipelines.components.speech.group import Alone, own_parts
from pipelines.components.speech.material import gather_material, load_material, save_material
from pipelines.components.speech.run_report import phase_losses, write_report, write_samples
from pipelines.components.speech.semantic import KMEANS_PARTS
from pipelines.components.speech.state_file import load_state, save_state

RECIPE, MATERIAL, REPORT = "recipe.json", "material.safetensors", "report.json"
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechRun:
    """What was asked for."""

    recipe: SpeechRecipe
    out: Path
    """Folder of the run, absolute; shared storage where workers stand on several machines."""
    stages: tuple[SpeechStage, ...]
    workers: int
    start: Path | None = None
    """Codec to begin with, where ``out`` holds no earlier stage."""
    resume: bool = False
    real_data: Path | None = None


def train_speech(run: SpeechRun, log: Log, *, fail_at: tuple[str, int] | None = None) -> dict[str, Any]:
    """Train the stages in order.

    Args:
        fail_at: A test's: the last worker ends once after this step of this phase.
    Returns:
        ``{"out", "stages": {stage: report}}``.
    Raises:
        ConfigError: workers do not divide the parts; a folder that is in use by other settings.
        CheckpointError: there is no codec to begin with.
        OmniError: a stage failed more often than ``max_failures``.
    """
    check_workers(run)
    prepare_folder(run, log)
    reports = {}
    for stage in run.stages:
        folder = run.out / stage
        if not (folder / REPORT).is_file():
            _train_stage(run, stage, log, fail_at)
        else:
            log(f"stage {stage}: done before, kept")
        reports[stage] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return {"out": str(run.out), "stages": reports}


def check_workers(run: SpeechRun) -> None:
    """Refuse before anything starts what the loop would refuse after half a minute."""
    group = Alone()
    group.size = run.workers
    for stage in run.stages:
        for phase in run.recipe.phases(stage).values():
            own_parts(phase.parts, group)
        if stage == "kmeans":
            own_parts(KMEANS_PARTS, group)


def prepare_folder(run: SpeechRun, log: Log) -> None:
    """Recipe and material of the run; a folder with a run in it is gone on with only where that was asked for."""
    kept = run.out / RECIPE
    # How often work is saved and shown may change on the way; what is computed may not.
    free = {"checkpoint_every", "max_failures", "samples"}
    asked = run.recipe.model_dump(mode="json", exclude=free) | {"real_data": run.real_data is not None}
    if kept.is_file():
        if not run.resume:
            raise ConfigError(f"{run.out} holds a run; go on with --resume, or choose another --out")
        if _as_now(json.loads(kept.read_text(encoding="utf-8")), free) != asked:
            raise ConfigError(f"{run.out} holds a run of another recipe or other data; choose another --out")
    run.out.mkdir(parents=True, exist_ok=True)
    if not (run.out / MATERIAL).is_file():
        log("gathering speech")
        train, held_out = gather_material(run.recipe.data, run.real_data, seed=run.recipe.seed, log=log)
        save_material(run.out / MATERIAL, train, held_out)
        log(f"{len(train)} clips, {sum(len(c.input_S) for c in train) / 16000 / 60:.1f} minutes; {len(held_out)} kept")
    kept.write_text(json.dumps(asked, indent=1), encoding="utf-8")


def _as_now(kept: dict[str, Any], free: set[str]) -> dict[str, Any]:
    """A recipe that an earlier version kept, with what has come in since at its defaults."""
    real_data = kept.pop("real_data", None)
    return SpeechRecipe.model_validate(kept).model_dump(mode="json", exclude=free) | {"real_data": real_data}


def start_folder(run: SpeechRun, stage: SpeechStage) -> Path | None:
    """The codec that a stage begins with: the newest earlier stage's, else ``start``; None for the first ones.

    Raises:
        CheckpointError: a stage that needs an earlier one has none.
    """
    for earlier in reversed(STAGES[: STAGES.index(stage)]):
        if (run.out / earlier / REPORT).is_file():
            return run.out / earlier
    if run.start is not None or stage in ("semantic-pretrain", "semantic-ctc"):
        return run.start
    raise CheckpointError(
        f"stage {stage} needs a codec to begin with; train an earlier stage into {run.out}, or name one with --from"
    )


def _train_stage(run: SpeechRun, stage: SpeechStage, log: Log, fail_at: tuple[str, int] | None) -> None:
    start = start_folder(run, stage)
    log(f"stage {stage}: {run.workers} workers, from {start or 'nothing'}")
    state = _fit(run, stage, start, fail_at)
    folder = run.out / stage
    codec = Codec.from_pretrained(start) if start else _built(run)
    codec.load_state_dict(state["codec"])
    codec.eval().save_pretrained(folder, dtype=torch.float32)
    for name, values in state["left"].items():
        save_state(folder / f"{name}.safetensors", values)
    _, held_out = load_material(run.out / MATERIAL)
    every = max(1, len(held_out) // max(1, run.recipe.samples))
    # The semantic stages leave no decoder worth hearing.
    shown = held_out[::every][: run.recipe.samples] if stage in ("1", "2", "3") else []
    document = {
        "stage": stage,
        "workers": run.workers,
        "from": str(start) if start else None,
        "losses": phase_losses(folder),
        "samples": write_samples(codec, shown, folder / "samples"),
        "leaves": ["codec", *state["left"]],
    }
    write_report(folder, document)
    log(f"stage {stage}: {folder / 'index.html'}")


def _built(run: SpeechRun) -> Codec:
    from pipelines.components.speech.stages import new_codec

    return new_codec(run.recipe)


def _fit(run: SpeechRun, stage: SpeechStage, start: Path | None, fail_at: tuple[str, int] | None) -> dict[str, Any]:
    """One TorchTrainer; the same name and storage, so that Ray Train itself goes on from the last checkpoint."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from actors.cluster import RaySession
    from pipelines.components.speech.worker import STATE, train_worker

    storage = run.out / "ray"
    if not run.resume:
        shutil.rmtree(storage / stage, ignore_errors=True)
    with RaySession(num_cpus=max(run.workers + 1, os.cpu_count() or 1)):
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=_settings(run, stage, start, fail_at),
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=run.workers, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                name=stage,
                storage_path=str(storage),
                failure_config=ray.train.FailureConfig(max_failures=run.recipe.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as problem:
            raise OmniError(f"stage {stage} failed: {_last_line(problem)}") from problem
        if result.checkpoint is None:
            raise OmniError(f"stage {stage} ended without a checkpoint; its storage is {storage}")
        with result.checkpoint.as_directory() as folder:
            state: dict[str, Any] = load_state(Path(folder) / STATE)
    return state


def _settings(
    run: SpeechRun, stage: SpeechStage, start: Path | None, fail_at: tuple[str, int] | None
) -> dict[str, Any]:
    """What every worker is told."""
    return {
        "recipe": run.recipe.model_dump(mode="json"),
        "stage": stage,
        "start": str(start) if start else None,
        "material": str(run.out / MATERIAL),
        "metrics": str(run.out / stage),
        "fail_at": fail_at,
    }


def _last_line(problem: BaseException) -> str:
    """The worker's own sentence out of Ray's wrapping."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    told = [line for line in lines if "Error: " in line or "Error(" in line]
    return (told or lines or [type(problem).__name__])[-1]


def stages_named(word: str) -> tuple[SpeechStage, ...]:
    """``all``, or one stage.

    Raises:
        ConfigError: no stage is called so.
    """
    if word == "all":
        return STAGES
    for stage in STAGES:
        if word == stage:
            return (stage,)
    raise ConfigError(f"there is no stage {word!r}; choose one of all, {', '.join(STAGES)}")


def summary(document: dict[str, Any], stages: Sequence[str]) -> str:
    """A table of losses for people."""
    lines = []
    for stage in stages:
        for row in document["stages"][stage]["losses"]:
            lines.append(f"stage {stage} {row['phase']}: loss {row['first']['loss']:.4g} -> {row['last']['loss']:.4g}")
    return "\n".join([*lines, f"codec of each stage, samples and page: {document['out']}/STAGE"])
