"""Slept pools: the real driver and schedule over actors that sleep while they hold a simulated device.

A device is one exclusive lock (a file's), so colocated ranks contend for it as they would.  These actors import no
torch.  Everything else is the run's own: submission order, routes, credits, object store, one norm, one step.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_ray.types.batch import ItemRoute


class SleptActor:
    """A rank of any pool; takes the place of a ``PoolActor``.

    Args:
        folder: Where the devices' lock files lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None
        self.busy_s = 0.0
        self.calls = 0

    def take_device(self, device: int, scale: float, passes: tuple[float, float]) -> bool:
        """Sit on a device.

        Args:
            scale: Seconds per TFLOP.  passes: Cost of the language call and of an encoder's backward, in forwards.
        Returns:
            Whether this process has imported torch.
        """
        if self._lock is not None:
            os.close(self._lock)
        self._lock = os.open(self.folder / f"device-{device}", os.O_CREAT | os.O_RDWR)
        self.passes = passes
        self.scale, self.busy_s, self.calls = scale, 0.0, 0
        self._costs: dict[int, float] = {}
        return "torch" in sys.modules

    def usage(self) -> tuple[float, int]:
        """Seconds for which this rank held its device since it sat down, and its calls."""
        return self.busy_s, self.calls

    def _work(self, tflop: float) -> None:
        assert self._lock is not None
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        started = time.perf_counter()
        try:
            time.sleep(tflop * self.scale)
        finally:
            self.busy_s += time.perf_counter() - started
            self.calls += 1
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def invoke(self, method: str, *args: Any) -> Any:
        """What the driver asks of every worker."""
        if method == "take_statistics":
            return np.zeros(8), np.zeros((1, 64), np.int64)
        return method == "set_stage"

    def encode(self, micro_batch: int, items: Sequence[ItemRoute], returns: int, credit: Any, *media: Any) -> Any:
        """Encoder forward of a micro-batch's items."""
        self._costs[micro_batch] = sum(item.cost for item in items)
        self._work(self._costs[micro_batch])
        pieces = [np.zeros(1, np.float32)] * returns
        return pieces if returns > 1 else pieces[0]

    def encoder_backward(self, micro_batch: int, *pieces: Any) -> None:
        """Forward again, then backward."""
        self._work(self._costs.pop(micro_batch) * self.passes[1])

    def language(
        self, micro_batch: int, payload: float, layout: Sequence[tuple[Any, int]], wanted: Any, *pieces: Any
    ) -> Any:
        """Forward and backward; ``payload``: the forward's cost."""
        self._work(payload * self.passes[0])
        back = [np.zeros(1, np.float32) for modality, count in layout if modality in wanted for _ in range(count)]
        return [None, *back] if back else None

    def finish(self, *others: Any) -> float:
        """Nothing to add up."""
        return 0.0

    def step(self, step: int, *norms_squared: float) -> tuple[float, bool]:
        """Nothing to step."""
        return 0.0, True

    def balance(self, step: int, made: tuple[float, bool], *statistics: Any) -> None:
        """Nothing to balance."""


class SleptFeeder:
    """Hands out the language cost of every micro-batch."""

    def __init__(self) -> None:
        self._language: dict[int, Sequence[float]] = {}

    def load(self, step: int, language: Sequence[float]) -> None:
        """Costs of a step's micro-batches."""
        self._language[step] = language

    def payloads(self, step: int, keys: Sequence[tuple[str, int, int]]) -> Any:
        """The parts of a step, one object each."""
        costs: Mapping[int, float] = dict(enumerate(self._language.pop(step)))
        out: list[Any] = [costs[micro_batch] if what == "rows" else {} for what, micro_batch, _ in keys]
        return out if len(out) > 1 else out[0]
