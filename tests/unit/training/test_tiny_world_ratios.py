"""Token ratios of every stage of the curriculum over 10^5 rows of the tiny world, with and without real recordings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omni_ray.config.load import load_recipe
from omni_ray.config.mixture import COUNTED, Mixture
from omni_ray.data.order import SampleRef
from omni_ray.data.order_state import OrderState
from omni_ray.data.planner import OrderPlanner, StageOrder
from omni_ray.data.tiny_world.build import build_tiny_world
from omni_ray.training.prepare import StepBuilder

pytestmark = pytest.mark.slow

ROWS = 100_000
SCALE = 0.1
SHARES: dict[str, dict[str, int]] = {
    "S0": {"text": 1},
    "S1": {"text": 2, "speech": 1},
    "S2": {"text": 2, "vision": 1, "speech": 1},
    "S3": {"text": 2, "vision": 1, "speech": 1},
    "S4": {"text": 2, "vision": 1, "speech": 1},
    "S5": {"text": 3, "speech": 2},
    "SFT": {"text": 3, "vision": 2, "speech": 2},
}
"""networks.md section 6; it gives none for S5 and SFT."""
SERVES: Mapping[str, frozenset[str]] = {
    "vision": frozenset({"picture", "video", "scene", "audio_visual", "dialogue"}),
    "speech": frozenset({"speech_text", "audio_repeat", "cross_modal_speech", "speech_dialogue", "picture_speech"}),
}
"""Which modality's share a source is drawn for; the others are drawn for text."""


@pytest.fixture(scope="module", params=["synthetic", "real"])
def builder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StepBuilder:
    pytest.importorskip("hibari", reason="the tiny world speaks with the tiny-world extra")
    real = os.environ.get("OMNI_RAY_REAL_DATA") if request.param == "real" else None
    if request.param == "real" and not real:
        pytest.skip("needs the real recordings that OMNI_RAY_REAL_DATA names")
    root = tmp_path_factory.mktemp(request.param)
    build_tiny_world(root, real_data=Path(real) if real else None, scale=SCALE)
    return StepBuilder(load_recipe("tiny", [f"data.root={root}"]), root)


def in_rows(counts: Mapping[str, Any], shares: Mapping[str, int]) -> Mixture:
    """A stage's own sources, their counts as weights beside each other, under shares of rows."""
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in shares}
    for source, count in counts.items():
        name = next((name for name, sources in SERVES.items() if source in sources and name in shares), "text")
        parts[name].append({"source": source, "weight": count.constant})
    return Mixture.model_validate(
        {"modalities": {name: {"share": shares[name], "blend": blend} for name, blend in parts.items()}}
    )


def realised(builder: StepBuilder, stage: StageOrder) -> dict[str, int]:
    """Rows by modality that the planner places, step after step."""
    planner = OrderPlanner([stage], builder.sizes, builder.recipe.seed, builder.measure)
    state: OrderState = planner.start()
    seen = dict.fromkeys(COUNTED, 0)
    while sum(seen.values()) < ROWS:
        draw, state = planner.advance(state)
        assert not draw.bad
        for piece in draw.pieces:
            for name, rows in zip(COUNTED, builder.measure(piece.ref).by_modality, strict=True):
                seen[name] += rows
    return seen


@pytest.mark.parametrize("stage", SHARES)
def test_shares_of_rows_are_met_within_one_per_cent(builder: StepBuilder, stage: str) -> None:
    order = next(order for order in builder.stages if order.name == stage)
    assert order.mixture.counts is not None
    entry = in_rows(order.mixture.counts, SHARES[stage])
    packing = order.packing.model_copy(update={"kind": "best_fit"})
    seen = realised(
        builder,
        StageOrder(name=stage, steps=10**6, mixture=entry, packing=packing, sequences=4, rows=512),
    )
    total, shares = sum(seen.values()), sum(SHARES[stage].values())
    for name in COUNTED:
        assert seen[name] / total == pytest.approx(SHARES[stage].get(name, 0) / shares, rel=0.01), seen


@pytest.mark.parametrize("stage", SHARES)
def test_counts_of_the_recipe_give_the_ratio_of_their_sources(builder: StepBuilder, stage: str) -> None:
    """The recipe's own mixture counts samples; its ratio of rows is that of whole sources, taken so many times."""
    order = next(order for order in builder.stages if order.name == stage)
    counts = {name: value.constant or 0.0 for name, value in (order.mixture.counts or {}).items()}
    seen = realised(builder, replace(order, steps=10**6))
    total = sum(seen.values())
    wanted = dict.fromkeys(COUNTED, 0.0)
    for source, count in counts.items():
        size = builder.sizes[source]
        for number in range(size):
            rows = builder.measure(SampleRef(source=source, index=number))
            for name, of_modality in zip(COUNTED, rows.by_modality, strict=True):
                wanted[name] += of_modality * count / size
    for name, share in wanted.items():
        assert seen[name] / total == pytest.approx(share / sum(wanted.values()), rel=0.01), seen
