"""Replayed calls: queues in order, devices exclusive, dependencies waited for."""

from __future__ import annotations

import math

import pytest

from omni_ray.schedule.replay import Task, replay


def test_calls_of_one_actor_run_in_order_and_wait_for_what_they_need() -> None:
    tasks = [
        Task(("vision", 0), 0, 1.0),
        Task(("language", 0), 1, 3.0, (0,)),
        Task(("vision", 0), 0, 2.0, (1,)),
        Task(("vision", 0), 0, 1.0),
    ]
    assert replay(tasks) == [1.0, 4.0, 6.0, 7.0], "the last waits behind the backward that waits for the gradient"


def test_a_device_runs_one_call_at_a_time() -> None:
    tasks = [Task(("a", 0), 7, 2.0), Task(("b", 0), 7, 2.0), Task(("c", 0), 8, 2.0)]
    assert replay(tasks) == [2.0, 4.0, 2.0]


@pytest.mark.parametrize("devices", [1, 4])
def test_total_time_is_bounded_by_work_and_by_the_longest_chain(devices: int) -> None:
    tasks = [Task(("p", i % 8), i % devices, 0.5 + i % 3, ((i - 5),) if i >= 5 and i % 2 else ()) for i in range(40)]
    ends = replay(tasks)
    work = sum(task.seconds for task in tasks)
    assert all(map(math.isfinite, ends))
    assert work / devices <= max(ends) <= work
    for index, task in enumerate(tasks):
        assert ends[index] >= max([0.0, *(ends[n] for n in task.needs)]) + task.seconds - 1e-9


def test_a_circle_never_ends() -> None:
    tasks = [Task(("a", 0), 0, 1.0, (1,)), Task(("b", 0), 1, 1.0, (0,))]
    assert replay(tasks) == [math.inf, math.inf]
