"""Overlap: the pipelined step over the barrier step, each at its own best pool sizes, and over equal pools.

Loads of the report's Table 2, slept on 32 simulated devices; and real mathematics: the tiny recipe with one actor a
pool on this machine's cores.
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
from pipelines.bench.slept_pools import SleptCluster, best_layout
from pipelines.bench.table2 import MICRO_BATCHES, draw_loads, separate
from pipelines.bench.text_parity import DEVICES, SCALE
from pipelines.bench.writer import BenchReport, Figure, environment, measured
from pipelines.training.data_root import data_root
from pipelines.training.step import StepDriver

WARM_STEPS = 3
STEPS_A_RUN = 8


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """Steps per second, all of the same work a language replica; slept loads, then real mathematics.

    Args:
        quick: Fewer alternations (the same steps, sizes and kinds).  seed: Draws other loads and samples.
    """
    with local_or_joined():
        slept, facts = slept_figures(seed, 2 if quick else 5)
        real = real_figures(seed, 5 if quick else 9)
    return BenchReport(
        bench="overlap", environment=environment(seed=seed, quick=quick, **facts), figures=(*slept, *real)
    )


def slept_figures(seed: int, repeats: int) -> tuple[list[Figure], dict[str, Any]]:
    """The three plans in turn on the same devices; their rates are micro-batches per second."""
    layouts = {
        "pipelined": best_layout(DEVICES, "pipelined", seed, SCALE),
        "barrier": best_layout(DEVICES, "barrier", seed, SCALE),
        "equal": separate(DEVICES, DEVICES // 2),
    }
    rates: dict[str, list[float]] = {name: [] for name in layouts}
    busy = 0.0
    cluster = SleptCluster(max(layout.language + 2 * layout.encoders for layout in layouts.values()), SCALE)
    try:
        for turn in range(repeats):
            for name in list(layouts) if turn % 2 == 0 else list(reversed(layouts)):
                layout = layouts[name]
                loads = draw_loads(seed + 1000 * turn, MICRO_BATCHES * layout.language)
                found = cluster.run(layout, "pipelined" if name == "pipelined" else "barrier", loads)
                rates[name].append(found.rate)
                busy = max(busy, found.device_busy)
    finally:
        cluster.close()
    facts = {
        "devices": DEVICES,
        "seconds_per_tflop": SCALE,
        "largest_device_busy": busy,
        "encoder_devices": {name: layout.encoders for name, layout in layouts.items()},
    }
    over = {name: [p / b for p, b in zip(rates["pipelined"], rates[name], strict=True)] for name in layouts}
    return [
        measured("pipelined_over_barrier", over["barrier"], unit="ratio", better="higher", goal=1.2, against=_BEST),
        measured("over_equal_pools_barrier", over["equal"], unit="ratio", better="higher", goal=1.75, against=_EQUAL),
        *(measured(f"{n}_micro_batches_per_s", r, unit="1/s", better="higher") for n, r in rates.items()),
    ], facts


_BEST = "barrier; each at its own best split of 32 simulated devices; slept loads of Table 2, equal work a replica"
_EQUAL = "barrier with 16 encoder and 16 language devices; the same 32 devices"


def real_figures(seed: int, rounds: int) -> list[Figure]:
    """Both schedules on the stage that holds every modality, real mathematics."""
    recipe = media_stage(load_recipe("tiny", [f"seed={seed}"]))
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
    against = "barrier; tiny recipe, real mathematics, one actor a pool"
    return [
        measured("pipelined_over_barrier_real", ratios, unit="ratio", better="higher", against=against),
        measured("pipelined_steps_per_s_real", rates["pipelined"], unit="steps/s", better="higher"),
        measured("barrier_steps_per_s_real", rates["barrier"], unit="steps/s", better="higher"),
    ]


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
