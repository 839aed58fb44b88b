"""``packing_fill``: how full packed sequences are, on the tiny world and on log-normal lengths; a part of ``data``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from omni_ray.config.curriculum import Packing
from omni_ray.config.load import check_recipe, load_recipe
from omni_ray.config.mixture import Mixture
from omni_ray.data.mixture import SampleRows
from omni_ray.data.order import SampleRef
from omni_ray.data.planner import OrderPlanner, StageOrder
from omni_ray.training.prepare import StepBuilder
from pipelines.bench.writer import Figure

KINDS = ("best_fit", "split")
ROWS = 100_000
SEQUENCES = 4
LOG_NORMAL = {"60 rows, sigma 0.8, budget 512": (60, 0.8, 512), "300 rows, sigma 1, budget 4096": (300, 1.0, 4096)}
"""Name -> median, sigma, budget; longer samples are cut to the budget."""
TINY = (("S3", 512), ("SFT", 512), ("SFT", 1024))
"""Stage and budget."""


def packing_fill(root: Path, seed: int) -> Figure:
    """The least filled of all mixes and kinds of packing.

    Args:
        root: A built tiny world.  seed: Draws the order and the lengths.
    """
    fills: dict[str, float] = {}
    for kind in KINDS:
        for stage, budget in TINY:
            fills[f"{kind}, tiny world {stage}, budget {budget}"] = _tiny(root, stage, kind, budget, seed)
        for name, (median, sigma, budget) in LOG_NORMAL.items():
            fills[f"{kind}, log-normal {name}"] = _log_normal(median, sigma, budget, kind, seed)
    worst = min(fills, key=lambda name: fills[name])
    return Figure(
        name="packing_fill",
        value=fills[worst],
        unit="fraction",
        better="higher",
        goal=0.97,
        against=f"rows over budget, 10^5 rows of each of {len(fills)} mixes; the least: {worst}",
        n=len(fills),
        runs=tuple(fills.values()),
    )


def _tiny(root: Path, name: str, kind: str, budget: int, seed: int) -> float:
    """A stage's sources as the recipe mixes them, packed."""
    recipe = load_recipe("tiny", [f"data.root={root}", f"seed={seed}"])
    stage = next(stage for stage in recipe.stages if stage.name == name).model_dump(mode="json")
    stage |= {"steps": 10**6, "micro_batches": SEQUENCES, "packing": {"kind": kind, "budget": budget}}
    stage["seq_len"] = min(stage["seq_len"], budget)
    builder = StepBuilder(check_recipe(recipe.model_dump(mode="json") | {"stages": [stage]}), root)
    return _filled(builder.planner, budget)


def _log_normal(median: float, sigma: float, budget: int, kind: str, seed: int) -> float:
    lengths = np.exp(np.log(median) + sigma * np.random.default_rng(seed).standard_normal(5000))
    rows = np.clip(np.round(lengths), 1, budget).astype(int).tolist()
    stage = StageOrder(
        name="S",
        steps=10**6,
        mixture=Mixture.model_validate({"mix": 1}),
        packing=Packing.model_validate({"kind": kind}),
        sequences=SEQUENCES,
        rows=budget,
    )

    def measure(ref: SampleRef) -> SampleRows:
        return SampleRows(text=rows[ref.index])

    return _filled(OrderPlanner([stage], {"mix": len(rows)}, seed, measure), budget)


def _filled(planner: OrderPlanner, budget: int) -> float:
    state: Any = planner.start()
    placed, sequences = 0, 0
    while placed < ROWS:
        draw, state = planner.advance(state)
        sequences += len(draw.groups or ())
        for piece in draw.pieces:
            stop = planner.measure(piece.ref).total if piece.stop is None else piece.stop
            placed += stop - piece.start
    return placed / (sequences * budget)
