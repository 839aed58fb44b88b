"""Rows of a seen and heard turn: every pair has its place, also one that comes when its second is half heard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omni_ray.config.model import model_preset
from omni_ray.data.tokenizer import Tokenizer
from pipelines.serving.realtime.context import Block, Template, TurnRows


@pytest.fixture(scope="module")
def template(tiny_checkpoint: Path) -> Template:
    return Template(Tokenizer.load(tiny_checkpoint / "tokenizer.json"), model_preset("tiny"))


def rows(count: int) -> np.ndarray:
    return np.ones((count, 160), np.float32)


def told(blocks: list[Block]) -> str:
    """P for a pair, S for sound, E for the end of the sound."""
    return "".join("P" if block.image else "S" if block.rows.features else "E" for block in blocks)


def test_a_late_pair_stands_before_the_sound_of_the_next_second(template: Template) -> None:
    turn = TurnRows(template)
    blocks = turn.hear(rows(5))
    turn.see(0, template.pair(rows(8), 0))
    blocks += turn.hear(rows(20))
    blocks += turn.hear(rows(3), final=True)
    assert told(blocks) == "SSPSSE"


def test_a_late_pair_of_the_last_second_closes_the_turn(template: Template) -> None:
    turn = TurnRows(template)
    blocks = turn.hear(rows(5))
    turn.see(0, template.pair(rows(8), 0))
    assert told(blocks + turn.hear(rows(0), final=True)) == "SPE"


@pytest.mark.parametrize("seen", [0, 1, 3])
def test_pairs_without_sound_end(template: Template, seen: int) -> None:
    turn = TurnRows(template)
    turn.see(seen, template.pair(rows(8), 1000 * seen))
    assert told(turn.hear(rows(0), final=True)) == "P"
