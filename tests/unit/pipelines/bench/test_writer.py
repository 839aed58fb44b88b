"""Figures: median, spread, goals, figures not run, and the fixed JSON form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_ray.types.errors import ConfigError, NotYetError, OmniError
from pipelines.bench import BENCHES, built_benches, run_bench
from pipelines.bench.writer import (
    BenchReport,
    Figure,
    alternate,
    counted,
    environment,
    measured,
    negative_control,
    not_run,
    write_report,
)

KEYS = ["name", "value", "unit", "better", "goal", "against", "n", "runs"]


def test_value_is_the_median_and_the_json_form_is_fixed() -> None:
    record = measured("speed", [3.0, 1.0, 10.0], unit="ratio", better="higher", goal=2, against="a over b").to_json()
    assert list(record) == KEYS
    assert (record["value"], record["n"], record["runs"]) == (3.0, 3, [3.0, 1.0, 10.0])


@pytest.mark.parametrize(
    ("better", "value", "reached"),
    [("higher", 2, True), ("higher", 1.9, False), ("lower", 2, True), ("lower", 2.1, False)],
)
def test_a_goal_is_the_least_that_counts(better: str, value: float, reached: bool) -> None:
    assert measured("f", [value], unit="s", better=better, goal=2).reached is reached  # type: ignore[arg-type]


def test_figures_without_goal_or_value_are_neither_reached_nor_missed() -> None:
    assert measured("f", [1.0], unit="s", better="lower").reached is None
    skipped = not_run("f", "needs a GPU", unit="s", better="lower", goal=1)
    assert skipped.reached is None
    assert skipped.to_json()["value"] is None
    assert skipped.to_json()["not_run"] == "needs a GPU"


def test_no_runs_is_refused() -> None:
    with pytest.raises(
        OmniError, match=r"^figure 'f' has no runs; a figure that could not be measured is written with"
    ):
        measured("f", [], unit="s", better="lower")


def test_report_file_is_strict_json_in_the_form_of_the_targets(tmp_path: Path) -> None:
    accuracy = Figure(name="acc", value=0.9, unit="fraction", better="higher", n=200, extra={"chance": 0.1})
    broken = measured("nan", [float("nan")], unit="s", better="lower", goal=1)
    report = BenchReport(bench="exact", figures=(accuracy, broken), environment=environment(seed=3))
    write_report(report, tmp_path / "deep" / "report.json")
    read = json.loads((tmp_path / "deep" / "report.json").read_text(), parse_constant=pytest.fail)
    assert list(read) == ["bench", "environment", "figures"]
    assert read["environment"]["seed"] == 3
    assert read["environment"]["packages"]["ray"]
    assert read["figures"][0]["chance"] == 0.1
    assert read["figures"][1]["value"] is None
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.json"]


def test_table_shows_spread_goal_and_verdict() -> None:
    figures = (
        measured("ratio", [1.5, 1.0, 2.0], unit="ratio", better="higher", goal=1.2, against="pipelined over barrier"),
        counted("failures", 2, n=64),
        negative_control(1, "a flipped bit"),
        not_run("gpu_ms", "needs a GPU", unit="ms", better="lower"),
    )
    lines = BenchReport(bench="overlap", figures=figures, environment={}).table().splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["ratio", "failures", "negative_control", "gpu_ms"]
    assert lines[2].split("  ")[0] == "ratio"
    assert "1..2" in lines[2]
    assert "≥ 1.2" in lines[2]
    assert "reached" in lines[2]
    assert lines[2].endswith("pipelined over barrier")
    assert "MISSED" in lines[3]
    assert "reached" in lines[4]
    assert "not run: needs a GPU" in lines[5]


def test_sides_run_in_turns() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    results = alternate({"a": lambda: side("a"), "b": lambda: side("b")}, 3, warm_up=lambda: calls.append("warm"))
    assert calls == ["warm", "a", "b", "a", "b", "a", "b"]
    assert results == {"a": (2.0, 4.0, 6.0), "b": (3.0, 5.0, 7.0)}


def test_unknown_bench_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^there is no bench 'overlapp'; the nearest is 'overlap' \(known: "):
        run_bench("overlapp")


def test_benches_without_a_module_refuse_by_name() -> None:
    missing = [name for name in BENCHES if name not in built_benches()]
    for name in missing:
        with pytest.raises(
            NotYetError, match=rf"^bench '{name}' \(.*\) is not built yet in this version; built so far: "
        ):
            run_bench(name)
