"""A training run: stages in order, steps two deep, checkpoints, stop signals, metrics."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.cluster import local_or_joined
from actors.feeder import Feeder
from actors.placement import POOL_NAMES
from actors.pool import Pool, start_pools
from omni_ray.checkpoint import store
from omni_ray.config.load import save_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.data.bad_samples import BadSamples
from omni_ray.observability.events import emit
from omni_ray.observability.metrics import MetricsWriter
from omni_ray.observability.progress import Progress
from omni_ray.training.data_position import position_record
from omni_ray.training.gap_measure import is_measured
from omni_ray.training.prepare import StepBuilder
from omni_ray.types.batch import StepPlan
from pipelines.training.checkpoint import ResumePoint, lock_run, resume_point, save_checkpoint
from pipelines.training.data_root import data_root
from pipelines.training.gap_watch import GapWatch
from pipelines.training.step import StepDriver, StepHandles, StepResult

IN_FLIGHT = 2
"""Steps submitted at a time; the second hides the driver's own time, results do not depend on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    out: Path
    """The run's folder."""
    checkpoint: Path | None
    """Newest whole checkpoint."""
    step: int
    """Steps done, counted from the recipe's first."""
    finished: bool
    """False when a stop signal ended it early; resume with ``--resume``."""
    seconds: float
    """Wall time of this call."""


def train(recipe: Recipe, out: Path, resume: bool = False, quiet: bool = False) -> TrainResult:
    """Run a recipe's curriculum.

    Args:
        recipe: The run.  out: Folder for checkpoints, metrics.jsonl, plans.jsonl and tensorboard/.
        resume: Continue from the newest whole checkpoint of ``out``; without one, start.  quiet: No progress line.

    Raises:
        CheckpointError: ``out`` holds another run's checkpoints, or another process writes there.
        ConfigError, DataError, ResourceError: as their texts say.
    """
    started = time.monotonic()
    root = data_root(recipe)
    with ExitStack() as stack:
        stack.enter_context(lock_run(out))
        point = resume_point(recipe, out, resume)
        if point.step >= recipe.total_steps:
            return _result(out, point.step, recipe, started)
        save_recipe(recipe, out / "recipe.yaml")
        stack.enter_context(local_or_joined())
        stop = stack.enter_context(stop_signals())  # after ray.init, which sets a SIGTERM handler of its own
        run = _Run(recipe, out, root, point, quiet)
        stack.callback(run.close)
        done = run.steps(stop)
    return _result(out, done, recipe, started)


def plan(recipe: Recipe, steps: int = 1) -> list[StepPlan]:
    """Plans of the recipe's first steps, as the feeder would make them; in this process, without Ray."""
    builder = StepBuilder(recipe, data_root(recipe))
    return [builder.build(step).plan for step in range(min(steps, recipe.total_steps))]


class _Run:
    """Pools, feeder and writers of one call of :func:`train`."""

    def __init__(self, recipe: Recipe, out: Path, root: Path, point: ResumePoint, quiet: bool) -> None:
        first, checkpoint = point.step, point.checkpoint
        self.recipe, self.out, self.first, self.guarantees = recipe, out, first, point.guarantees
        emit("train_start", out=str(out), first_step=first, steps=recipe.total_steps)
        self.pools: dict[str, Pool] = {}
        feeder: Any = ray.remote(Feeder)
        self.feeder: Any = feeder.options(num_cpus=0.1).remote(recipe, root, first, point.order)
        if not is_measured(recipe, first):
            self.next_plan: Any = self.feeder.plan.remote(first)  # data starts while the pools import torch
        self.pools = start_pools(recipe, POOL_NAMES, checkpoint)
        self.driver = StepDriver(recipe, self.pools, self.feeder)
        self.gap = GapWatch(recipe, self.pools, self.feeder, point.order.factors if point.order else {})
        self.metrics = MetricsWriter(out, first_step=first)
        self.plans = (out / "plans.jsonl").open("a", encoding="utf-8")
        self.progress = Progress("train", recipe.total_steps, done=first) if not quiet else None
        self.bad, self.clock = BadSamples(recipe.data.max_bad_fraction), time.monotonic()

    def steps(self, stop: threading.Event) -> int:
        """Run to the end or to a stop signal; returns the number of steps done, all of them checkpointed."""
        recipe, flying = self.recipe, deque[StepHandles]()
        entered = -1
        done = self.first
        for step in range(self.first, recipe.total_steps):
            index = recipe.stages.index(recipe.stage_at(step)[0])
            if index != entered:
                self._drain(flying)
                self.driver.enter_stage(index)
                entered = index
            if self.gap.due(step):
                self._drain(flying)
                self.gap.update(step)
                self.next_plan = self.feeder.plan.remote(step)
            flying.append(self.driver.submit(self._plan(step)))
            while len(flying) >= IN_FLIGHT:
                self._report(self.driver.collect(flying.popleft()))
            done = step + 1
            if stop.is_set() or done % recipe.checkpoint.every_steps == 0 or done == recipe.total_steps:
                self._drain(flying)
                save_checkpoint(recipe, self.out, done, self.pools, self._position(done))
                if stop.is_set():
                    break
        self._drain(flying)
        return done

    def close(self) -> None:
        """Stop what this run started."""
        if self.progress is not None:
            self.progress.close()
        self.metrics.close()
        self.plans.close()
        for pool in self.pools.values():
            pool.stop()
        ray.kill(self.feeder)

    def _plan(self, step: int) -> Any:
        plan, bad = ray.get(self.next_plan)
        if step + 1 < self.recipe.total_steps and not self.gap.due(step + 1):
            self.next_plan = self.feeder.plan.remote(step + 1)
        self.plans.write(plan.to_json() + "\n")
        self.bad.add((name for batch in plan.micro_batches for name in batch.samples), bad)
        for sentence in bad:
            emit("bad_sample", step=step, sample=sentence)
        self.bad.check()
        return plan

    def _position(self, step: int) -> dict[str, Any]:
        return position_record(ray.get(self.feeder.position.remote(step)), self.guarantees)

    def _drain(self, flying: deque[StepHandles]) -> None:
        while flying:
            self._report(self.driver.collect(flying.popleft()))

    def _report(self, result: StepResult) -> None:
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        figures = {f"loss/{term}": value for term, value in result.losses.items()}
        figures |= {
            "norm": result.norm,
            "rows_per_s": result.rows / seconds,
            "experts_per_token": result.experts_per_token,
        }
        self.metrics.write(result.step, figures, stage=result.stage, stepped=result.stepped, seconds=seconds)
        if not result.stepped:
            emit("step_skipped", step=result.step, norm=result.norm)
        if self.progress is not None:
            shown: dict[str, Any] = {term: value for term, value in result.losses.items() if term != "pad_text"}
            self.progress.advance(stage=result.stage, **shown)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; the run then checkpoints and ends. Outside the main thread: never set."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: Any) -> None:
        emit("stop_signal", signal=signal.Signals(number).name)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _result(out: Path, step: int, recipe: Recipe, started: float) -> TrainResult:
    return TrainResult(
        out=out,
        checkpoint=store.newest(out / "checkpoints"),
        step=step,
        finished=step >= recipe.total_steps,
        seconds=time.monotonic() - started,
    )
