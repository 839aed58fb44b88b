"""When submitted calls would end: first in, first out on every actor, one at a time on every device; no clock.

The same list of calls that the driver submits, with a duration each, gives the time of a step before it runs.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """One submitted call."""

    actor: tuple[str, int]
    """Pool and rank; its calls run in the order of submission."""
    device: int
    """What it holds while it runs; colocated actors share one."""
    seconds: float
    """How long it runs."""
    needs: tuple[int, ...] = ()
    """Places in the list of the calls whose results it takes."""


def replay(tasks: Sequence[Task]) -> list[float]:
    """End of every task, in seconds from the start; a task that can never run keeps infinity.

    Of the calls that wait for a device, the one that was ready first gets it (ties: submitted first).
    """
    ends = [float("inf")] * len(tasks)
    left = [len(set(task.needs)) for task in tasks]
    users: defaultdict[int, list[int]] = defaultdict(list)
    queues: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for index, task in enumerate(tasks):
        queues[task.actor].append(index)
        for need in set(task.needs):
            users[need].append(index)
    head = dict.fromkeys(queues, 0)
    free: defaultdict[int, float] = defaultdict(float)
    idle: defaultdict[tuple[str, int], float] = defaultdict(float)
    heap: list[tuple[float, int]] = []

    def offer(actor: tuple[str, int]) -> None:
        queue, place = queues[actor], head[actor]
        if place < len(queue) and left[queue[place]] == 0:
            task = tasks[queue[place]]
            ready = max([idle[actor], *(ends[need] for need in task.needs)])
            heapq.heappush(heap, (ready, queue[place]))

    for actor in queues:
        offer(actor)
    while heap:
        ready, index = heapq.heappop(heap)
        task = tasks[index]
        if free[task.device] > ready:
            heapq.heappush(heap, (free[task.device], index))
            continue
        ends[index] = free[task.device] = idle[task.actor] = ready + task.seconds
        head[task.actor] += 1
        offer(task.actor)
        for user in users[index]:
            left[user] -= 1
            actor = tasks[user].actor
            if left[user] == 0 and queues[actor][head[actor]] == user:
                offer(actor)
    return ends
