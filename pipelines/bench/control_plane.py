"""Control plane: what driver, calls and object store cost a step of 16 actors with stages of 50 ms."""

from __future__ import annotations

from actors.cluster import local_or_joined
from omni_ray.schedule.replay import replay
from pipelines.bench.slept_pools import WINDOW, SleptCluster
from pipelines.bench.table2 import Layout, Load, plan_of, tasks_of
from pipelines.bench.writer import BenchReport, environment, measured

STAGE_S = 0.050
ENCODERS, LANGUAGE = 6, 4
MICRO_BATCHES = 16
STEPS_A_RUN = 4


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """Measured step, two in flight as in training, over the step in which calls cost nothing, minus one.

    Args:
        quick: Fewer runs.  seed: Noted; every stage is alike, so there is nothing to draw.
    """
    layout = Layout(devices=16, encoders=ENCODERS, language=LANGUAGE, apart=True, passes=(1.0, 1.0))
    count = LANGUAGE * MICRO_BATCHES
    loads = [Load(language=STAGE_S, vision=(STAGE_S,), audio=STAGE_S) for _ in range(count)]
    figures = []
    with local_or_joined(num_cpus=8):
        cluster = SleptCluster(2 * ENCODERS + LANGUAGE, scale=1.0)
        try:
            figures = [_one(cluster, layout, loads, kind, 3 if quick else 7) for kind in ("pipelined", "barrier")]
        finally:
            cluster.close()
    overheads, calls = figures[0]
    return BenchReport(
        bench="control-plane",
        environment=environment(seed=seed, quick=quick, actors=16, stage_s=STAGE_S, calls_a_step=calls),
        figures=(
            measured("overhead_fraction", overheads, unit="fraction", better="lower", goal=0.05, against=_AGAINST),
            measured("overhead_fraction_barrier", figures[1][0], unit="fraction", better="lower", against=_AGAINST),
        ),
    )


_AGAINST = "step over the same calls replayed without cost, minus one; 16 actors, 50 ms stages, two steps in flight"


def _one(cluster: SleptCluster, layout: Layout, loads: list[Load], kind: str, repeats: int) -> tuple[list[float], int]:
    plan, language = plan_of(loads, layout.ranks, 0)
    tasks = tasks_of(plan, language, layout, kind, WINDOW * layout.language)
    ideal_s = max(replay(tasks))
    cluster.run(layout, kind, loads)
    runs = [cluster.run(layout, kind, loads, steps=STEPS_A_RUN) for _ in range(repeats)]
    return [run.seconds / ideal_s - 1.0 for run in runs], runs[0].calls
