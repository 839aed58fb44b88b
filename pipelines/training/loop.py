"""A training run: stages in order, steps two deep, snapshots, checkpoints, recovery, stop signals, metrics."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.cluster import local_or_joined
from actors.feeder import Feeder
from actors.pool import START_TIMEOUT_S
from actors.pool_actor import PoolActor
from actors.supervisor import Named, Supervisor, is_alive
from omni_ray.checkpoint import store
from omni_ray.config.load import save_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.data.bad_samples import BadSamples
from omni_ray.data.order_state import OrderState
from omni_ray.observability.events import emit
from omni_ray.observability.metrics import MetricsWriter
from omni_ray.observability.progress import Progress
from omni_ray.training.gap_measure import is_measured
from omni_ray.training.networks import check_widths
from omni_ray.training.prepare import StepBuilder
from omni_ray.training.realised import Realised, rows_of
from omni_ray.types.batch import StepPlan
from omni_ray.types.errors import CheckpointError, ResourceError
from pipelines.training.checkpoint import CheckpointWriter, ResumePoint, lock_run, resume_point
from pipelines.training.data_root import data_root
from pipelines.training.gap_watch import GapWatch
from pipelines.training.onlooker import Onlooker
from pipelines.training.plan_log import PlanLog
from pipelines.training.step import StepDriver, StepHandles, StepResult
from pipelines.training.timeline import usage, write_timeline
from pipelines.training.waiting import StuckError

IN_FLIGHT = 2
"""Steps submitted at a time; the second hides the driver's own time, results do not depend on it."""
MAX_RECOVERIES = 3
"""Recoveries in a row without a step between them; then the fault is not a lost actor's."""
FEEDER: Named = ("feeder", 0)


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
    usage: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Busy, transfer and waiting share of every pool."""
    recoveries: int = 0
    """How often lost actors were replaced."""
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What this call drew: stage -> rows by modality, rows and samples by source."""
    bad_samples: Mapping[str, int] = field(default_factory=dict)
    """Samples that could not be used, by source."""


def train(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    quiet: bool = False,
    timeline: Path | None = None,
    actor: type = PoolActor,
    feeder: type = Feeder,
    onlooker: Onlooker | None = None,
) -> TrainResult:
    """Run a recipe's curriculum.

    Args:
        recipe: The run.  out: Folder for checkpoints, metrics.jsonl, plans.jsonl and tensorboard/.
        resume: Continue from the newest whole checkpoint of ``out``; without one, start.  quiet: No progress line.
        timeline: File for the newest spans of every actor, for Perfetto.
        actor, feeder: Classes of the pools' actors and of the feeder's.
        onlooker: Asks the pools something between two steps.

    Raises:
        CheckpointError: ``out`` holds another run's checkpoints, or another process writes there.
        ConfigError, DataError, ResourceError: as their texts say.
    """
    started = time.monotonic()
    check_widths(recipe)
    root = data_root(recipe)
    with ExitStack() as stack:
        stack.enter_context(lock_run(out))
        point = resume_point(recipe, out, resume)
        if point.step >= recipe.total_steps:
            return _result(out, point.step, recipe, started)
        save_recipe(recipe, out / "recipe.yaml")
        stack.enter_context(local_or_joined())
        stop = stack.enter_context(stop_signals())  # after ray.init, which sets a SIGTERM handler of its own
        run = _Run(recipe, out, root, point, quiet, (actor, feeder))
        stack.callback(run.close)
        if onlooker is not None:
            stack.callback(onlooker.close)
            onlooker.start(recipe, root, run.supervisor.pools)
            run.onlooker = onlooker
        began = time.monotonic()
        done = run.steps(stop)
        found = usage(run.supervisor.pools, time.monotonic() - began)
        if timeline is not None:
            write_timeline(run.supervisor.pools, timeline)
    ended = _result(out, done, recipe, started, found)
    return replace(ended, recoveries=run.recoveries, data=run.realised.report(), bad_samples=run.bad.counts())


def plan(recipe: Recipe, steps: int = 1) -> list[StepPlan]:
    """Plans of the recipe's first steps, as the feeder would make them; in this process, without Ray."""
    builder = StepBuilder(recipe, data_root(recipe))
    return [builder.build(step).plan for step in range(min(steps, recipe.total_steps))]


class _Run:
    """Pools, feeder and writers of one call of :func:`train`."""

    def __init__(
        self, recipe: Recipe, out: Path, root: Path, point: ResumePoint, quiet: bool, classes: tuple[type, type]
    ) -> None:
        self.recipe, self.out, self.root, self.point = recipe, out, root, point
        first = point.step
        actor, self._feeder_class = classes
        emit("train_start", out=str(out), first_step=first, steps=recipe.total_steps)
        self._order: tuple[int, OrderState | None] = (first, point.order)
        self._positions: dict[int, Any] = {}
        self._start_feeder(first, point.order)  # data starts while the pools import torch
        try:
            self.supervisor = Supervisor(recipe, point.checkpoint, actor)
        except BaseException:
            ray.kill(self.feeder)
            raise
        self.driver = StepDriver(recipe, self.supervisor.pools, self.feeder)
        self.checkpoints = CheckpointWriter(recipe, out, self.supervisor.pools, point.guarantees)
        self.gap = GapWatch(recipe, self.supervisor.pools, self.feeder, factors_of(point.order))
        self.metrics = MetricsWriter(out, first_step=first)
        self.plans = PlanLog(out / "plans.jsonl", first)
        self.progress = Progress("train", recipe.total_steps, done=first) if not quiet else None
        self.bad, self.clock = BadSamples(recipe.data.max_bad_fraction), time.monotonic()
        self.realised = Realised()
        self.flying: deque[StepHandles] = deque()
        self.entered, self.ended = -1, first
        self.recoveries, self._in_a_row = 0, 0
        self.onlooker: Onlooker | None = None

    def _start_feeder(self, first: int, order: OrderState | None) -> None:
        feeder: Any = ray.remote(self._feeder_class)
        self.feeder: Any = feeder.options(num_cpus=0.1).remote(self.recipe, self.root, first, order)
        if not is_measured(self.recipe, first):
            self.next_plan: Any = self.feeder.plan.remote(first)

    def steps(self, stop: threading.Event) -> int:
        """Run to the end or to a stop signal; returns the number of steps done, all of them checkpointed.

        Raises:
            ResourceError: actors are lost again and again.
        """
        first = self.ended
        while True:
            try:
                self.supervisor.snapshot(first)
                return self._steps_from(first, stop)
            except (ray.exceptions.RayError, StuckError) as problem:
                first = self._recover(problem)

    def _steps_from(self, first: int, stop: threading.Event) -> int:
        recipe = self.recipe
        for step in range(first, recipe.total_steps):
            index = recipe.stages.index(recipe.stage_at(step)[0])
            if index != self.entered:
                self._drain()
                self.driver.enter_stage(index)
                self.entered = index
            if self.gap.due(step):
                self._settle()
                self.gap.update(step)
                self.next_plan = self.feeder.plan.remote(step)
            if self.onlooker is not None:
                self.onlooker.between(self._settle)
            self.flying.append(self.driver.submit(self._plan(step), partial(self._ask_plan, step + 1)))
            done = step + 1
            last = stop.is_set() or done == recipe.total_steps
            if done % recipe.checkpoint.snapshot_every == 0 and not last:
                self.supervisor.snapshot(done)
                self._positions[done] = self.feeder.position.remote(done)
            if done % recipe.checkpoint.every_steps == 0 and not last:
                self._tolerated(self.checkpoints.begin, done, self.feeder.position.remote(done))
            while len(self.flying) >= IN_FLIGHT:
                self._collect()
            if last:
                self._drain()
                self._tolerated(self.checkpoints.finish)
                self.checkpoints.begin(done, self.feeder.position.remote(done))
                self.checkpoints.finish()
                return done
        return self.ended

    def _tolerated(self, action: Callable[..., None], *args: Any) -> None:
        """A checkpoint that fails while the run goes on is told, not fatal: stopping would lose the work since."""
        try:
            action(*args)
        except CheckpointError as problem:
            emit("checkpoint_failed", problem=str(problem))

    def _recover(self, problem: Exception) -> int:
        """Replace whoever is gone; returns the step to go on from, or raises the problem if nobody is."""
        while True:
            self._in_a_row += 1
            if self._in_a_row > MAX_RECOVERIES:
                raise ResourceError(
                    f"actors were lost {MAX_RECOVERIES} times in a row without a step between; the newest reason: "
                    f"{str(problem).splitlines()[0]}; look at the workers' logs (memory?) and resume with --resume"
                ) from problem
            try:
                return self._recover_once(problem)
            except ray.exceptions.RayError as again:
                if again is problem:
                    raise
                problem = again

    def _recover_once(self, problem: Exception) -> int:
        self.flying.clear()
        self.checkpoints.abandon()
        suspects = problem.ranks if isinstance(problem, StuckError) else ()
        if FEEDER in suspects:
            ray.kill(self.feeder)
        gone = self.supervisor.missing([who for who in suspects if who != FEEDER])
        feeder_lost = FEEDER in suspects or not is_alive(self.feeder, self.recipe.schedule.timeout_s, "forget", 0)
        if not gone and not feeder_lost:
            raise problem
        lost = ", ".join(f"{name} rank {rank}" for name, rank in gone)
        emit("lost", pools=lost, feeder=feeder_lost, reason=str(problem).splitlines()[0])
        kept = self.supervisor.confirmed
        fallback, order = self._fallback()
        step = self.supervisor.recover(gone, fallback, self.ended)
        if step != kept:
            self._order = (step, order)
        self._positions.clear()
        if feeder_lost or step != kept or self.gap.references:  # weights of a measured mixture go back, too
            ray.kill(self.feeder)
            self._start_feeder(*self._order)
            self.driver.feeder = self.gap.feeder = self.feeder
            self.gap.factors = factors_of(self._order[1])
        else:
            self.next_plan = self.feeder.plan.remote(step)
        self.supervisor.keep_spares()
        self.entered, self.ended = -1, step
        self.recoveries += 1
        self.metrics.close()
        self.metrics = MetricsWriter(self.out, first_step=step)
        if self.progress is not None:
            self.progress.rewind(step)
        self.driver.enter_stage(self.recipe.stages.index(self.recipe.stage_at(step)[0]))
        return step

    def _fallback(self) -> tuple[tuple[int, Path | None], OrderState | None]:
        """Where to go back to without snapshots: (step, folder), and the data position there."""
        newest = store.newest(self.out / "checkpoints")
        if newest is None:
            return (self.point.step, self.point.checkpoint), self.point.order
        state = store.read_state(newest)
        return (int(state["step"]), newest), OrderState.from_record(state["order"])

    def close(self) -> None:
        """Stop what this run started."""
        if self.progress is not None:
            self.progress.close()
        self.metrics.close()
        self.plans.close()
        self.supervisor.close()
        ray.kill(self.feeder)

    def _plan(self, step: int) -> Any:
        limit = max(self.recipe.schedule.timeout_s, START_TIMEOUT_S)  # the first plan waits for Ray Data's start
        try:
            plan, bad = ray.get(self.next_plan, timeout=limit)
        except ray.exceptions.GetTimeoutError:
            text = f"step {step}: pool feeder, rank 0, phase plan: no plan came within {limit:g} s"
            raise StuckError(text, [FEEDER]) from None
        if not self.plans.write(plan):
            return plan  # a replay: its bad samples are counted already
        self.realised.add(plan)
        self.bad.add((name for batch in plan.micro_batches for name in batch.samples), bad)
        for sentence in bad:
            emit("bad_sample", step=step, sample=sentence)
        self.bad.check()
        return plan

    def _ask_plan(self, step: int) -> None:
        if step < self.recipe.total_steps and not self.gap.due(step):
            self.next_plan = self.feeder.plan.remote(step)

    def _settle(self) -> None:
        """End the steps in flight and bring weights together that ranks of sharded pools may have let go of."""
        self._drain()
        self.driver.gather()

    def _drain(self) -> None:
        while self.flying:
            self._collect()

    def _collect(self) -> None:
        """Wait for the oldest step, then note what became whole with it."""
        result = self.driver.collect(self.flying[0])
        plan = self.flying.popleft().plan
        self.ended = result.step + 1
        self._in_a_row = 0
        self._report(result, plan)
        before = self.supervisor.confirmed
        self.supervisor.confirm(self.ended)
        confirmed = self.supervisor.confirmed
        if confirmed > before:
            if confirmed in self._positions:
                self._order = (confirmed, ray.get(self._positions.pop(confirmed)))
            self.feeder.forget.remote(confirmed)
            self.plans.forget(confirmed)
        self._tolerated(self.checkpoints.poll, self.ended)
        if confirmed > self.point.step:  # a run that is over in a moment, and the start of any, do without
            self.supervisor.keep_spares()

    def _report(self, result: StepResult, plan: StepPlan) -> None:
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        figures = {f"loss/{term}": value for term, value in result.losses.items()}
        figures |= {
            "norm": result.norm,
            "rows_per_s": result.rows / seconds,
            "experts_per_token": result.experts_per_token,
        }
        figures |= {f"rows/{name}": count for name, count in rows_of(plan).items()}
        figures |= {f"bridge/{hop}_bytes": count for hop, count in result.bytes_by_hop.items()}
        self.metrics.write(result.step, figures, stage=result.stage, stepped=result.stepped, seconds=seconds)
        if not result.stepped:
            emit("step_skipped", step=result.step, norm=result.norm)
        if self.progress is not None:
            shown: dict[str, Any] = {term: value for term, value in result.losses.items() if term != "pad_text"}
            self.progress.advance(stage=result.stage, **shown)


def factors_of(order: OrderState | None) -> dict[str, float]:
    """Measured weights of a data position."""
    return dict(order.factors) if order is not None else {}


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


def _result(
    out: Path,
    step: int,
    recipe: Recipe,
    started: float,
    found: Mapping[str, Mapping[str, float]] | None = None,
) -> TrainResult:
    return TrainResult(
        out=out,
        checkpoint=store.newest(out / "checkpoints"),
        step=step,
        finished=step >= recipe.total_steps,
        seconds=time.monotonic() - started,
        usage=found or {},
    )
