"""Who waits for data while the tiny recipe trains, and how full packed sequences are."""

from __future__ import annotations

import time
from typing import Any

import ray

from actors.feeder import Feeder
from actors.placement import POOL_NAMES
from actors.pool import start_pools
from omni_ray.config.curriculum import Stage
from omni_ray.config.load import load_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.training.prepare import StepBuilder
from pipelines.bench.overlap import media_stage
from pipelines.bench.writer import Figure, measured
from pipelines.training.data_root import data_root
from pipelines.training.step import StepDriver, StepHandles

WARM_STEPS, STEPS_A_RUN = 12, 24
PACKED_STEPS, PACKED_ROWS = 60, 1024


def starved_fraction(seed: int, quick: bool) -> Figure:
    """Share of the time in which the language pool has nothing to do because the next step's data is not there.

    The tiny recipe's stage with every modality trains two steps deep, as a run does. A wait counts from the moment
    at which the plan was asked for and the language pool had finished what it was given, to the plan's arrival.
    """
    recipe = media_stage(load_recipe("tiny", [f"seed={seed}"]))
    root = data_root(recipe)
    feeder: Any = ray.remote(Feeder).options(num_cpus=0.1).remote(recipe, root, 0)
    pools = start_pools(recipe, POOL_NAMES)
    try:
        driver = StepDriver(recipe, pools, feeder)
        driver.enter_stage(0)
        clock = _Clock(driver, feeder)
        clock.steps(WARM_STEPS)
        runs = [clock.steps(STEPS_A_RUN) for _ in range(5)]
    finally:
        for pool in pools.values():
            pool.stop()
        ray.kill(feeder)
    return measured(
        "starved_fraction",
        runs,
        unit="fraction",
        better="lower",
        goal=0.01,
        against="time of the steps; tiny recipe, the stage with every modality, one actor a pool",
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
            starved += self._wait_for_plan()
            plan, _ = ray.get(self.next_plan)
            self.step += 1
            self.next_plan = self.feeder.plan.remote(self.step)
            submitted = self.driver.submit(plan)
            if self.flying is not None:
                self.driver.collect(self.flying)
            self.flying = submitted
        return starved / (time.perf_counter() - started)

    def _wait_for_plan(self) -> float:
        """Seconds in which neither the plan nor the language pool's last answer was outstanding but the plan was."""
        busy = list(self.flying.statistics) if self.flying is not None else []
        while busy:
            ready, busy = ray.wait([self.next_plan, *busy], num_returns=1)
            if self.next_plan in ready:
                return 0.0
            busy = [ref for ref in busy if ref != self.next_plan]
        idle_since = time.perf_counter()
        ray.wait([self.next_plan], num_returns=1)
        return time.perf_counter() - idle_since


def packing_fill(seed: int) -> Figure:
    """Rows of samples over rows of packed sequences, best-fit packing of the tiny recipe's mixture."""
    recipe = packed_stage(load_recipe("tiny", [f"seed={seed}"]))
    builder = StepBuilder(recipe, data_root(recipe))
    budget = recipe.stages[0].sequence_rows
    plans = [builder.build(step).plan for step in range(PACKED_STEPS)]
    rows = [sum(batch.lengths) for plan in plans for batch in plan.micro_batches]
    parts = [sum(rows[i::5]) / (len(rows[i::5]) * budget) for i in range(5)]
    against = f"best-fit packing of the tiny recipe's last stage into sequences of {budget} rows"
    return measured("packing_fill", parts, unit="fraction", better="higher", goal=0.97, against=against)


def packed_stage(recipe: Recipe) -> Recipe:
    """The recipe cut down to its last stage, packed into sequences of :data:`PACKED_ROWS`."""
    settings = recipe.stages[-1].model_dump() | {"packing": {"kind": "best_fit", "budget": PACKED_ROWS}, "steps": 400}
    packed = Stage.model_validate(settings)
    return recipe.model_copy(update={"stages": (packed,)})
