"""The server's side of the chaos bench: what it holds, and kills of its replicas."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omni_ray.observability.events import emit

STAGES = ("vision", "audio", "language", "speech")
REPLICAS = 2
"""Of each stage."""
BACK_S = 180.0
"""A replica that was killed must be back within this; the bench's own patience, not a promise."""
PAUSE_S = (0.5, 2.0)
"""Between the return of what was killed and the next kill; drawn."""
AT_WHOLE_STAGE = 4
"""Every so many kills all replicas of the stage are killed: then its sessions must be told."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL, or one of each replica of a stage."""

    stage: str
    whole: bool
    """No replica was left."""
    processes: int
    at: float
    back: float
    """Wall clock; when all replicas answered again, infinite if they never did."""


def census() -> dict[str, Any]:
    """What every process of the application holds: the gateway's numbers and each replica's."""
    from ray import serve
    from ray.util import list_named_actors

    found: dict[str, Any] = {"actors": len(list_named_actors(all_namespaces=True))}
    for stage in STAGES:
        handle = serve.get_deployment_handle(stage, "omni-ray")
        found[stage] = handle.broadcast("census").results(timeout_s=30)
    found["gateway"] = serve.get_deployment_handle("gateway", "omni-ray").census.remote().result(timeout_s=30)
    return found


def leaks(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """What is held after and was not before, by name: nothing of a session may stay anywhere."""
    grown = {"actors": after["actors"] - before["actors"]}
    for what in ("sessions", "in_flight", "connections"):
        grown[f"gateway {what}"] = after["gateway"][what]
    for what in ("threads", "tasks"):
        grown[f"gateway {what}"] = after["gateway"][what] - before["gateway"][what]
    for stage in STAGES:
        for what in ("sessions", "pages"):
            grown[f"{stage} {what}"] = sum(replica[what] for replica in after[stage])
        for what in ("threads", "tasks"):
            usual = max(replica[what] for replica in before[stage])
            grown[f"{stage} {what}"] = sum(max(0, replica[what] - usual) for replica in after[stage])
    return {name: count for name, count in grown.items() if count > 0}


def memory_growth(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Growth of the process that grew most, of those that were there before and still are."""
    processes = {one["pid"]: one["rss_bytes"] for one in _processes(before)}
    growths = [one["rss_bytes"] / processes[one["pid"]] - 1 for one in _processes(after) if one["pid"] in processes]
    return max(growths)


def _processes(found: dict[str, Any]) -> list[dict[str, int]]:
    return [found["gateway"], *(replica for stage in STAGES for replica in found[stage])]


def settle(before: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], dict[str, int]]:
    """Wait until nothing more is held than before, or the time is up; the last census and what stayed."""
    end = time.monotonic() + timeout_s
    while True:
        after = census()
        stayed = leaks(before, after)
        if not stayed or time.monotonic() > end:
            return after, stayed
        time.sleep(1.0)


@dataclass
class Killer:
    """Kills replicas at random moments, one stage at a time, each after those of the last are back."""

    seed: int
    most: int
    """Kills."""
    over: Path
    """File that appears after the last."""
    replicas: int
    """Of each stage."""
    kills: list[Kill] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draws = np.random.default_rng([self.seed, 7])
        self._thread = threading.Thread(target=self._run, name="killer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the last one's replicas are back."""
        self._thread.join()

    def _run(self) -> None:
        order = [str(stage) for _ in range(self.most) for stage in self._draws.permutation(STAGES)][: self.most]
        for number, stage in enumerate(order, start=1):
            time.sleep(float(self._draws.uniform(*PAUSE_S)))
            self.kills.append(self._kill(stage, self.replicas == 1 or number % AT_WHOLE_STAGE == 0))
        self.over.touch()

    def _kill(self, stage: str, whole: bool) -> Kill:
        pids = [one["pid"] for one in census()[stage]]
        chosen = pids if whole else [int(self._draws.choice(pids))]
        emit("chaos_kill", stage=stage, replicas=len(chosen))
        at = time.time()
        for pid in chosen:
            os.kill(pid, signal.SIGKILL)
        back = self._wait_back(stage, set(chosen))
        return Kill(stage, whole, len(chosen), at, back)

    def _wait_back(self, stage: str, dead: set[int]) -> float:
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        handle = serve.get_deployment_handle(stage, "omni-ray")
        end = time.monotonic() + BACK_S
        while time.monotonic() < end:
            try:
                there = handle.broadcast("census").results(timeout_s=10)
                if len([one for one in there if one["pid"] not in dead]) >= self.replicas:
                    return time.time()
            except (RayError, RayServeException, TimeoutError):
                pass
            time.sleep(0.3)
        return float("inf")


def stray_stream() -> None:
    """A leak put in on purpose: a stream on one replica of the audio stage that nobody will end."""
    _audio().hear.remote("session_of_nobody", 0, 0, np.zeros(16000, np.float32), False).result(timeout_s=30)


def end_stray_stream() -> None:
    """Take it back."""
    _audio().broadcast("forget", "session_of_nobody").results(timeout_s=30)


def _audio() -> Any:
    from ray import serve

    return serve.get_deployment_handle("audio", "omni-ray")
