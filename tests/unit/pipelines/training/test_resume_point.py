"""Where a run goes on: same order, an accepted mixture, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mini_world import mini_recipe, write_world

from omni_ray.checkpoint import store
from omni_ray.config.recipe import Recipe
from omni_ray.training.data_position import guarantees, position_record
from omni_ray.training.prepare import StepBuilder
from omni_ray.types.errors import CheckpointError
from pipelines.training.checkpoint import ORDER_KEYS, resume_point
from pipelines.training.data_root import data_fingerprint

STAGE: dict[str, Any] = {
    "name": "A",
    "steps": 8,
    "mixture": {"text": 3, "audio": 1},
    "trainable": ["language"],
    "seq_len": 96,
    "micro_batches": 2,
    "packing": {"kind": "best_fit"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("point")
    (folder / "world").mkdir()
    write_world(folder / "world")
    made = recipe(folder)
    builder = StepBuilder(made, folder / "world")
    with store.writing(folder / "out" / "checkpoints", 3) as written:
        store.write_state(
            written,
            {
                "step": 3,
                "order": position_record(builder.planner.state_at(3), guarantees(builder)),
                "recipe": made.numbers_fingerprint(),
                "recipe_but_order": made.numbers_fingerprint(without=ORDER_KEYS),
                "data": data_fingerprint(folder / "world"),
            },
        )
    return folder


def recipe(base: Path, checkpoint: dict[str, Any] | None = None, **stage: Any) -> Recipe:
    return mini_recipe(base, stages=[STAGE | stage], checkpoint=checkpoint or {})


def test_the_same_recipe_goes_on(base: Path) -> None:
    point = resume_point(recipe(base), base / "out", resume=True)
    assert point.step == 3
    assert point.order is not None
    assert point.order.step == 3
    fresh = resume_point(recipe(base), base / "elsewhere", resume=True)
    assert (fresh.step, fresh.order) == (0, None)


def test_a_new_mixture_goes_on_only_where_accepted(base: Path) -> None:
    changed = {"mixture": {"text": 1, "picture": 1}}
    with pytest.raises(CheckpointError, match="the mixture of stage A has changed since the checkpoint"):
        resume_point(recipe(base, **changed), base / "out", resume=True)
    accepting = {"accept_changed": ["mixture"]}
    point = resume_point(recipe(base, checkpoint=accepting, **changed), base / "out", resume=True)
    assert point.order is not None
    assert point.order.drawn["text"] > 0


REFUSED = {
    "micro_batches": (3, "stages.A.sequences is 3, yet the checkpoint's order of samples was made with 2"),
    "seq_len": (128, "stages.A.rows is 128, yet the checkpoint's order of samples was made with 96"),
    "steps": (9, "stages.A.steps is 9, yet the checkpoint's order of samples was made with 8"),
    "packing": ({"kind": "split"}, "stages.A.packing is 'split', yet"),
    "rope_base": (7.0, "was made by another recipe"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_differs_is_named(base: Path, key: str) -> None:
    value, sentence = REFUSED[key]
    accepting = {"accept_changed": ["mixture"]}
    for checkpoint in ({}, accepting):
        with pytest.raises(CheckpointError) as caught:
            resume_point(recipe(base, checkpoint=checkpoint, **{key: value}), base / "out", resume=True)
        assert sentence in str(caught.value)
