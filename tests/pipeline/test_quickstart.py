"""The whole path in small: data that lie there, ten steps over four pools, figures, answers, one page; then again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import soundfile
from held_out_world import write_held_out
from mini_world import mini_recipe, write_components, write_world

from omni_ray.checkpoint import store
from omni_ray.config.load import save_recipe
from omni_ray.evaluation.metrics import TARGETS
from omni_ray.types.errors import CheckpointError, ResourceError
from pipelines import quickstart as module
from pipelines.quickstart import Spent, check_machine, describe_parts, quickstart, run_figures, summary


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "world").mkdir()
    write_world(folder / "world")
    write_held_out(folder / "world")
    write_components(folder / "components")
    save_recipe(mini_recipe(folder), folder / "mini.yaml")
    return folder


@pytest.fixture(scope="module")
def run(base: Path, ray_cluster: None) -> tuple[Path, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMNI_RAY_INSTALL_SECONDS", "90")
        return base / "run", begin(base)


def begin(base: Path) -> dict[str, Any]:
    components = str(base / "components")
    return quickstart(base / "run", recipe=str(base / "mini.yaml"), components=components, open_judge=False)


@pytest.mark.ray
@pytest.mark.slow
def test_the_report_names_every_figure(run: tuple[Path, dict[str, Any]]) -> None:
    out, document = run
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert list(figures)[:3] == ["minutes", "install_minutes", "peak_memory_gib"]
    assert {row.name for row in TARGETS} <= set(figures)
    assert figures["install_minutes"]["value"] == 1.5
    assert (figures["minutes"]["goal"], figures["peak_memory_gib"]["goal"]) == (12, 12)
    assert figures["peak_memory_gib"]["value"] > 0.2
    assert json.loads((out / "report.json").read_text()) == document
    assert document["bench"] == "quickstart"


@pytest.mark.ray
@pytest.mark.slow
def test_answers_are_saved_and_shown_on_a_page_that_needs_no_other_file(run: tuple[Path, dict[str, Any]]) -> None:
    out, document = run
    answers = document["environment"]["answers"]
    files = [file for answer in answers for file in answer["files"]]
    assert {Path(file).suffix for file in files} == {".png", ".wav", ".mp4"}
    assert all((out / "answers" / file).stat().st_size for file in files)
    spoken = [file for file in files if file.endswith("answer.wav")]
    assert spoken
    assert all(soundfile.info(out / "answers" / file).samplerate == 24000 for file in spoken)
    page = (out / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == len(files)
    assert all(source.startswith("data:") for source in sources)
    assert "<script" not in page
    assert page.count('aria-label="Text: loss over steps"') == 1
    assert all(f'">{stage}</text>' in page for stage in ("S0", "S1", "S2", "S5"))
    assert "$" not in re.sub(r'src="[^"]*"', "", page)


@pytest.mark.ray
@pytest.mark.slow
def test_again_says_that_it_is_done(
    run: tuple[Path, dict[str, Any]], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, document = run
    assert store.read_state(out / "checkpoint")["step"] == 10
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "spent.json"}
    assert begin(base) == document
    assert "is done already" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {p.name for p in before if before[p] != after[p]} <= {"events.jsonl"}


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_end_goes_on_without_training_again(run: tuple[Path, dict[str, Any]], base: Path) -> None:
    out, document = run
    (out / "report.json").unlink()
    steps = (out / "plans.jsonl").read_text()
    again = begin(base)
    assert (out / "plans.jsonl").read_text() == steps
    shares = [[f for f in d["figures"] if "chance" in f] for d in (document, again)]
    assert shares[0] == shares[1]
    minutes = [next(f["value"] for f in d["figures"] if f["name"] == "minutes") for d in (document, again)]
    assert minutes[1] > minutes[0]


@pytest.mark.ray
@pytest.mark.slow
def test_other_components_are_another_run(run: tuple[Path, dict[str, Any]], base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"was begun with components .*/components, not shipped; choose another"):
        quickstart(run[0], recipe=str(base / "mini.yaml"), components="shipped")


@pytest.mark.ray
@pytest.mark.slow
def test_the_summary_tells_how_to_go_on(run: tuple[Path, dict[str, Any]]) -> None:
    out, document = run
    text = summary(document, out)
    assert f"omni-ray serve {out / 'checkpoint'}" in text
    assert "language model: trained here from nothing, in S0, S1, S2" in text
    assert "audio_human_accuracy" in text


def test_parts_say_what_was_shipped_and_what_was_trained(tmp_path: Path) -> None:
    parts = describe_parts(mini_recipe(tmp_path, components="shipped"))
    assert parts["vision encoder"] == "shipped; trained further in S2"
    assert parts["codec"] == "shipped; not changed"
    assert parts["audio projector"] == "trained here in S2, S5"


def test_time_and_memory_add_up_over_calls(tmp_path: Path) -> None:
    path = tmp_path / "spent.json"
    path.write_text(json.dumps({"seconds": {"train": 60.0, "data": 30.0}, "peak_gib": 5.0}))
    spent = Spent.read(path)
    figures = {figure.name: figure for figure in run_figures(spent)}
    assert figures["minutes"].value == 1.5
    assert figures["train_minutes"].value == 1.0
    assert figures["peak_memory_gib"].value == 5.0
    path.write_text("{torn")
    assert Spent.read(path).seconds == {}


def test_install_minutes_are_not_run_without_make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMNI_RAY_INSTALL_SECONDS", raising=False)
    figures = {figure.name: figure for figure in run_figures(Spent(path=tmp_path / "spent.json"))}
    assert figures["install_minutes"].value is None
    assert "make quickstart" in figures["install_minutes"].not_run


def test_too_little_memory_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "total_memory_bytes", lambda: 3 * 2**30)
    with pytest.raises(ResourceError, match=r"has 3\.0 GiB of memory, yet the quickstart needs 6; give it more"):
        check_machine()
