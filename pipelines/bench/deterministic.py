"""What ``deterministic: true`` costs: a training step with it over the same step without, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pipelines.bench.writer import Figure, alternate, measured


@contextmanager
def deterministic_kernels(on: bool) -> Iterator[None]:
    """Torch's kernels as the recipe's switch sets them, and afterwards as they were."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


def deterministic_cost(step: Callable[[], float], name: str, repeats: int) -> Figure:
    """Seconds of a step with deterministic kernels over seconds without.

    Args:
        step: Makes one step and returns its seconds.  name: Of the figure.
    """

    def side(on: bool) -> Callable[[], float]:
        def run() -> float:
            with deterministic_kernels(on):
                return step()

        return run

    times = alternate({"with": side(True), "without": side(False)}, repeats, step)
    ratios = [slow / fast for slow, fast in zip(times["with"], times["without"], strict=True)]
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    return measured(name, ratios, unit="ratio", better="lower", against=f"the same step without, {device}")
