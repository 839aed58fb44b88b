"""Samples that could not be used: counted per source, kept with shard and key, and a rate above which a run stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from omni_ray.types.errors import DataError

LISTED = 20
"""Bad samples that the last message names."""
FREE = 10
"""Bad samples of a source that never stop a run: a rate of so few says nothing."""


class BadSamples:
    """Counts of one run. What is skipped never depends on them: they only decide whether the run goes on."""

    def __init__(self, max_fraction: float) -> None:
        self.max_fraction = max_fraction
        """Bad share of the samples read from a source above which the run stops."""
        self.drawn: Counter[str] = Counter()
        """Samples used, by source."""
        self.bad: Counter[str] = Counter()
        """Samples that could not be used, by source; every time that one is met counts."""
        self._listed: dict[str, dict[str, None]] = {}

    def add(self, drawn: Iterable[str], bad: Iterable[str]) -> None:
        """Count one step.

        Args:
            drawn: References ``source:index`` of the step.  bad: Sentences ``source:index: why``.
        """
        self.drawn.update(reference.partition(":")[0] for reference in drawn)
        for sentence in bad:
            source = sentence.partition(":")[0]
            self.bad[source] += 1
            listed = self._listed.setdefault(source, {})
            if len(listed) < LISTED:
                listed[sentence] = None

    def check(self) -> None:
        """Stop where a source is worse than the stated rate.

        Raises:
            DataError: with the list of its bad samples.
        """
        for source, count in sorted(self.bad.items()):
            read = count + self.drawn[source]
            if count > FREE and count > self.max_fraction * read:
                listed = "\n  ".join(self._listed[source])
                raise DataError(
                    f"{count} of {read} samples read from {source!r} could not be used, above "
                    f"data.max_bad_fraction {self.max_fraction:g}; mend the source or raise the limit. "
                    f"The first of them:\n  {listed}"
                )

    def counts(self) -> dict[str, int]:
        """Bad samples by source, as events and reports show them."""
        return dict(sorted(self.bad.items()))
