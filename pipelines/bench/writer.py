"""One form for every measured figure: a table for people, a JSON document for programs."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from omni_ray.types.errors import OmniError

Better = Literal["higher", "lower"]
ENVIRONMENT_PACKAGES = ("ray", "torch", "torchvision", "torchaudio", "numpy", "omni-ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number with its goal and the runs behind it."""

    name: str
    """Fixed name of the targets, for instance ``pipelined_over_barrier``."""
    value: float | None
    """Median of the runs; None where it could not be measured (``not_run`` says why)."""
    unit: str
    """``ratio``, ``s``, ``ms``, ``GiB``, ``count``, ``fraction``, ..."""
    better: Better
    """Which way is better."""
    goal: float | None = None
    """The least that counts: reached means at least (higher) or at most (lower) this. None: only reported."""
    against: str = ""
    """What over what, in words."""
    n: int = 1
    """Cases behind the value: runs of a timing, samples of an accuracy, kills of a count."""
    runs: tuple[float, ...] = ()
    """Each run's value."""
    not_run: str = ""
    """Why there is no value, for instance ``needs a GPU``."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the JSON form, for instance ``chance`` and an interval's ends."""

    @property
    def reached(self) -> bool | None:
        """Whether the goal is met; None without a goal or a value."""
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal

    def to_json(self) -> dict[str, Any]:
        """The figure in the form of the targets; not-a-number becomes null, which JSON has a word for."""
        record: dict[str, Any] = {
            "name": self.name,
            "value": _finite(self.value),
            "unit": self.unit,
            "better": self.better,
            "goal": self.goal,
            "against": self.against,
            "n": self.n,
            "runs": [_finite(run) for run in self.runs],
        }
        if self.not_run:
            record["not_run"] = self.not_run
        return record | dict(self.extra)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def measured(
    name: str, runs: Sequence[float], *, unit: str, better: Better, goal: float | None = None, against: str = ""
) -> Figure:
    """A figure whose value is the median of its runs.

    Raises:
        OmniError: without runs there is no median; use :func:`not_run`.
    """
    if not runs:
        raise OmniError(f"figure {name!r} has no runs; a figure that could not be measured is written with not_run()")
    value = float(statistics.median(runs))
    return Figure(
        name=name, value=value, unit=unit, better=better, goal=goal, against=against, n=len(runs), runs=tuple(runs)
    )


def counted(
    name: str, count: int, *, n: int, goal: float | None = 0, better: Better = "lower", against: str = ""
) -> Figure:
    """A count of failures among ``n`` cases."""
    return Figure(name=name, value=count, unit="count", better=better, goal=goal, against=against, n=n, runs=(count,))


def negative_control(caught: int, injected: str) -> Figure:
    """The fault put in on purpose that the bench must have counted, exactly once.

    Args:
        caught: How often the bench counted it.
        injected: What was injected: a flip, leak, duplicate or drop.
    """
    return Figure(
        name="negative_control",
        value=caught,
        unit="count",
        better="higher",
        goal=1,
        against=f"injected: {injected}",
        n=1,
        runs=(caught,),
    )


def not_run(name: str, why: str, *, unit: str, better: Better, goal: float | None = None, against: str = "") -> Figure:
    """A figure that is named although it could not be measured here."""
    return Figure(name=name, value=None, unit=unit, better=better, goal=goal, against=against, n=0, not_run=why)


def environment(**further: Any) -> dict[str, Any]:
    """The machine and the versions that a figure belongs to; ``further``: seed, quick, sizes."""
    versions: dict[str, str | None] = {}
    for package in ENVIRONMENT_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(total_memory_bytes() / 2**30, 1),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": versions,
        **further,
    }


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def total_memory_bytes() -> int:
    """Memory of the machine, or of the container if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """All figures of one bench."""

    bench: str
    """Name of the bench."""
    figures: tuple[Figure, ...]
    """In the order of the targets."""
    environment: Mapping[str, Any] = field(default_factory=environment)
    """Machine, versions, seed."""

    def to_json(self) -> dict[str, Any]:
        """The document of the targets: ``bench``, ``environment``, ``figures``."""
        return {
            "bench": self.bench,
            "environment": dict(self.environment),
            "figures": [figure.to_json() for figure in self.figures],
        }

    def table(self) -> str:
        """Figures in columns: value, spread of the runs, goal, whether it is reached, cases, what over what."""
        rows = [("figure", "value", "spread", "goal", "", "n", "against")]
        rows += [_row(figure) for figure in self.figures]
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[6]]).rstrip()
            for row in rows
        ]
        return "\n".join([f"bench {self.bench}", *lines])


def _row(figure: Figure) -> tuple[str, str, str, str, str, str, str]:
    if figure.value is None:
        value = f"not run: {figure.not_run}" if figure.not_run else "none"
    else:
        value = f"{figure.value:.4g} {figure.unit}"
    spread = f"{min(figure.runs):.4g}..{max(figure.runs):.4g}" if len(figure.runs) > 1 else ""
    goal = "" if figure.goal is None else f"{'≥' if figure.better == 'higher' else '≤'} {figure.goal:g}"
    word = {True: "reached", False: "MISSED", None: ""}[figure.reached]
    return figure.name, value, spread, goal, word, str(figure.n), figure.against


def write_report(report: BenchReport, path: Path) -> None:
    """Write the JSON document; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def alternate(
    sides: Mapping[str, Callable[[], float]], repeats: int, warm_up: Callable[[], object] | None = None
) -> dict[str, tuple[float, ...]]:
    """Run the sides of a ratio in turns, so that a slow minute of the machine falls on all of them.

    Args:
        sides: Name -> a function that does the work once and returns its figure (seconds, samples per second).
        repeats: Runs of each side.
        warm_up: Called once before, not measured.
    Returns:
        Name -> the figure of each run, in order: run ``i`` of one side belongs to run ``i`` of the other.
    """
    if warm_up is not None:
        warm_up()
    results: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            results[name].append(side())
    return {name: tuple(values) for name, values in results.items()}


def report_from_json(document: Mapping[str, Any]) -> BenchReport:
    """Read a document of the form of the targets back, for instance to print its table."""
    known = ("name", "value", "unit", "better", "goal", "against", "n", "not_run")
    figures = tuple(
        Figure(
            **{key: record[key] for key in known if key in record},
            runs=tuple(record.get("runs", ())),
            extra={key: value for key, value in record.items() if key not in (*known, "runs")},
        )
        for record in document["figures"]
    )
    return BenchReport(bench=document["bench"], figures=figures, environment=document["environment"])
