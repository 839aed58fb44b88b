"""What every Ray Train worker runs: one stage, with checkpoints that any number of workers can go on from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch

from omni_ray.config.speech_training import SpeechRecipe, SpeechStage
from omni_ray.models.codec import Codec
from omni_ray.observability.metrics import MetricsWriter
from pipelines.components.speech.group import TorchGroup
from pipelines.components.speech.loop import PhaseState
from pipelines.components.speech.material import load_material
from pipelines.components.speech.stages import StageRun, new_codec, run_stage, stage_state
from pipelines.components.speech.state_file import load_state, save_state

STATE = "state.safetensors"
FAIL_AT = "fail_at"
"""Key of a test's settings: (phase, step) at which a worker of the first attempt ends."""


def train_worker(settings: dict[str, Any]) -> None:
    """Entry point; ``settings``: recipe, stage, material, start (folder or None), metrics (folder)."""
    torch.set_num_threads(1)
    recipe = SpeechRecipe.model_validate(settings["recipe"])
    stage: SpeechStage = settings["stage"]
    clips, _ = load_material(Path(settings["material"]))
    codec = Codec.from_pretrained(settings["start"]) if settings["start"] else new_codec(recipe)
    run = StageRun(stage=stage, recipe=recipe, codec=codec, clips=clips, group=TorchGroup())
    resume = read_state()
    if resume is not None and resume.get("done"):
        return
    keeper = Keeper(run, Path(settings["metrics"]), resume, settings.get(FAIL_AT))
    left = run_stage(run, resume, keeper.keep)
    keeper.close()
    done = {"codec": codec.state_dict(), "left": {name: module.state_dict() for name, module in left.items()}}
    report({"stage": stage, "done": 1}, lambda: {"done": True, **done}, run.group.rank)


def read_state() -> dict[str, Any] | None:
    """The checkpoint to go on from, where there is one."""
    found = ray.train.get_checkpoint()
    if found is None:
        return None
    with found.as_directory() as folder:
        state: dict[str, Any] = load_state(Path(folder) / STATE)
    return state


def report(metrics: dict[str, Any], make: Callable[[], dict[str, Any]], rank: int) -> None:
    """Hand metrics to Ray Train, and the first worker's checkpoint; all workers must call it at the same step."""
    if rank:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / STATE, make())
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


class Keeper:
    """Writes the steps' metrics, and checkpoints every so many steps and at the end of every phase."""

    def __init__(self, run: StageRun, folder: Path, resume: dict[str, Any] | None, fail_at: Any) -> None:
        self.run, self.fail_at = run, tuple(fail_at) if fail_at and resume is None else None
        self.before: dict[str, int] = {}
        total = 0
        for name, phase in run.recipe.phases(run.stage).items():
            self.before[name] = total
            total += phase.steps
        done = self.before[resume["phase"]] + resume["step"] if resume else 0
        self.writer = MetricsWriter(folder, first_step=done) if run.group.rank == 0 else None

    def keep(self, phase: str, state: PhaseState, make: Callable[[], dict[str, Any]]) -> None:
        """After every step."""
        step = self.before[phase] + state.step
        if self.writer is not None:
            self.writer.write(step - 1, state.told, phase=phase, stage=self.run.stage)
        if self.fail_at == (phase, state.step) and self.run.group.rank == self.run.group.size - 1:
            raise RuntimeError(f"a worker ends after step {state.step} of {phase}, as it was asked to")
        if (
            state.step % self.run.recipe.checkpoint_every == 0
            or state.step == self.run.recipe.phases(self.run.stage)[phase].steps
        ):
            report({"step": step, **state.told}, lambda: stage_state(phase, state, make()), self.run.group.rank)

    def close(self) -> None:
        """The stage is over."""
        if self.writer is not None:
            self.writer.close()
