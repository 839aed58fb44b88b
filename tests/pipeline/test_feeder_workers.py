"""The feeder's decode workers: every one of them works, and one that is killed leaves no trace in the stream."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from mini_world import mini_recipe, write_world

from actors.drawing import draw_dataset
from actors.feeder import Feeder, use_small_blocks
from omni_ray.data.order_state import Held
from omni_ray.training.prepare import StepBuilder

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray Data reads settings of its own that it deprecates
    pytest.mark.filterwarnings("ignore:The minimum number of concurrent actors"),
]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"mixture": {"text": 3, "picture": 6, "audio": 2}},
    "packed": {
        "mixture": {"blend": [{"source": "text", "weight": 3}, {"source": "picture", "weight": 1}]},
        "packing": {"kind": "best_fit", "budget": 256},
    },
}
STEPS, ASKED = 4000, 120
KILLED_AT = (4, 40)
"""While thousands of steps are still to be decoded, so that nobody is idle."""


@pytest.mark.parametrize("form", [pytest.param("plain", marks=pytest.mark.full), "packed"])
def test_a_killed_decode_worker_changes_nothing(form: str, ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    write_world(tmp_path / "world")
    stage = {"name": "S", "steps": STEPS, "trainable": ["language"], "seq_len": 96, "micro_batches": 2}
    recipe = mini_recipe(tmp_path, stages=[stage | FORMS[form]])
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 2})})
    alone = StepBuilder(recipe, tmp_path / "world")
    feeder = Feeder(recipe, tmp_path / "world", 0)
    workers, killed = [], []
    try:
        for step in range(ASKED):
            plan, bad = feeder.plan(step)
            wanted = alone.build(step)
            assert (plan, bad) == (wanted.plan, wanted.bad)
            for item, media in wanted.media.items():
                route = plan.items[item]
                key = (route.modality.value, route.micro_batch, route.encoder_rank)
                assert (feeder.payloads(step, [key])[item] == media).all()
            workers.append(feeder.prepared_by(step))
            feeder.forget(step)
            if step in KILLED_AT and workers[-1] not in killed:
                os.kill(workers[-1], signal.SIGKILL)
                killed.append(workers[-1])
    finally:
        feeder.stop()
    assert killed
    assert os.getpid() not in workers
    assert set(workers) > set(killed)


def test_draws_are_passed_on_a_few_at_a_time(ray_cluster: None, tmp_path: Path) -> None:
    """Were they joined, one worker would decode a whole curriculum, and only when all of it was drawn."""
    (tmp_path / "world").mkdir()
    write_world(tmp_path / "world")
    stage = {"name": "S", "steps": 64, "trainable": ["language"], "seq_len": 96, "micro_batches": 2}
    recipe = mini_recipe(tmp_path, stages=[stage | FORMS["packed"]])
    use_small_blocks()
    drawn = draw_dataset(recipe, tmp_path / "world", None, 0, 64).materialize()
    assert drawn.num_blocks() >= 16
    assert [row["step"] for row in drawn.iter_rows()] == list(range(64))


def test_weights_that_change_in_the_running_feeder_repeat_and_lose_nothing(ray_cluster: None, tmp_path: Path) -> None:
    """Steps decoded ahead under the old weights are forgotten, not used and not skipped."""
    (tmp_path / "world").mkdir()
    write_world(tmp_path / "world")
    stage = {"name": "S", "steps": 400, "trainable": ["language"], "seq_len": 96, "micro_batches": 1}
    packing = {"packing": {"kind": "best_fit", "budget": 128, "lookahead": 8}}
    recipe = mini_recipe(tmp_path, stages=[stage | FORMS["packed"] | packing])
    feeder = Feeder(recipe, tmp_path / "world", 0)
    placed, shares = [], []
    try:
        for step in range(6):
            if step in (2, 4):
                feeder.weigh(step, {"picture": 12.0 if step == 2 else 0.1})
            plan, _ = feeder.plan(step)
            names = [name for batch in plan.micro_batches for name in batch.samples]
            shares.append(sum(name.startswith("picture") for name in names) / len(names))
            placed += names
        state = feeder.position(6)
    finally:
        feeder.stop()
    passes = max(state.drawn["text"] / 60, state.drawn["picture"] / 40)
    assert passes <= 1, "so that a name met twice is a sample repeated"
    planner = StepBuilder(recipe, tmp_path / "world").planner
    waiting = [str(planner.ref(held)) for held in state.buffer + state.waiting]
    drawn = [str(planner.ref(Held(stream=key, number=n))) for key, count in state.drawn.items() for n in range(count)]
    assert sorted(placed + waiting) == sorted(drawn)
    assert len(set(drawn)) == len(drawn)
    assert shares[3] > shares[1] + 0.1
