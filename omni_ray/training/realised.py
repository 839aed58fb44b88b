"""What a run has really drawn: rows by modality and samples by source of every stage, beside what the recipe asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from omni_ray.config.mixture import COUNTED
from omni_ray.types.batch import StepPlan
from omni_ray.types.modality import Modality

_COUNTS_AS = {Modality.VISION: "vision", Modality.AUDIO: "speech", Modality.SPEECH: "speech"}


def rows_of(plan: StepPlan) -> dict[str, int]:
    """Rows of a step by what they count as (networks.md section 6): text, vision, speech."""
    rows = dict.fromkeys(COUNTED, 0)
    for item in plan.items:
        rows[_COUNTS_AS[item.modality]] += item.length
    rows["text"] = sum(sum(batch.lengths) for batch in plan.micro_batches) - sum(rows.values())
    return rows


class Realised:
    """Counts of one run, stage by stage."""

    def __init__(self) -> None:
        self._rows: dict[str, Counter[str]] = {}
        self._sources: dict[str, Counter[str]] = {}
        self._samples: dict[str, Counter[str]] = {}

    def add(self, plan: StepPlan) -> None:
        """Count one step."""
        self._rows.setdefault(plan.stage, Counter()).update(rows_of(plan))
        rows = self._sources.setdefault(plan.stage, Counter())
        samples = self._samples.setdefault(plan.stage, Counter())
        for batch in plan.micro_batches:
            for name, length in zip(batch.samples, batch.lengths, strict=True):
                source = name.partition(":")[0]
                rows[source] += length
                samples[source] += 1

    def report(self) -> dict[str, dict[str, Any]]:
        """Stage -> {rows: {modality: rows}, sources: {source: {rows, samples}}}; a cut sample counts once a piece."""
        return {
            stage: {
                "rows": {name: rows[name] for name in COUNTED},
                "sources": {
                    source: {"rows": count, "samples": self._samples[stage][source]}
                    for source, count in self._sources[stage].most_common()
                },
            }
            for stage, rows in self._rows.items()
        }


def realised_text(report: Mapping[str, Mapping[str, Any]], bad: Mapping[str, int]) -> str:
    """One line a stage: shares of rows by modality, then by source; and the samples that could not be used."""
    lines = []
    for stage, found in report.items():
        total = max(1, sum(found["rows"].values()))
        modalities = "  ".join(f"{name} {count / total:.1%}" for name, count in found["rows"].items())
        sources = ", ".join(f"{name} {facts['rows'] / total:.1%}" for name, facts in found["sources"].items())
        lines.append(f"  data {stage}: {modalities} of {total} rows; {sources}")
    if bad:
        lines.append("  could not be used: " + ", ".join(f"{count} of {name}" for name, count in bad.items()))
    return "\n".join(lines)
