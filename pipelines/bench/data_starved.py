"""Who waits for data while the tiny recipe trains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from actors.feeder import Feeder
from actors.placement import POOL_NAMES
from actors.pool import start_pools
from omni_ray.config.load import load_recipe
from omni_ray.types.batch import StepPlan
from pipelines.bench.overlap import media_stage
from pipelines.bench.writer import Figure, measured, negative_control
from pipelines.training.data_root import data_root
from pipelines.training.step import StepDriver, StepHandles

WARM_STEPS, STEPS_A_RUN, RUNS = 12, 24, 5
GOAL = 0.01
SLOW_STEPS, SLOW_TIMES, SLOW_LEAST = 8, 3.0, 0.5
"""The control: a plan that takes three steps' time leaves the language pool idle for two thirds of the time."""


class SlowFeeder(Feeder):
    """A feeder whose plans can be made slow."""

    pause_s = 0.0

    def slow(self, pause_s: float) -> None:
        """From now on every plan takes so much longer."""
        self.pause_s = pause_s

    def plan(self, step: int) -> tuple[StepPlan, tuple[str, ...]]:
        """The plan of a step, late."""
        time.sleep(self.pause_s)
        return super().plan(step)


def starved_figures(seed: int) -> tuple[Figure, Figure]:
    """Share of the time in which the language pool has nothing to do because the next step's data is not there.

    The tiny recipe's stage with every modality trains two steps deep, as a run does. A wait counts from the moment at
    which the language pool had finished what it was given, to the arrival of the next step's plan and of its rows and
    media. The control makes the same feeder slow and must find it starving.
    """
    recipe = media_stage(load_recipe("tiny", [f"seed={seed}"]))
    root = data_root(recipe)
    feeder: Any = ray.remote(SlowFeeder).options(num_cpus=0.1).remote(recipe, root, 0)
    pools = start_pools(recipe, POOL_NAMES)
    try:
        driver = StepDriver(recipe, pools, feeder)
        driver.enter_stage(0)
        clock = _Clock(driver, feeder)
        clock.steps(WARM_STEPS)
        started = time.perf_counter()
        runs = [clock.steps(STEPS_A_RUN) for _ in range(RUNS)]
        step_s = (time.perf_counter() - started) / (RUNS * STEPS_A_RUN)
        ray.get(feeder.slow.remote(SLOW_TIMES * step_s))
        clock.steps(2)
        slow = clock.steps(SLOW_STEPS)
    finally:
        for pool in pools.values():
            pool.stop()
        ray.kill(feeder)
    against = "time of the steps; tiny recipe, the stage with every modality, one actor a pool"
    injected = f"plans that take {SLOW_TIMES:g} steps' time; found starved {slow:.2f} of it, at least {SLOW_LEAST}"
    return (
        measured("starved_fraction", runs, unit="fraction", better="lower", goal=GOAL, against=against),
        negative_control(int(slow >= SLOW_LEAST), injected),
    )


class _Clock:
    def __init__(self, driver: StepDriver, feeder: Any) -> None:
        self.driver, self.feeder = driver, feeder
        self.step = 0
        self.next_plan = feeder.plan.remote(0)
        self.flying: StepHandles | None = None

    def steps(self, count: int) -> float:
        """Run steps; the starved share of their time."""
        started, starved = time.perf_counter(), 0.0
        for _ in range(count):
            starved += self._wait_for([self.next_plan])
            plan, _ = ray.get(self.next_plan)
            submitted = self.driver.submit(plan, self._ask_next)
            starved += self._wait_for(next(call.refs for call in submitted.calls if call.phase == "payloads"))
            if self.flying is not None:
                self.driver.collect(self.flying)
            self.flying = submitted
        return starved / (time.perf_counter() - started)

    def _ask_next(self) -> None:
        self.step += 1
        self.next_plan = self.feeder.plan.remote(self.step)

    def _wait_for(self, data: Sequence[Any]) -> float:
        """Seconds in which none of the language pool's last answers was outstanding, but some of the data was."""
        missing = list(data)
        busy = list(self.flying.statistics) if self.flying is not None else []
        while busy and missing:
            done, _ = ray.wait([*missing, *busy], num_returns=1, fetch_local=False)
            missing = [ref for ref in missing if ref not in done]
            busy = [ref for ref in busy if ref not in done]
        idle_since = time.perf_counter()
        if missing:
            ray.wait(missing, num_returns=len(missing), fetch_local=False)
        return time.perf_counter() - idle_since
