"""The page: curves at the right places, figures with their bars, and nothing of the outside let in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from omni_ray.evaluation.metrics import share
from pipelines.bench.writer import BenchReport
from pipelines.evaluation import to_figure
from pipelines.report_curves import loss_curves, points_of, running_mean, stage_spans, thinned
from pipelines.report_page import Answer, Medium, PageFacts, page, write_page

STEPS: list[dict[str, Any]] = [
    {"step": step, "stage": "S0" if step < 10 else "S1", "loss/text": 2.0 - step / 20} for step in range(20)
]


def facts(**changes: Any) -> PageFacts:
    figures = [
        to_figure(share("text_accuracy", 98, 100)),
        to_figure(share("audio_human_accuracy", 0, 0, left_out="<none>")),
    ]
    told: dict[str, Any] = {
        "title": "a <run>",
        "subtitle": "it & that",
        "tiles": {"minutes": "6.2"},
        "answers": [],
        "report": BenchReport(bench="quickstart", figures=tuple(figures)).to_json(),
        "metrics": STEPS,
        "parts": {"codec": "shipped"},
        "commands": ["omni-ray serve x"],
    }
    return PageFacts(**(told | changes))


def test_words_of_others_are_only_words() -> None:
    said = Answer(title="t", question="<script>alert(1)</script>", expected="b", said='"><img src=x>', right=False)
    text = page(facts(answers=[said]))
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "a &lt;run&gt;" in text
    assert "left out: &lt;none&gt;" in text
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text


def test_media_travel_inside_the_page() -> None:
    shown = (Medium(mime="image/png", raw=b"picture"), Medium(mime="video/mp4", raw=b"film"))
    said = Answer(
        title="t",
        question="q",
        expected="a",
        said="a",
        right=True,
        shown=shown,
        spoken=Medium(mime="audio/wav", raw=b"w"),
    )
    sources = re.findall(r'<(img|video|audio)[^>]* src="(data:[^"]+)"', page(facts(answers=[said])))
    assert sources == [
        ("img", "data:image/png;base64,cGljdHVyZQ=="),
        ("video", "data:video/mp4;base64,ZmlsbQ=="),
        ("audio", "data:audio/wav;base64,dw=="),
    ]


def test_a_bar_is_as_long_as_its_value() -> None:
    text = page(facts())
    assert '<rect y="4" width="98.0" height="8" fill="var(--bar)"/>' in text
    assert '<path d="M95.0 1V15"' in text
    assert '<td class="good">reached</td>' in text


def test_stages_and_points_follow_the_steps() -> None:
    assert stage_spans(STEPS) == [("S0", 0, 9), ("S1", 10, 19)]
    assert points_of(STEPS, "text")[3] == (3, 1.85)
    assert points_of([*STEPS, {"step": 20, "stage": "S1", "loss/text": "nan"}], "text") == points_of(STEPS, "text")
    assert points_of(STEPS, "vision") == []


def test_the_running_mean_is_that_of_the_last_steps() -> None:
    points = [(0, 4.0), (1, 2.0), (2, 0.0), (3, 8.0)]
    assert running_mean(points, window=2) == [(0, 4.0), (1, 3.0), (2, 1.0), (3, 4.0)]


def test_thinning_keeps_both_ends() -> None:
    points = [(i, float(i)) for i in range(1000)]
    kept = thinned(points, 50)
    assert len(kept) == 50
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_a_falling_loss_falls_on_the_picture() -> None:
    text = loss_curves(STEPS)
    assert text.count("<h3>") == 1
    line = re.findall(r'<path d="(M[^"]+)" fill="none"', text)[0]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line)]
    assert len(heights) == 20
    assert heights == sorted(heights)  # y grows downwards
    assert line.count("M") == 1


def test_a_term_that_pauses_is_not_joined_over_the_pause() -> None:
    lines = [{"step": step, "stage": "S", **({} if 5 <= step < 15 else {"loss/vision": 1.0})} for step in range(20)]
    line = re.findall(r'<path d="(M[^"]+)" fill="none"', loss_curves(lines))[0]
    assert line.count("M") == 2


@pytest.mark.parametrize("metrics", [[], STEPS[:1]], ids=["no steps", "one step"])
def test_short_runs_have_a_page_too(metrics: list[dict[str, Any]], tmp_path: Path) -> None:
    write_page(facts(metrics=metrics), tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text().endswith("</html>\n")
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
