"""The session engine: a session's rows are those of the plain engine, whoever shares its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_ray.inference.omni_model import load_model
from omni_ray.inference.requests import GenerationRequest
from pipelines.serving.errors import ApiError
from pipelines.serving.session_engine import SessionEngine
from pipelines.serving.stages import AnswerOptions, Rows, SessionLostError

WORDS = ["which digit is it", "say blue two and red seven", "one two three four five", "left or right"]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    torch.set_num_threads(1)
    return load_model(tiny_checkpoint)


def prompt(model: Any, number: int) -> Rows:
    return Rows.of_text(model.tokenizer.encode(f"USER:{WORDS[number]}\nVOICE ASSISTANT:"))


def alone(model: Any, number: int, voice: bool, temperature: float, most: int) -> list[list[int]]:
    request = GenerationRequest(
        ids_T5=torch.from_numpy(prompt(model, number).ids_T5),
        voice=voice,
        max_tokens=most,
        temperature=temperature,
        seed=number,
    )
    rows: list[list[int]] = model.engine.generate([request])[0].ids_R5.tolist()
    return rows


def test_sessions_that_come_and_go_are_answered_as_if_alone(model: Any) -> None:
    """Four sessions begin one step after another, spoken and written, greedy and drawn, and end at their own times."""
    engine = SessionEngine(model.engine)
    plans = [(True, 0.0, 12), (False, 0.0, 5), (True, 0.0, 9), (True, 1.0, 10)]
    rows: dict[str, list[list[int]]] = {str(i): [] for i in range(4)}
    for step in range(30):
        if step < 4:
            voice, temperature, most = plans[step]
            options = AnswerOptions(voice=voice, max_tokens=most, temperature=temperature, seed=step)
            engine.start(str(step), 0, prompt(model, step), options)
        for name, made in engine.step(engine.running).items():
            rows[name].append(made.row_5.tolist())
    assert not engine.running
    for number, (voice, temperature, most) in enumerate(plans):
        assert rows[str(number)] == alone(model, number, voice, temperature, most)


def test_a_cut_session_goes_on_as_if_the_cut_rows_had_never_been(model: Any) -> None:
    engine = SessionEngine(model.engine)
    whole, other = prompt(model, 0), prompt(model, 1)
    engine.start("a", 0, other, AnswerOptions(voice=True, max_tokens=8))
    for _ in range(5):
        engine.step(["a"])
    engine.extend("a", 1, whole.since(1))  # both begin with USER:
    again = [Rows(ids_T5=whole.ids_T5[-1:])]
    engine.start("a", len(whole) - 1, again[0], AnswerOptions(voice=True, max_tokens=6))
    made = [engine.step(["a"])["a"].row_5.tolist() for _ in range(6)]
    assert made == alone(model, 0, True, 0.0, 6)
    with pytest.raises(SessionLostError):
        engine.extend("a", 10_000, whole)
    with pytest.raises(SessionLostError):
        engine.extend("never", 1, whole)
    with pytest.raises(ApiError, match="positions; send less"):
        engine.extend("a", 0, Rows.of_text([5] * 5000))
    engine.forget("a")
    assert (len(engine), engine.rows) == (0, 0)


@pytest.mark.parametrize("voice", [True, False], ids=["spoken", "written"])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kept", [1, 5, 11])
def test_another_engine_goes_on_with_an_answer_as_if_it_had_made_it_all(
    model: Any, voice: bool, temperature: float, kept: int
) -> None:
    """Beside an answer of its own, which does not feel the newcomer."""
    whole = alone(model, 2, voice, temperature, 16)
    engine = SessionEngine(model.engine)
    engine.start("own", 0, prompt(model, 1), AnswerOptions(voice=True, max_tokens=16, temperature=1.0, seed=1))
    own = [engine.step(["own"])["own"].row_5.tolist() for _ in range(3)]
    made_R5 = np.array(whole[:kept])
    left = AnswerOptions(voice=voice, max_tokens=16 - kept, temperature=temperature, seed=2, made_R5=made_R5)
    engine.start("moved", 0, prompt(model, 2), left)
    moved: list[list[int]] = []
    while engine.running:
        for name, made in engine.step(engine.running).items():
            (own if name == "own" else moved).append(made.row_5.tolist())
    assert whole[:kept] + moved == whole
    assert own == alone(model, 1, True, 1.0, 16)
