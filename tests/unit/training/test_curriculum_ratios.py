"""Token ratios of every stage over 10^5 rows, counted as networks.md section 6 says, out of real samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mini_world import mini_recipe, write_world

from omni_ray.config.mixture import COUNTED
from omni_ray.training.prepare import StepBuilder

ROWS = 100_000
SOURCES = {"text": "text", "vision": "picture", "speech": "speech"}
STAGES: dict[str, tuple[dict[str, Any], str]] = {
    "S0": ({"text": 1}, "best_fit"),
    "S1": ({"text": 2, "speech": 1}, "best_fit"),
    "S2": ({"text": 6, "vision": 1, "speech": 3}, "split"),
    "S3": ({"text": 6, "vision": 1, "speech": 2}, "best_fit"),
    "S4": ({"text": {"linear": [[0, 6], [10, 8]]}, "vision": 1, "speech": 2}, "split"),
    "S5": ({"text": 1, "speech": 1}, "best_fit"),
    "SFT": ({"text": 5, "vision": 1, "speech": 1}, "split"),
}
"""Shares that samples with eight picture rows and a question can meet; 2:1:1 of the report needs larger pictures."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ratios")
    (folder / "world").mkdir()
    write_world(folder / "world")
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_ratios_are_met_within_one_per_cent(base: Path, stage: str) -> None:
    shares, kind = STAGES[stage]
    modalities = {name: {"share": share, "blend": [{"source": SOURCES[name]}]} for name, share in shares.items()}
    entry = {
        "name": stage,
        "steps": 100_000,
        "mixture": {"modalities": modalities},
        "trainable": ["language"],
        "seq_len": 96,
        "micro_batches": 4,
        "packing": {"kind": kind, "budget": 512},
    }
    builder = StepBuilder(mini_recipe(base, stages=[entry]), base / "world")
    parts = builder.recipe.stages[0].mixture.modalities
    wanted = dict.fromkeys(parts, 0.0)
    seen, sequences, step = dict.fromkeys(COUNTED, 0), [], 0
    while sum(seen.values()) < ROWS:
        draw = builder.draw(step)
        for group in draw.groups or ():
            rows = 0
            for piece in (draw.pieces[i] for i in group):
                size = builder.measure(piece.ref)
                rows += (size.total if piece.stop is None else piece.stop) - piece.start
                if piece.stop is None:
                    for name, count in zip(COUNTED, size.by_modality, strict=True):
                        seen[name] += count
            sequences.append(rows)
        shares_now = {name: float(part.share.at(step)) for name, part in parts.items()}
        for name, share in shares_now.items():
            wanted[name] += share / sum(shares_now.values())
        step += 1
    total = sum(seen.values())
    for name, share in wanted.items():
        assert seen[name] / total == pytest.approx(share / step, rel=0.01), stage
    assert max(sequences) <= 512
    assert sum(sequences) / (512 * len(sequences)) >= 0.97
