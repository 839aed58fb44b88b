"""Overlap: the pipelined step over the barrier step, on real training of the tiny recipe, same run, alternating.

First form: real mathematics on this machine's cores, one actor a pool.  The slept loads of the report's Table 2, each
schedule at its own best pool sizes, come with the decoupled-training work.
"""

from __future__ import annotations

import time
from typing import Any

import ray

from actors.cluster import local_or_joined
from actors.feeder import Feeder
from actors.placement import POOL_NAMES
from actors.pool import Pool, start_pools
from omni_ray.config.load import load_recipe
from omni_ray.config.parallel import Schedule
from omni_ray.config.recipe import Recipe
from pipelines.bench.writer import BenchReport, environment, measured
from pipelines.training.data_root import data_root
from pipelines.training.step import StepDriver

WARM_STEPS = 3
STEPS_A_RUN = 8


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """Steps per second of both schedules on the stage that holds every modality.

    Args:
        quick: Fewer alternations (the same steps, sizes and kinds).  seed: Draws another order of samples.
    """
    recipe = media_stage(load_recipe("tiny", [f"seed={seed}"]))
    rounds = 5 if quick else 9
    with local_or_joined():
        root = data_root(recipe)
        feeder: Any = ray.remote(Feeder).options(num_cpus=0.1).remote(recipe, root, 0)
        pools = start_pools(recipe, POOL_NAMES)
        try:
            rates = _alternate(recipe, pools, feeder, rounds)
        finally:
            for pool in pools.values():
                pool.stop()
            ray.kill(feeder)
    ratios = [p / b for p, b in zip(rates["pipelined"], rates["barrier"], strict=True)]
    return BenchReport(
        bench="overlap",
        environment=environment(seed=seed, form="first: real mathematics, tiny recipe, one actor a pool"),
        figures=(
            measured(
                "pipelined_over_barrier",
                ratios,
                unit="ratio",
                better="higher",
                against="barrier; tiny recipe, real mathematics, one actor a pool; the goal is for slept loads",
            ),
            measured("pipelined_steps_per_s", rates["pipelined"], unit="steps/s", better="higher"),
            measured("barrier_steps_per_s", rates["barrier"], unit="steps/s", better="higher"),
        ),
    )


def media_stage(recipe: Recipe) -> Recipe:
    """The recipe cut down to its stage with the most sources, long enough for the bench."""
    stage = max(recipe.stages, key=lambda s: len(s.mixture.sources))
    return recipe.model_copy(update={"stages": (stage.model_copy(update={"steps": 400}),)})


def _alternate(recipe: Recipe, pools: dict[str, Pool], feeder: Any, rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {"pipelined": [], "barrier": []}
    drivers = {}
    for kind in rates:
        schedule = Schedule(**{**recipe.schedule.model_dump(), "kind": kind})
        drivers[kind] = StepDriver(recipe.model_copy(update={"schedule": schedule}), pools, feeder)
        drivers[kind].enter_stage(0)
    step = 0
    for _ in range(WARM_STEPS):
        step = _run_step(drivers["barrier"], feeder, step)
    for turn in range(rounds):
        for kind in ("pipelined", "barrier") if turn % 2 == 0 else ("barrier", "pipelined"):
            plans = [ray.get(feeder.plan.remote(step + k))[0] for k in range(STEPS_A_RUN)]  # data is not what is timed
            started = time.perf_counter()
            for plan in plans:
                drivers[kind].collect(drivers[kind].submit(plan))
            rates[kind].append(STEPS_A_RUN / (time.perf_counter() - started))
            step += STEPS_A_RUN
    return rates


def _run_step(driver: StepDriver, feeder: Any, step: int) -> int:
    plan, _ = ray.get(feeder.plan.remote(step))
    driver.collect(driver.submit(plan))
    return step + 1
