"""Held-out figures of an untrained checkpoint: every name is there, in the form of the targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from held_out_world import COUNT, write_held_out

from omni_ray.evaluation.metrics import TARGETS
from omni_ray.types.errors import CheckpointError, DataError
from pipelines.bench.writer import report_from_json
from pipelines.evaluation import evaluate, table

LIMIT = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    write_held_out(folder)
    return folder


@pytest.fixture(scope="module")
def document(tiny_checkpoint: Path, root: Path) -> dict[str, Any]:
    return evaluate(tiny_checkpoint, data=root, limit=LIMIT, open_judge=False)


def test_every_target_is_measured_in_their_form(document: dict[str, Any]) -> None:
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert [name for name in figures if name in {row.name for row in TARGETS}] == [row.name for row in TARGETS]
    for row in TARGETS:
        figure = figures[row.name]
        assert (figure["goal"], figure["better"], figure["n"] > 0) == (row.first, "higher", True)
        low, high = figure["interval_95"]
        assert 0 <= low <= figure["value"] <= high
        assert figure["runs"] == [figure["value"]]
    assert figures["image_digit_accuracy"]["n"] == LIMIT
    assert figures["spoken_answer_word_accuracy"]["n"] == 2 * LIMIT
    assert document["bench"] == "evaluate"
    assert document["environment"]["trained_on_this_data"] is False
    assert json.loads(json.dumps(document)) == document


def test_an_untrained_model_reaches_nothing(document: dict[str, Any]) -> None:
    reached = {figure["name"]: figure["reached"] for figure in document["figures"]}
    assert not any(reached.values())
    assert reached["text_accuracy"] is False


def test_same_checkpoint_same_figures(document: dict[str, Any], tiny_checkpoint: Path, root: Path) -> None:
    again = evaluate(tiny_checkpoint, data=root, limit=LIMIT, open_judge=False)
    assert again["figures"] == document["figures"]


def test_the_table_tells_what_was_missed_and_what_was_left_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_held_out(tmp_path, people=False, mnist=False)
    figures = evaluate(tiny_checkpoint, data=tmp_path, limit=LIMIT, open_judge=False)
    lines = {line.split()[0]: line for line in table(figures).splitlines()}
    assert "left out" in lines["audio_human_accuracy"]
    assert "OMNI_RAY_REAL_DATA" in lines["audio_human_accuracy"]
    assert "MISSED" in lines["text_accuracy"]
    assert report_from_json(figures).to_json() == figures


def test_all_samples_count_without_a_limit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_held_out(tmp_path)
    for folder in tmp_path.iterdir():
        if folder.is_dir() and folder.name != "text":
            (folder / "held_out-00000.tar").unlink()
    figures = {f["name"]: f for f in evaluate(tiny_checkpoint, data=tmp_path, open_judge=False)["figures"]}
    assert figures["text_accuracy"]["n"] == COUNT
    assert figures["spoken_answer_exact"]["value"] is None


def test_refuses_what_it_cannot_measure(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no held-out shards"):
        evaluate(tiny_checkpoint, data=tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        evaluate(tmp_path / "nothing")
