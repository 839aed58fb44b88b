"""Pools whose ranks hold shares: the bits of the single process, the bytes of a share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_pools import InProcessPools, reference_weights, trained_alone
from mini_world import STAGES, differing, mini_recipe

from omni_ray.config.recipe import Recipe
from omni_ray.training.networks import POOLS
from omni_ray.training.prepare import StepBuilder
from omni_ray.training.reference import Reference
from omni_ray.types.errors import PlanError

STAGE = STAGES[2] | {"steps": 3, "trainable": [*STAGES[2]["trainable"], "audio"]}


def recipe_of(
    base: Path, ranks: int, shards: tuple[str, str], precision: str = "fp32", stages: Any = (STAGE,)
) -> Recipe:
    """``shards``: of the encoders, of the language pool."""
    section = {"actors": ranks, "recompute": "full", "precision": precision}
    pools = {name: section | {"shard": shards[name == "language"]} for name in POOLS}
    return mini_recipe(base, stages=list(stages), pools=pools)


@pytest.mark.parametrize(
    ("ranks", "shards", "precision"),
    [(2, ("hsdp", "zero3"), "fp32"), (3, ("zero2", "zero1"), "bf16"), (2, ("zero3", "zero2"), "bf16")],
    ids=["2-hsdp-zero3", "3-zero2-zero1-bf16", "2-zero3-zero2-bf16"],
)
def test_shares_train_to_the_bits_of_the_single_process(
    base: Path, tmp_path: Path, ranks: int, shards: tuple[str, str], precision: str
) -> None:
    """Also after going back to a snapshot, and after loading their checkpoint into pools of other forms."""
    recipe = recipe_of(base, ranks, shards, precision)
    prepared = [StepBuilder(recipe, base / "world").build(step) for step in range(recipe.total_steps)]
    oracle, pools = Reference(recipe), InProcessPools(recipe)
    for number, step in enumerate(prepared, start=1):
        assert pools.step(step) == (oracle.step(step).norm, True), "the norm, too, bit for bit"
        if number == 2:
            pools.save(tmp_path)
            for name in POOLS:
                pools.all(name, "keep_snapshot", number)
    wanted = reference_weights(oracle)
    assert differing(pools.weights(), wanted) == []
    for name in POOLS:
        pools.all(name, "rewind", 2)
    pools.step(prepared[2])
    assert differing(pools.weights(), wanted) == []
    for other in (recipe_of(base, ranks + 1, shards[::-1], precision), recipe_of(base, 1, ("none", "none"), precision)):
        loaded = InProcessPools(other, folder=tmp_path)
        loaded.step(StepBuilder(other, base / "world").build(2))
        assert differing(loaded.weights(), wanted) == []


@pytest.mark.parametrize("shards", [("hsdp", "zero3"), ("zero1", "zero2")])
def test_between_steps_a_rank_holds_its_share_alone(base: Path, shards: tuple[str, str]) -> None:
    recipe = recipe_of(base, 4, shards, "bf16" if "zero1" in shards else "fp32")
    pools, builder = InProcessPools(recipe), StepBuilder(recipe, base / "world")
    pools.step(builder.build(0))
    for name in POOLS:
        optimizers = [actor.worker.optimizer for actor in pools.pools[name]]
        whole, all_weights = optimizers[0].bytes_whole(), sum(map(optimizers[0]._weight_bytes, optimizers[0].sizes))
        shared, states = [], []
        for optimizer in optimizers:
            weights = sum(p.untyped_storage().nbytes() for p in optimizer.parameters.values())
            apart = {m for key, m in optimizer.masters.items() if m is not optimizer.parameters[key]}
            state = sum(v.nbytes for s in optimizer._adam.state.values() for k, v in s.items() if k != "step")
            state += sum(master.nbytes for master in apart)
            assert weights + state == optimizer.bytes_at_rest(), "what is counted is what is held"
            assert all(tensor.grad is None for tensor in (*optimizer.parameters.values(), *optimizer.masters.values()))
            assert optimizer.keeps_weights == (weights == all_weights)
            shared.append(state if optimizer.keeps_weights else state + weights)
            states.append(state)
        assert sum(states) == whole - all_weights, "every master and moment is somewhere, and once"
        largest = max(optimizer.sizes.values()) * whole / sum(optimizer.sizes.values())
        assert max(shared) <= max(largest, 1.1 * sum(shared) / 4), "a quarter; a parameter is never cut"


@pytest.mark.parametrize("shard", ["zero1", "zero2"])
def test_between_micro_batches_gradients_are_shares_if_they_are_sent_on(base: Path, shard: str) -> None:
    """With four ranks: a whole term or more on some rank that keeps its own, a share on every rank that does not."""
    recipe = recipe_of(base, 4, (shard, shard))
    pools, builder = InProcessPools(recipe), StepBuilder(recipe, base / "world")
    held: dict[str, float] = dict.fromkeys(POOLS, 0.0)

    def look(index: int) -> None:
        for name in POOLS:
            for actor in pools.pools[name]:
                worker = actor.worker
                tensors = [p.grad for p in worker.network.parameters() if p.grad is not None]
                tensors += [piece for pieces in worker.pieces.values() for piece in pieces]
                tensors += [worker.optimizer._total] if worker.optimizer._total is not None else []
                trained = sum(p.numel() for p in worker.network.parameters() if p.requires_grad)
                held[name] = max(held[name], sum(tensor.numel() for tensor in tensors) / trained)

    pools.after_micro_batch = look
    pools.step(builder.build(0))
    for name in POOLS:
        # A third of the audio encoder is one parameter.
        assert (held[name] >= 1.0) if shard == "zero1" else (0.2 < held[name] < 0.35), held


def test_a_pool_that_stops_or_begins_to_train_has_its_whole_network(base: Path) -> None:
    """Ranks that let go of weights take them in again for a stage in which they are frozen."""
    frozen = STAGES[2] | {"steps": 1, "trainable": ["language"]}
    turns = [frozen, STAGE | {"name": "trains", "steps": 1}, frozen | {"name": "after"}]
    recipe = recipe_of(base, 2, ("zero3", "zero3"), stages=turns)
    pools, builder = InProcessPools(recipe), StepBuilder(recipe, base / "world")
    for step in range(recipe.total_steps):
        pools.step(builder.build(step))
        whole = all(p.numel() for p in pools.pools["vision"][1].worker.network.parameters())
        assert whole == (step != 1)
    assert differing(pools.weights(), trained_alone(base, recipe)) == []


def test_a_term_out_of_order_is_refused(base: Path) -> None:
    pools = InProcessPools(recipe_of(base, 2, ("zero2", "zero2")))
    shard = pools.pools["vision"][0].worker.shard
    shard.add_pieces({1: torch.ones(3), 0: torch.ones(3)})
    with pytest.raises(PlanError, match="pool vision: gradient term 1 came after term 1"):
        shard.add_pieces({1: torch.ones(3)})
