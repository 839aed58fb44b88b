"""The quickstart's page: its report, answers and loss curves brought together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_ray.observability.events import read_events
from omni_ray.observability.metrics import METRICS_FILE
from pipelines.quickstart_answers import Shown
from pipelines.report_page import PageFacts, write_page

SUBTITLE = (
    "A small model that reads, sees, watches, listens and speaks: trained from its first weights on this machine, "
    "vision, audio, speech and language each in a pool of its own."
)


def write_quickstart_page(
    path: Path,
    document: Mapping[str, Any],
    shown: Sequence[Shown],
    parts: Mapping[str, str],
    commands: Sequence[str],
    run: Path,
) -> None:
    """Write the page of a run.

    Args:
        path: Where.  document: The report.  shown: Answers.  parts: Part -> where its weights come from.
        commands: How to go on.  run: Folder with metrics.jsonl.
    """
    metrics = run / METRICS_FILE
    facts = PageFacts(
        title="omni-ray quickstart",
        subtitle=SUBTITLE,
        tiles=_tiles(document),
        answers=[one.answer for one in shown],
        report=document,
        metrics=read_events(metrics) if metrics.is_file() else [],
        parts=parts,
        commands=commands,
    )
    write_page(facts, path)


def _tiles(document: Mapping[str, Any]) -> dict[str, str]:
    by_name = {figure["name"]: figure for figure in document["figures"]}
    judged = [figure["reached"] for figure in document["figures"] if figure.get("reached") is not None]
    tiles = {
        "minutes from data to answers": f"{by_name['minutes']['value']:.1f}",
        "GiB of memory at most": f"{by_name['peak_memory_gib']['value']:.1f}",
        "held-out goals reached": f"{sum(judged)} of {len(judged)}",
    }
    return tiles
