"""Held-out figures of a checkpoint: a report document in the form of the targets, and its table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_ray.evaluation.metrics import HeldOutFigure
from omni_ray.observability.progress import Progress
from omni_ray.types.errors import CheckpointError
from pipelines.bench.writer import BenchReport, Figure, environment

BENCH = "evaluate"


def evaluate(
    checkpoint: Path,
    *,
    data: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    open_judge: bool = True,
) -> dict[str, Any]:
    """Measure a checkpoint on held-out samples.

    Args:
        checkpoint: Folder of a whole checkpoint.  data: Built data; None: that of the checkpoint's recipe, built on
            first use.  limit: Samples per task at most.  seed: Which ones, where some are left out.
        open_judge: Let the open-vocabulary recogniser hear some clips as well, where it is installed.
    Returns:
        ``{"bench": "evaluate", "environment": ..., "figures": [...]}``; each figure with ``chance``,
        ``interval_95`` and ``reached``.
    Raises:
        CheckpointError: not a whole checkpoint.  DataError: no held-out shards.
    """
    from omni_ray.config.load import load_recipe
    from pipelines.training.data_root import data_root

    started = time.monotonic()
    state = _state(checkpoint)
    root = data if data is not None else data_root(load_recipe(str(checkpoint / "recipe.yaml")))
    figures = evaluate_model(checkpoint, root, limit=limit, seed=seed, open_judge=open_judge)
    further = {
        "checkpoint": str(checkpoint),
        "step": state.get("step"),
        "data": str(root),
        "trained_on_this_data": _same_data(state, root),
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
    }
    return BenchReport(bench=BENCH, figures=tuple(figures), environment=environment(**further)).to_json()


def evaluate_model(
    checkpoint: Path, root: Path, *, limit: int | None = None, seed: int = 0, open_judge: bool = True
) -> list[Figure]:
    """The figures alone, in the order of the targets, further ones after those they belong to."""
    from omni_ray.evaluation.answerer import ModelAnswerer
    from omni_ray.evaluation.spoken import MOST_SPOKEN, spoken_figures
    from omni_ray.evaluation.tasks import HeldOut, count_questions, dialogue_figure, text_figures

    held_out = HeldOut(root, limit=limit, seed=seed)
    with Progress("evaluate", count_questions(held_out, MOST_SPOKEN), unit="answer") as progress:
        answerer = ModelAnswerer.load(checkpoint, progress.advance)
        spoken = spoken_figures(answerer, answerer.codec, answerer.speech_rate_hz, held_out, with_open=open_judge)
        written, dialogue = text_figures(answerer, held_out), dialogue_figure(answerer, held_out)
        found = [*written, *spoken(), dialogue]
    return [to_figure(figure) for figure in found]


def to_figure(figure: HeldOutFigure) -> Figure:
    """A held-out share as a figure of the targets."""
    extra = {
        "chance": round(figure.chance, 4),
        "interval_95": [round(figure.low, 4), round(figure.high, 4)] if figure.value is not None else None,
        "reached": figure.reached,
        **figure.extra,
    }
    return Figure(
        name=figure.name,
        value=figure.value,
        unit="ratio" if "ratio" in figure.name else "fraction",
        better="higher",
        goal=figure.goal,
        against=figure.task,
        n=figure.n,
        runs=() if figure.value is None else (figure.value,),
        not_run=figure.left_out if figure.value is None else "",
        extra=extra,
    )


def table(document: Mapping[str, Any]) -> str:
    """A report document for people: value, interval, chance, goal, cases, task; other figures with goal alone."""
    header = ("figure", "value", "95 %", "chance", "goal", "", "n", "")
    return _columns([header, *(_row(figure) for figure in document["figures"])])


def _row(figure: Mapping[str, Any]) -> tuple[str, ...]:
    value, goal = figure["value"], figure["goal"]
    sign = "≥" if figure["better"] == "higher" else "≤"
    wanted = "" if goal is None else f"{sign} {goal:g}"
    if value is None:
        return figure["name"], "left out", "", "", wanted, "", "0", str(figure.get("not_run", ""))
    interval = figure.get("interval_95")
    reached = figure.get("reached", _meets(figure))
    unit = "" if figure["unit"] in ("fraction", "ratio") else f" {figure['unit']}"
    return (
        figure["name"],
        f"{value:.3f}{unit}",
        f"{interval[0]:.2f}–{interval[1]:.2f}" if interval else "",
        f"{figure['chance']:.2f}" if "chance" in figure else "",
        wanted,
        {True: "reached", False: "MISSED", None: ""}[reached],
        str(figure["n"]),
        figure["against"],
    )


def _meets(figure: Mapping[str, Any]) -> bool | None:
    if figure["goal"] is None:
        return None
    return bool(
        figure["value"] >= figure["goal"] if figure["better"] == "higher" else figure["value"] <= figure["goal"]
    )


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]
    return "\n".join(lines)


def _state(checkpoint: Path) -> dict[str, Any]:
    from omni_ray.checkpoint.store import read_state

    state = read_state(checkpoint)
    if not (checkpoint / "recipe.yaml").is_file():
        raise CheckpointError(f"{checkpoint} has no recipe.yaml; it was not written by this program's training")
    return state


def _same_data(state: Mapping[str, Any], root: Path) -> bool:
    from pipelines.training.data_root import data_fingerprint

    return (root / "manifest.json").is_file() and state.get("data") == data_fingerprint(root)
