"""Balance: items of the report's Table 2 over 16 encoder ranks, and what planning costs."""

from __future__ import annotations

import time

from omni_ray.balance.dispatch import assign
from omni_ray.balance.step_plan import PoolRanks
from omni_ray.types.modality import Modality
from pipelines.bench.table2 import LANGUAGE_PASSES, MICRO_BATCHES, draw_loads, plan_of
from pipelines.bench.text_parity import SCALE
from pipelines.bench.writer import BenchReport, environment, measured

ENCODERS = 16
REPLICAS = 16


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """Largest over mean encoder load, the least that could be, and planning time over the slept step's.

    Args:
        quick: Fewer draws.  seed: Draws other items.
    """
    worst, bound, few, planning = [], [], [], []
    for turn in range(9 if quick else 25):
        loads = draw_loads(seed + 1000 * turn, MICRO_BATCHES * REPLICAS)
        ranks = PoolRanks(vision=ENCODERS, audio=ENCODERS, language=REPLICAS)
        started = time.perf_counter()
        plan, language = plan_of(loads, ranks, turn)
        seconds = time.perf_counter() - started
        planning.append(seconds / (sum(language) / REPLICAS * LANGUAGE_PASSES * SCALE))
        costs = [item.cost for item in plan.items if item.modality == Modality.VISION]
        worst.append(max_over_mean(costs, [i.encoder_rank for i in plan.items if i.modality == Modality.VISION]))
        bound.append(max(1.0, max(costs) * ENCODERS / sum(costs)))
        least = costs[:64]
        few.append(max_over_mean(least, assign(least, ENCODERS)) / max(1.0, max(least) * ENCODERS / sum(least)))
    return BenchReport(
        bench="balance",
        environment=environment(seed=seed, quick=quick, encoder_ranks=ENCODERS, micro_batches=MICRO_BATCHES * REPLICAS),
        figures=(
            measured("max_over_mean", worst, unit="ratio", better="lower", goal=1.05, against=_STEP),
            measured(
                "lower_bound", bound, unit="ratio", better="lower", against="largest item over the mean load, or 1"
            ),
            measured(
                "max_over_bound_64_items", few, unit="ratio", better="lower", against="64 items, over their bound"
            ),
            measured("planning_fraction", planning, unit="fraction", better="lower", goal=0.02, against=_PLAN),
        ),
    )


_STEP = "vision items of one step of 16 language replicas over 16 encoder ranks, Table 2"
_PLAN = "planning over the language time of the slept step (10 s; a real step of that load takes longer)"


def max_over_mean(costs: list[float], ranks: list[int]) -> float:
    """Largest rank's load over the mean."""
    load = [0.0] * ENCODERS
    for cost, rank in zip(costs, ranks, strict=True):
        load[rank] += cost
    return max(load) * ENCODERS / sum(load)
