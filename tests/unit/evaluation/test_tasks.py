"""Which samples ask for which figure, what the model is shown, and how its answers are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from held_out_world import COUNT, turn, words, write_held_out, write_samples

from omni_ray.evaluation.tasks import (
    HeldOut,
    Question,
    Said,
    count_questions,
    dialogue_figure,
    question_of,
    text_figures,
)
from omni_ray.types.errors import DataError


class Scripted:
    """Answers by a rule and remembers what it was shown."""

    def __init__(self, rule: Callable[[Question], str]) -> None:
        self.rule = rule
        self.shown: list[Question] = []

    def answer(self, questions: Sequence[Question], *, aloud: bool, max_tokens: int) -> list[Said]:
        assert not aloud
        self.shown += questions
        return [Said(text=self.rule(question)) for question in questions]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    write_held_out(folder)
    return folder


def test_right_answers_are_counted_for_every_figure(root: Path) -> None:
    figures = {figure.name: figure for figure in text_figures(Scripted(lambda q: q.expected), HeldOut(root))}
    assert {figure.value for figure in figures.values()} == {1.0}
    assert figures["image_digit_accuracy"].n == figures["image_digit_accuracy_sklearn"].n == COUNT
    assert figures["text_accuracy"].n == COUNT


def test_a_model_that_never_listens_is_found_out(tmp_path: Path) -> None:
    write_held_out(tmp_path)
    pairs_by_key = {sample.key: sample.facts["answer"] for sample in HeldOut(tmp_path).of("cross_modal_both")}
    figures = text_figures(Scripted(lambda q: pairs_by_key.get(q.key, "red seven")), HeldOut(tmp_path))
    found = {figure.name: figure for figure in figures}
    assert (found["cross_modal_accuracy"].value, found["cross_modal_accuracy"].n) == (1.0, COUNT)
    assert (found["cross_modal_one_word_accuracy"].value, found["cross_modal_one_word_accuracy"].n) == (0.0, 2 * COUNT)


def test_wrong_answers_are_not_counted(root: Path) -> None:
    figures = text_figures(Scripted(lambda q: f"{q.expected} {q.expected}"), HeldOut(root))
    assert {figure.value for figure in figures} == {0.0}


def test_the_answer_is_never_shown(root: Path) -> None:
    held_out = HeldOut(root)
    questions = [question_of(sample) for sample in held_out.of("spoken_answer")]
    assert len(questions) == 12
    assert all(question.media == {} and len(question.messages) == 1 for question in questions)
    seen = question_of(held_out.of("image_digit")[0])
    assert list(seen.media) == ["image.png"]


def test_unseen_writers_decide_where_they_are_at_hand(root: Path, tmp_path: Path) -> None:
    write_held_out(tmp_path, mnist=False, people=False)
    with_mnist = text_figures(Scripted(lambda q: q.expected), HeldOut(root))
    without = text_figures(Scripted(lambda q: q.expected), HeldOut(tmp_path))
    assert with_mnist[0].extra["pictures"] == "mnist"
    assert without[0].extra["pictures"] == "sklearn"
    assert (without[0].name, without[0].goal, without[0].n) == ("image_digit_accuracy", 0.80, 2 * COUNT)


def test_human_speech_is_left_out_by_name_where_there_is_none(tmp_path: Path) -> None:
    write_held_out(tmp_path, people=False)
    figures = {figure.name: figure for figure in text_figures(Scripted(lambda q: ""), HeldOut(tmp_path))}
    assert figures["audio_human_accuracy"].value is None
    assert figures["audio_human_accuracy"].left_out.startswith("no human speech")


def test_a_dialogue_goes_on_from_the_models_own_answers(root: Path) -> None:
    model = Scripted(lambda q: "seven" if len(q.messages) == 5 else "some colour")
    figure = dialogue_figure(model, HeldOut(root))
    assert (figure.value, figure.n) == (1.0, COUNT)
    final = [question for question in model.shown if len(question.messages) == 5]
    own: list[Any] = [turn("assistant", words("some colour"))] * 2
    assert all([question.messages[1], question.messages[3]] == own for question in final)
    first = [question for question in model.shown if len(question.messages) == 1]
    assert all(list(question.media) == ["first.png"] for question in first)


def test_the_seed_draws_where_samples_are_left_out(root: Path) -> None:
    def drawn(seed: int) -> list[str]:
        return [sample.key for sample in HeldOut(root, limit=5, seed=seed).of("image_digit")]

    assert len(drawn(0)) == 5
    assert drawn(0) == drawn(0) != drawn(1)
    assert [sample.key for sample in HeldOut(root, limit=3).first("spoken_answer")] == [
        f"speech_text-{i:04d}" for i in range(12, 15)
    ]


def test_only_held_out_shards_are_read(root: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "text", [("text_question", [], {}, {"task": "text", "answer": "red"})])
    (tmp_path / "text" / "held_out-00000.tar").rename(tmp_path / "text" / "train-00000.tar")
    with pytest.raises(DataError, match=r"has no held-out shards \(SOURCE/held_out-\*\.tar\)"):
        HeldOut(tmp_path)


@pytest.mark.parametrize("limit", [None, 2])
def test_the_number_of_questions_is_known_before(root: Path, limit: int | None) -> None:
    model, held_out = Scripted(lambda q: q.expected), HeldOut(root, limit=limit)
    text_figures(model, held_out)
    dialogue_figure(model, held_out)
    assert count_questions(held_out, most_spoken=3) == len(model.shown) + min(3, limit or 3)
