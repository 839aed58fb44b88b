"""Text parity: throughput of the language model with vision and audio over text only, on the same devices."""

from __future__ import annotations

from actors.cluster import local_or_joined
from pipelines.bench.parity_real import separate_real
from pipelines.bench.slept_pools import SleptCluster, best_layout
from pipelines.bench.table2 import MICRO_BATCHES, Layout, draw_loads
from pipelines.bench.writer import BenchReport, environment, measured

DEVICES = 32
SCALE = 6e-5
"""Seconds per TFLOP: a language call of 0.6 s, a step of about ten."""
STEPS = 3
"""Steps of a measurement, as many in flight as in training: the driver's own work hides behind the step before."""


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """Colocated and separate plans over text only on 32 simulated devices; and real mathematics on two cores.

    Args:
        quick: Fewer measurements.  seed: Draws other loads.
    """
    repeats = 2 if quick else 5
    text = Layout(devices=DEVICES, encoders=0, language=DEVICES)
    apart = best_layout(DEVICES, "pipelined", seed, SCALE)
    together = Layout(devices=DEVICES, encoders=DEVICES, language=DEVICES, colocate=True)
    ratios: dict[str, list[float]] = {"colocated": [], "separate": []}
    busy = 0.0
    with local_or_joined(num_cpus=8):
        cluster = SleptCluster(3 * DEVICES, SCALE)
        try:
            for turn in range(repeats):
                drawn = {n: draw_loads(seed + 1000 * turn, MICRO_BATCHES * n) for n in (DEVICES, apart.language)}
                base = cluster.run(text, "pipelined", drawn[DEVICES], media=False, steps=STEPS)
                for name, layout in (("colocated", together), ("separate", apart)):
                    found = cluster.run(layout, "pipelined", drawn[layout.language], steps=STEPS)
                    ratios[name].append(found.rate / base.rate)
                    busy = max(busy, found.device_busy, base.device_busy)
        finally:
            cluster.close()
        real, share = separate_real(seed, 5 if quick else 9)
    against = f"text only on the same {DEVICES} simulated devices, slept loads of Table 2"
    return BenchReport(
        bench="text-parity",
        environment=environment(
            seed=seed,
            quick=quick,
            devices=DEVICES,
            steps=STEPS,
            separate_encoder_devices=apart.encoders,
            largest_device_busy=busy,
            real_encoder_share=share,
        ),
        figures=(
            measured("colocated", ratios["colocated"], unit="ratio", better="higher", goal=0.93, against=against),
            measured("separate", ratios["separate"], unit="ratio", better="higher", goal=0.89, against=against),
            measured("separate_real", real, unit="ratio", better="higher", goal=0.90, against=_REAL),
        ),
    )


_REAL = "the same rows without media; language on one core, encoders on the other, real mathematics"
