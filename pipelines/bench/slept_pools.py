"""Runs slept steps: actors placed on simulated devices, the driver's own step over them, devices checked afterwards."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.pool import Pool
from omni_ray.config.load import load_recipe
from omni_ray.config.parallel import Schedule
from omni_ray.schedule.replay import replay
from omni_ray.types.errors import OmniError
from pipelines.bench.slept import SleptActor, SleptFeeder
from pipelines.bench.table2 import MICRO_BATCHES, Layout, Load, draw_loads, plan_of, separate, tasks_of
from pipelines.training.loop import IN_FLIGHT
from pipelines.training.step import StepDriver, StepHandles

WINDOW = 4
CALL_S = 0.0015
"""What a call costs beside its work, for the search of pool sizes alone; measured on two cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SleptRun:
    """One measured step, or the mean of several in flight."""

    seconds: float
    """Wall time of a step."""
    micro_batches: int
    """How many the step had."""
    device_busy: float
    """Largest busy share of a device."""
    calls: int
    """Calls of all actors."""

    @property
    def rate(self) -> float:
        """Micro-batches per second."""
        return self.micro_batches / self.seconds


class SleptCluster:
    """Slept actors for every layout of a bench.

    Args:
        actors: How many ranks the largest layout has.  scale: Seconds per TFLOP.
    """

    def __init__(self, actors: int, scale: float) -> None:
        self.scale = scale
        self.folder = Path(tempfile.mkdtemp(prefix="omni-devices-"))
        remote: Any = ray.remote(SleptActor)
        self.actors = [remote.options(num_cpus=0.01).remote(self.folder) for _ in range(actors)]
        self.feeder: Any = ray.remote(SleptFeeder).options(num_cpus=0.01).remote()
        ray.get([actor.usage.remote() for actor in self.actors])
        self._step = 0

    def run(self, layout: Layout, kind: str, loads: list[Load], *, media: bool = True, steps: int = 1) -> SleptRun:
        """One step of a layout, or several over the same loads, as many in flight as in training.

        Raises:
            OmniError: a device was busy for longer than the step took, or an actor has imported torch.
        """
        pools, devices = self._seat(layout)
        # Numbers are of no interest here, so nothing is exchanged for the order of sums.
        recipe = load_recipe("tiny", [])
        schedule = Schedule(kind=kind, window=WINDOW, reduce="fast", timeout_s=120)  # type: ignore[arg-type]
        driver = StepDriver(recipe.model_copy(update={"schedule": schedule}), pools, self.feeder)
        driver.live = {"language": True, "vision": media, "audio": media, "speech": False}
        plans = []
        for _ in range(steps):
            self._step += 1
            plan, language = plan_of(loads, layout.ranks, self._step, media)
            ray.get(self.feeder.load.remote(self._step, language))
            plans.append(plan)
        started = time.perf_counter()
        flying: deque[StepHandles] = deque()
        for plan in plans:
            flying.append(driver.submit(plan))
            if len(flying) == IN_FLIGHT:
                driver.collect(flying.popleft())
        while flying:
            driver.collect(flying.popleft())
        seconds = time.perf_counter() - started
        used: defaultdict[int, float] = defaultdict(float)
        usage = ray.get([actor.usage.remote() for actor in self.actors[: len(devices)]])
        for device, (busy_s, _) in zip(devices, usage, strict=True):
            used[device] += busy_s
        most = max(used.values()) / seconds
        if most > 1.0:
            raise OmniError(f"a simulated device was busy for {most:.3f} of the step; its lock does not exclude")
        return SleptRun(
            seconds=seconds / steps,
            micro_batches=len(loads),
            device_busy=most,
            calls=sum(calls for _, calls in usage) // steps,
        )

    def _seat(self, layout: Layout) -> tuple[dict[str, Pool], list[int]]:
        sizes = {"language": layout.language, "vision": layout.encoders, "audio": layout.encoders, "speech": 0}
        pools, devices, start = {}, [], 0
        waiting = []
        for name, size in sizes.items():
            seated = self.actors[start : start + size]
            pools[name] = Pool(name=name, actors=tuple(seated))
            for rank, actor in enumerate(seated):
                devices.append(layout.device(name, rank))
                waiting.append(actor.take_device.remote(devices[-1], self.scale, layout.passes))
            start += size
        if any(ray.get(waiting)):
            raise OmniError("a slept actor has imported torch")
        return pools, devices

    def close(self) -> None:
        """End the actors."""
        for actor in (*self.actors, self.feeder):
            ray.kill(actor)
        shutil.rmtree(self.folder, ignore_errors=True)


def predicted_rate(layout: Layout, kind: str, seed: int, scale: float) -> float:
    """Micro-batches per second of a layout, by replaying its calls; for choosing pool sizes."""
    loads = draw_loads(seed, MICRO_BATCHES * layout.language)
    plan, language = plan_of(loads, layout.ranks, 0)
    tasks = tasks_of(plan, language, layout, kind, WINDOW * layout.language, CALL_S / scale)
    return len(loads) / (max(replay(tasks)) * scale)


def best_layout(devices: int, kind: str, seed: int, scale: float) -> Layout:
    """The split of the devices that the replay finds fastest for a schedule."""
    layouts = [separate(devices, encoders) for encoders in range(1, devices // 2 + 1)]
    return max(layouts, key=lambda layout: predicted_rate(layout, kind, seed, scale))
