"""Compiled work shared out over as many threads as torch uses, each with its own room."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

LEAST_ROWS = 64
"""A share of fewer rows is not worth another thread."""


def share_out(count: int, least: int, work: Callable[[int, int], None]) -> None:
    """``work(first, end)`` over ``count`` things, in as many threads as torch uses; compiled calls let others run."""
    shares = min(torch.get_num_threads(), max(1, count // least))
    if shares == 1:
        work(0, count)
        return
    ends = [count * share // shares for share in range(shares + 1)]
    begun = [_threads(shares).submit(work, a, b) for a, b in itertools.pairwise(ends)]
    wait(begun)  # all of them: the operands must live until nobody reads them any more
    for done in begun:
        done.result()


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="passes")


class Scratch:
    """Memory of each thread that lives from call to call, as large as the largest of them."""

    def __init__(self) -> None:
        self._kept = threading.local()

    def __call__(self, size: int) -> int:
        """Address of at least ``size`` bytes, whose contents mean nothing."""
        room: torch.Tensor | None = getattr(self._kept, "room", None)
        if room is None or len(room) < size:
            room = self._kept.room = torch.empty(size, dtype=torch.uint8, device="cpu")
        return room.data_ptr()
