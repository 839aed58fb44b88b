"""Exact: every plan of pools, placement, schedule and chunks against the single-process reference, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import torch

from actors.cluster import local_or_joined
from actors.placement import POOL_NAMES, Places
from actors.pool import Pool, build_pools, rank_of, start_pools
from actors.transport import unpack
from omni_ray.config.load import check_recipe, load_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.training.digest import differing_bits, digests
from omni_ray.training.networks import POOLS
from omni_ray.training.prepare import StepBuilder, pool_ranks
from omni_ray.training.reference import Reference
from pipelines.bench.direct_feeder import DirectFeeder
from pipelines.bench.writer import BenchReport, Figure, counted, environment, measured, negative_control
from pipelines.training.data_root import data_root
from pipelines.training.step import StepDriver

LONG, SHORT = 200, 20
SHAPES: dict[str, list[dict[str, int]]] = {
    "separate": [
        {"vision": 1, "audio": 1, "language": 1},
        {"vision": 2, "audio": 1, "language": 2},
        {"vision": 1, "audio": 2, "language": 3},
    ],
    "colocate": [
        {"vision": 1, "audio": 1, "language": 1},
        {"vision": 2, "audio": 2, "language": 1},
        {"vision": 2, "audio": 2, "language": 2},
    ],
}
"""Pool sizes; colocated with an inner group of 1, 2 and 1 encoder ranks a language replica."""
CHUNKS = (1, 2, 4)
KINDS = ("pipelined", "barrier")
Expected = list[dict[str, Any]]
"""By step: losses, and digests of gradients and weights by pool."""


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """All plans; two of them over 200 steps.

    Args:
        quick: Changes nothing: steps and plans are the bench, and there are no repeats.  seed: Other weights and order.
    """
    base = exact_recipe(seed, {})
    oracle = Oracle(base)
    mismatched, tensors, plans, control = 0, 0, 0, 0
    fast: list[dict[str, float]] = []
    with local_or_joined(num_cpus=16):
        feeder: Any = ray.remote(DirectFeeder).options(num_cpus=0.1).remote(base, data_root(base))
        for placement, shapes in SHAPES.items():
            for number, shape in enumerate(shapes):
                pools, places = _start(seed, placement, shape)
                for recipe in recipes(seed, placement, shape):
                    longest = recipe.schedule.num_chunks == 1 and number == 1
                    steps = LONG if longest and recipe.schedule.kind == "pipelined" else SHORT
                    bits, seen = one_plan(recipe, pools, feeder, oracle, steps)
                    mismatched, tensors, plans = mismatched + bits, tensors + seen, plans + 1
                if number == 1:
                    fast.append(fast_plan(exact_recipe(seed, _changes(placement, shape, reduce="fast")), pools, feeder))
                if placement == "separate" and number == 0:
                    control = one_plan(base, pools, feeder, oracle, 1, flip=True)[0]
                for pool in pools.values():
                    pool.stop()
                places.close()
        ray.kill(feeder)
    figures = (
        counted("mismatched_bits", mismatched, n=tensors, goal=0, against=_AGAINST),
        negative_control(control, "flip of one bit of one weight, counted over one step"),
        counted("plans", plans, n=plans, goal=36, better="higher", against="2 schedules x 2 placements x 3 x 3"),
        *_fast_figures(fast),
    )
    facts = environment(seed=seed, quick=quick, long_steps=LONG, short_steps=SHORT, shapes=SHAPES)
    return BenchReport(bench="exact", environment=facts, figures=figures)


def _fast_figures(fast: list[dict[str, float]]) -> list[Figure]:
    worst = [max(f["loss"], f["gradient"]) for f in fast]
    against = "reduce: fast, worst step: loss and whole gradient over the reference from the same weights"
    return [
        measured("fast_relative_error", worst, unit="ratio", better="lower", goal=1e-6, against=against),
        measured("fast_weight_error", [f["weights"] for f in fast], unit="ratio", better="lower"),
    ]


_AGAINST = "losses, gradients and weights of every step; n = tensors compared; single-process reference"


def _changes(placement: str, shape: dict[str, int], **schedule: Any) -> dict[str, Any]:
    return {
        "placement": placement,
        "pools": {name: {"actors": count} for name, count in shape.items()},
        "schedule": schedule,
    }


def recipes(seed: int, placement: str, shape: dict[str, int]) -> list[Recipe]:
    """Every schedule and number of chunks of one placement and shape."""
    return [
        exact_recipe(seed, _changes(placement, shape, kind=kind, num_chunks=chunks, window=2))
        for kind in KINDS
        for chunks in CHUNKS
    ]


def exact_recipe(seed: int, changes: dict[str, Any]) -> Recipe:
    """A stage with every modality, in which everything trains, in many small tiles."""
    raw = load_recipe("tiny", [f"seed={seed}"]).model_dump(mode="json")
    stage = {
        "name": "exact",
        "steps": LONG,
        "mixture": {"text": 2, "picture": 4, "speech_text": 2, "audio_synthetic": 3},
        "trainable": ["language", "audio_heads", "vision", "vision_projector", "audio", "audio_projector"],
        "micro_batches": 4,
    }
    data = raw["data"] | {"tile_items": 2}
    return check_recipe(raw | {"stages": [stage], "data": data} | changes)


class Oracle:
    """The reference's losses, gradients and weights, computed as far as anyone has asked."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.builder = StepBuilder(recipe, data_root(recipe))
        self.reference = Reference(recipe)
        self.steps: Expected = []
        self.weights: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
        """Whole weights after a step, where a plan ends."""

    def until(self, steps: int) -> Expected:
        """What the first ``steps`` steps must give."""
        while len(self.steps) < steps:
            found = self.reference.step(self.builder.build(len(self.steps)), keep_gradients=True)
            self.steps.append(
                {
                    "losses": found.losses,
                    "gradients": {name: digests(found.gradients[name]) for name in POOLS},
                    "weights": {name: digests(self.reference.networks[name].state_dict()) for name in POOLS},
                }
            )
            if len(self.steps) in (1, SHORT, LONG):
                self.weights[len(self.steps)] = {
                    name: {k: v.clone() for k, v in self.reference.networks[name].state_dict().items()}
                    for name in POOLS
                }
        return self.steps[:steps]


def _start(seed: int, placement: str, shape: dict[str, int]) -> tuple[dict[str, Pool], Places]:
    recipe = exact_recipe(seed, _changes(placement, shape))
    places = Places(recipe)
    return start_pools(recipe, POOL_NAMES, places=places), places


def seat(recipe: Recipe, pools: dict[str, Pool], feeder: Any) -> StepDriver:
    """Put fresh workers of a recipe into actors that are there, and the feeder on its pool sizes."""
    for name, pool in pools.items():
        for rank, actor in enumerate(pool.actors):
            actor.adopt.remote(recipe, rank_of(recipe, name, rank))
    build_pools(recipe, pools)
    ray.get(feeder.use_ranks.remote(pool_ranks(recipe)))
    driver = StepDriver(recipe, pools, feeder)
    driver.enter_stage(0)
    return driver


def one_plan(
    recipe: Recipe, pools: dict[str, Pool], feeder: Any, oracle: Oracle, steps: int, flip: bool = False
) -> tuple[int, int]:
    """(mismatches, tensors compared) of a plan: differing bits of final weights, and one for any earlier difference.

    Args:
        flip: Flip one bit of a weight before the end, which must be counted.
    """
    driver = seat(recipe, pools, feeder)
    gradients: dict[int, dict[str, list[Any]]] = {}

    def probe(step: int) -> None:
        gradients[step] = {name: pools[name].all("gradient_digests") for name in POOLS}

    driver.probe = probe
    mismatched = compared = 0
    for step, expected in enumerate(oracle.until(steps)):
        plan, _ = ray.get(feeder.plan.remote(step))
        handles = driver.submit(plan)
        if flip:
            ray.get([pools["vision"].actors[0].__ray_call__.remote(_flip_one_bit)])
        weights = {name: pools[name].all("weight_digests") for name in POOLS}
        result = driver.collect(handles)
        mismatched += sum(result.losses[term] != value for term, value in expected["losses"].items())
        for what, found in (("gradients", gradients.pop(step)), ("weights", weights)):
            for name in POOLS:
                for rank in ray.get(found[name]):
                    compared += len(rank)
                    mismatched += 0 if flip else _different(rank, expected[what][name])
        feeder.forget.remote(step + 1)
    for name in POOLS:
        for state in ray.get(pools[name].all("state")):
            ours = unpack(state).network
            mismatched += sum(differing_bits(ours[k], v) for k, v in oracle.weights[steps][name].items())
    return mismatched, compared


def _different(ours: dict[str, str], theirs: dict[str, str]) -> int:
    return len(ours.keys() ^ theirs.keys()) + sum(ours[name] != theirs[name] for name in ours.keys() & theirs.keys())


def _flip_one_bit(actor: Any) -> None:
    weight = next(actor.worker.network.parameters())
    weight.data.view(torch.int32).view(-1)[0] ^= 1


def fast_plan(recipe: Recipe, pools: dict[str, Pool], feeder: Any) -> dict[str, float]:
    """Worst relative error of ``reduce: fast``; the reference starts every step from the state of the pools."""
    driver = seat(recipe, pools, feeder)
    builder, reference = StepBuilder(recipe, data_root(recipe)), Reference(recipe)
    taken: dict[str, Any] = {}
    driver.probe = lambda _: taken.update({n: pools[n].actors[0].invoke.remote("gradients") for n in POOLS})
    worst = {"loss": 0.0, "gradient": 0.0, "weights": 0.0}
    for step in range(SHORT):
        before = {name: unpack(ray.get(pools[name].actors[0].invoke.remote("state"))) for name in POOLS}
        for name in POOLS:
            before[name].copy().restore(reference.networks[name], reference.optimizers[name])
        plan, _ = ray.get(feeder.plan.remote(step))
        result = driver.collect(driver.submit(plan))
        expected = reference.step(builder.build(step), keep_gradients=True)
        loss = [abs(result.losses[t] - v) / abs(v) for t, v in expected.losses.items()]
        sums = {n: ray.get(taken[n]) for n in POOLS}
        ours = [torch.from_numpy(sums[n][k].copy()) for n in POOLS for k in expected.gradients[n]]
        theirs = [expected.gradients[n][k] for n in POOLS for k in expected.gradients[n]]
        state = {n: unpack(ray.get(pools[n].actors[0].invoke.remote("state"))).network for n in POOLS}
        now = [state[n][k] for n in POOLS for k, _ in reference.networks[n].named_parameters()]
        goal = [p.detach() for n in POOLS for _, p in reference.networks[n].named_parameters()]
        worst["loss"] = max(worst["loss"], *loss)
        worst["gradient"] = max(worst["gradient"], relative(ours, theirs))
        worst["weights"] = max(worst["weights"], relative(now, goal))
    return worst


def relative(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Norm of the difference over the norm, all tensors together, in fp64."""
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
    size = sum(float(b.double().square().sum()) for b in theirs)
    return (apart / size) ** 0.5
