"""A run whose weights follow the perplexity gap: stopped and resumed, it ends with the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mini_world import mini_recipe, write_components, write_world

from omni_ray.checkpoint import store
from omni_ray.config.parallel import Pools
from pipelines.training.loop import train

MIXTURE: dict[str, Any] = {
    "blend": [
        {"source": "text", "weight": 1},
        {
            "name": "spoken",
            "weight": 1,
            "blend": [{"source": "audio", "weight": 1}, {"source": "picture", "weight": 1}],
        },
    ],
    "gap": {"every_steps": 2, "samples": 4, "split": "train", "decay": 0.5},
}

SHARES = {
    "language": {"actors": 2, "shard": "zero3"},
    "vision": {"actors": 2, "shard": "hsdp", "recompute": "full"},
}
"""Pools whose ranks let go of each other's weights, and take them in again to measure."""


@pytest.mark.ray
def test_weights_follow_the_gap_and_resume_keeps_them(tmp_path: Path, ray_cluster: None) -> None:
    (tmp_path / "world").mkdir()
    write_world(tmp_path / "world")
    write_components(tmp_path / "components")
    (tmp_path / "reference.json").write_text(json.dumps({"text": 1e9, "audio": 1e9, "picture": 0}))
    mixture = MIXTURE | {"gap": MIXTURE["gap"] | {"reference": str(tmp_path / "reference.json")}}
    stage = {
        "name": "A",
        "steps": 5,
        "mixture": mixture,
        "trainable": ["language"],
        "micro_batches": 2,
        "seq_len": 96,
        "packing": {"kind": "best_fit", "lookahead": 8},
    }
    recipe = mini_recipe(tmp_path, stages=[stage], checkpoint={"every_steps": 3, "keep": 9})
    assert train(recipe, tmp_path / "whole", quiet=True).finished
    states = {store.read_state(f)["step"]: store.read_state(f) for f in (tmp_path / "whole" / "checkpoints").iterdir()}
    factors = states[3]["order"]["factors"]
    assert factors["text"] == factors["audio"] == 1.0, "below their references"
    assert factors["picture"] == 3.0, "far from its reference: at the limit"
    half = tmp_path / "half" / "checkpoints"
    half.mkdir(parents=True)
    newest = store.newest(tmp_path / "whole" / "checkpoints")
    assert newest is not None
    (tmp_path / "whole" / "checkpoints" / store.checkpoint_name(3)).rename(half / store.checkpoint_name(3))
    wider = recipe.model_copy(
        update={
            "pools": Pools.model_validate(SHARES),
            "data": recipe.data.model_copy(update={"workers": 2, "prefetch_steps": 1}),
        }
    )
    resumed = train(wider, tmp_path / "half", resume=True, quiet=True)  # other readers, other ranks
    assert resumed.checkpoint is not None
    for path in sorted((newest / "model").rglob("*.safetensors")):
        assert (resumed.checkpoint / path.relative_to(newest)).read_bytes() == path.read_bytes()
    assert store.read_state(resumed.checkpoint)["order"] == states[5]["order"]
