"""Plans: packing does not feel pool sizes, every item has one disjoint route, JSON is whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from omni_ray.balance.step_plan import PoolRanks, check_plan, make_plan, pack
from omni_ray.types.batch import StepPlan
from omni_ray.types.errors import PlanError
from omni_ray.types.modality import Modality
from omni_ray.types.sample import EncodedSample, MediaSpan


def sample(length: int, spans: int = 0) -> EncodedSample:
    rows = np.zeros((length, 5), dtype=np.int64)
    made = tuple(
        MediaSpan(modality=Modality.VISION, name="i", kind="image", offset=1 + 3 * k, length=2, cost=4.0)
        for k in range(spans)
    )
    return EncodedSample(key="k", kind="x", ids_T5=rows, labels_T5=rows, loss_kind_T=rows[:, 0], spans=made)


SAMPLES = [sample(10 + 3 * k, spans=k % 3) for k in range(14)]


def plan_for(ranks: PoolRanks) -> StepPlan:
    groups = pack(SAMPLES, 4)
    names = [f"s:{k}" for k in range(len(SAMPLES))]
    return make_plan(
        step=3, stage="S2", names=names, samples=SAMPLES, groups=groups, ranks=ranks, tile_items=2, counts={"rows": 1}
    )


@pytest.mark.parametrize("ranks", [PoolRanks(), PoolRanks(vision=3, language=2)], ids=str)
def test_plan_is_sound_and_survives_json(ranks: PoolRanks) -> None:
    plan = plan_for(ranks)
    check_plan(plan, ranks)
    assert StepPlan.from_json(plan.to_json()) == plan
    assert sorted(name for batch in plan.micro_batches for name in batch.samples) == sorted(
        f"s:{k}" for k in range(len(SAMPLES))
    )
    assert len(plan.items) == sum(len(s.spans) for s in SAMPLES)


def test_pool_sizes_change_owners_and_nothing_else() -> None:
    one, many = plan_for(PoolRanks()), plan_for(PoolRanks(vision=3, language=2))
    assert {item.encoder_rank for item in many.items} == {0, 1, 2}
    strip = {"encoder_rank": 0, "language_rank": 0}
    assert [replace(i, **strip) for i in one.items] == [replace(i, **strip) for i in many.items]
    assert [b.samples for b in one.micro_batches] == [b.samples for b in many.micro_batches]


def test_tiles_stay_inside_a_micro_batch_and_a_rank() -> None:
    plan = plan_for(PoolRanks(vision=3))
    for tile in {item.tile for item in plan.items}:
        members = [item for item in plan.items if item.tile == tile]
        assert len(members) <= 2
        assert len({(item.micro_batch, item.encoder_rank) for item in members}) == 1


def test_contradictions_are_refused() -> None:
    plan = plan_for(PoolRanks(vision=3))
    with pytest.raises(PlanError, match=r"names vision rank [12], yet the pool has 1"):
        check_plan(plan, PoolRanks())
    moved = (plan.items[0], replace(plan.items[1], offset=0, micro_batch=plan.items[0].micro_batch), *plan.items[2:])
    with pytest.raises(PlanError, match="overlaps the item before it"):
        check_plan(replace(plan, items=moved), PoolRanks(vision=3))
    with pytest.raises(PlanError, match="ids must count up from 0"):
        check_plan(replace(plan, items=plan.items[1:]), PoolRanks(vision=3))
