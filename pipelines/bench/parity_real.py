"""Text parity with real mathematics: language on one core, encoders on the other, rows with and without media."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import ray

from actors.feeder import Feeder
from actors.placement import POOL_NAMES
from actors.pool import Pool, start_pools
from actors.transport import pack
from omni_ray.config.load import check_recipe, load_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.training.prepare import PreparedStep, StepBuilder
from omni_ray.types.batch import StepPlan
from omni_ray.types.errors import OmniError
from pipelines.training.data_root import data_root
from pipelines.training.step import StepDriver

ENCODER_SHARE = 0.026
"""Encoder work over language work at the report's loads (Table 2: 93.1 / 3531.3 TFLOP)."""
STEPS_A_RUN = 4
PICTURES = 4


class PreparedFeeder(Feeder):
    """A feeder whose steps are prepared before they are timed, with their media or with the same rows alone."""

    def prepare(self, recipe: Recipe, step: int, media: bool) -> StepPlan:
        """Prepare a step and give its plan."""
        prepared = StepBuilder(recipe, self.root).build(step)
        plan = prepared.plan if media else dataclasses.replace(prepared.plan, items=())
        self._ready[step] = PreparedStep(
            plan=plan,
            batches=[pack(batch) for batch in prepared.batches],  # type: ignore[arg-type]  # as the feeder keeps them
            media=prepared.media if media else {},
            targets=prepared.targets if media else frozenset(),
            bad=(),
        )
        return plan


def parity_recipe(seed: int, texts: int) -> Recipe:
    """One stage of text and a few pictures, in which language and vision train."""
    raw = load_recipe("tiny", [f"seed={seed}", "pools.spares=0"]).model_dump(mode="json")
    stage = {
        "name": "parity",
        "steps": 1000,
        "mixture": {"text": texts, "picture": PICTURES},
        "trainable": ["language", "vision", "vision_projector"],
        "micro_batches": PICTURES,
        "seq_len": 1024,
    }
    return check_recipe(raw | {"stages": [stage]})


def separate_real(seed: int, repeats: int) -> tuple[list[float], float]:
    """Throughput with media over without, by run; and the encoder work over the language work that was measured.

    Raises:
        OmniError: the machine has a single core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise OmniError("text-parity needs two cores, one for the language pool and one for the encoders")
    recipe = parity_recipe(seed, 100)
    feeder: Any = ray.remote(PreparedFeeder).options(num_cpus=0.1).remote(recipe, data_root(recipe), 0)
    pools = start_pools(recipe, POOL_NAMES)
    try:
        for name, pool in pools.items():
            core = cores[0] if name == "language" else cores[1]
            ray.get([_pin(actor, core) for actor in pool.actors])
        bench = _Bench(recipe, pools, feeder)
        bench.run(media=True)  # warm
        # As much text as makes the encoders' work the report's share of the language model's.
        share = bench.measured_share()
        bench.recipe = parity_recipe(seed, max(8, round((100 + PICTURES) * share / ENCODER_SHARE) - PICTURES))
        bench.run(media=True)
        share = bench.measured_share()
        ratios = []
        for turn in range(repeats):
            order = (True, False) if turn % 2 else (False, True)
            seconds = {media: bench.run(media) for media in order}
            ratios.append(seconds[False] / seconds[True])
        return ratios, share
    finally:
        for pool in pools.values():
            pool.stop()
        ray.kill(feeder)


class _Bench:
    """Runs of a few steps; the same step numbers, so the same rows, with and without media."""

    def __init__(self, recipe: Recipe, pools: dict[str, Pool], feeder: Any) -> None:
        self.recipe, self.pools, self.feeder = recipe, pools, feeder
        self.driver = StepDriver(recipe, pools, feeder)
        self.driver.enter_stage(0)

    def run(self, media: bool) -> float:
        """Seconds of a run, two steps in flight as in training."""
        plans = ray.get([self.feeder.prepare.remote(self.recipe, step, media) for step in range(STEPS_A_RUN)])
        started = time.perf_counter()
        flying = []
        for plan in plans:
            flying.append(self.driver.submit(plan))
            if len(flying) > 1:
                self.driver.collect(flying.pop(0))
        for handles in flying:
            self.driver.collect(handles)
        return time.perf_counter() - started

    def measured_share(self) -> float:
        """Encoder seconds over language seconds of one more run."""
        before = self._busy_s()
        self.run(media=True)
        after = self._busy_s()
        return (after["vision"] - before["vision"]) / (after["language"] - before["language"])

    def _busy_s(self) -> dict[str, float]:
        out = {}
        for name in ("language", "vision"):
            _, totals = ray.get(self.pools[name].actors[0].spans.remote())
            work = ("language", "encode", "encoder_backward")
            out[name] = sum(total.seconds for key, total in totals.items() if key in work)
        return out


def _pin(actor: Any, core: int) -> Any:
    return actor.__ray_call__.remote(lambda _, chosen: os.sched_setaffinity(0, {chosen}), core)
