"""Recovery: SIGKILL of any actor at any phase; the same final bits, little work lost, quicker than a restart."""

from __future__ import annotations

import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.cluster import local_or_joined
from omni_ray.checkpoint import store
from omni_ray.config.load import check_recipe, load_recipe, save_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.observability.events import EventLog, emit, event_log_to, read_events
from pipelines.bench.mortal import kill_now, mortal_classes, order_death
from pipelines.bench.writer import BenchReport, Figure, counted, environment, measured, negative_control
from pipelines.training.loop import TrainResult, train

SNAPSHOT_EVERY = 4
STEPS_BETWEEN = 9
"""Steps from a recovery to the next kill, at least; a spare warms up meanwhile."""
KILLS_A_RUN = 5
PATIENCE_STEPS = 3 * SNAPSHOT_EVERY
"""Steps after which an order to die is taken back: this rank does not come into that phase now."""
RESTARTS = 3
RANKS = ("language-0", "language-1", "vision-0", "vision-1", "audio-0", "speech-0", "feeder-0")
PHASES_OF = {
    "language": ("language", "finish", "step", "keep_snapshot", "hold", "start_saving"),
    "vision": ("encode", "encoder_backward", "finish", "step", "keep_snapshot", "hold", "start_saving"),
    "audio": ("encode", "encoder_backward", "finish", "step", "keep_snapshot", "hold", "start_saving"),
    "speech": ("encode",),
}
DEADLINE_S = 90.0
HANGS_AFTER_S = 900.0
"""A job that comes to no step for this long hangs; no figure depends on it."""


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """Kills over several runs, each run against the undisturbed one.

    Args:
        quick: 10 kills instead of 50.  seed: Draws who dies when, and other weights.
    """
    runs = 2 if quick else 10
    base = Path(tempfile.mkdtemp(prefix="omni-recovery-"))
    rng = random.Random(seed)
    try:
        with local_or_joined():
            recipe = recovery_recipe(seed)
            expected = weights(train(recipe, base / "undisturbed", quiet=True))
            kills: list[Kill] = []
            wrong = 0
            number = 0
            while number < runs or (len(kills) < runs * KILLS_A_RUN and number < 2 * runs):
                found, result = one_run(recipe, base / f"run-{number}", random.Random(rng.random()))
                wrong += bool(differing(weights(result), expected)) or not result.finished
                kills += found
                number += 1
                emit("kills", run=number, kills=len(kills), wrong=wrong, lost=max((k.lost for k in found), default=0))
        restarts = [restart_s(recipe, base / f"restart-{turn}", expected) for turn in range(2 if quick else RESTARTS)]
    finally:
        shutil.rmtree(base, ignore_errors=True)
    control = negative_control(int(len(differing(flipped(expected), expected)) == 1), "flip of one bit of one weight")
    figures = (
        counted("kills", len(kills), n=len(kills), goal=10 if quick else 50, better="higher", against=_KILLS),
        counted("wrong_endings", wrong, n=number, goal=0, against="runs whose weights differ from the undisturbed"),
        control,
        *_figures(kills, restarts),
    )
    phases = sorted({f"{kill.name} {kill.phase}" for kill in kills})
    facts = environment(seed=seed, quick=quick, spares=recipe.pools.spares, deaths=phases)
    return BenchReport(bench="recovery", environment=facts, figures=figures)


def _figures(kills: list[Kill], restarts: list[float]) -> list[Figure]:
    seconds = [kill.recovery_s for kill in kills]
    restart = statistics.median(restarts)
    without_feeder = [kill.recovery_s for kill in kills if not kill.name.startswith("feeder")]
    worst, ratios = [max(kill.lost for kill in kills)], [second / restart for second in seconds]
    interval = "worst kill; the snapshot interval"
    return [
        measured("lost_steps", worst, unit="steps", better="lower", goal=SNAPSHOT_EVERY, against=interval),
        measured("recovery_over_restart", ratios, unit="ratio", better="lower", goal=0.30, against=_RESTART),
        measured("recovery_s", seconds, unit="s", better="lower"),
        measured("recovery_without_feeder_s", without_feeder, unit="s", better="lower"),
        measured("restart_s", restarts, unit="s", better="lower", against="ends with the same bits"),
    ]


_RESTART = "kill to the next new step, over SIGKILL of the driver and train --resume to the next new step"
_KILLS = "SIGKILL of any rank: half at the start of a phase, half at any moment"


def flipped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with one bit changed."""
    name = next(iter(weights))
    changed = weights[name].clone()
    changed.view(torch.int32).view(-1)[0] ^= 1
    return weights | {name: changed}


def recovery_recipe(seed: int) -> Recipe:
    """A short run in which every pool has work; two pools of two ranks, two of one."""
    raw = load_recipe("tiny", [f"seed={seed}", "pools.vision.actors=2", "pools.language.actors=2"]).model_dump(
        mode="json"
    )
    stage = {
        "name": "recovery",
        "steps": KILLS_A_RUN * (STEPS_BETWEEN + SNAPSHOT_EVERY + 4) + 20,
        "mixture": {"text": 3, "picture": 4, "speech_text": 2, "audio_synthetic": 3},
        "trainable": ["language", "audio_heads", "vision", "vision_projector", "audio", "audio_projector"],
        "micro_batches": 3,
    }
    checkpoint = raw["checkpoint"] | {"every_steps": 4, "snapshot_every": SNAPSHOT_EVERY}
    return check_recipe(raw | {"stages": [stage], "checkpoint": checkpoint})


@dataclass(slots=True, kw_only=True)
class Kill:
    """One kill and what followed."""

    name: str
    """Rank that died."""
    phase: str
    """Phase at whose start, or ``any moment``."""
    lost: int = 0
    """Steps that had ended and ran again."""
    recovery_s: float = 0.0
    """From the kill until a step that had not ended before has ended."""


@dataclass(slots=True)
class _Killer:
    """Kills one rank after another while a run goes on in the main thread."""

    folder: Path
    metrics: Path
    rng: random.Random
    kills: list[Kill] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def ended(self) -> int:
        """Steps that have ended, by the metrics."""
        return ended_steps(self.metrics)

    def run(self) -> None:
        """The killer's life."""
        while len(self.kills) < KILLS_A_RUN and not self.stop.is_set():
            target = self.ended() + STEPS_BETWEEN if self.kills else STEPS_BETWEEN + 2
            if not self._until(lambda wanted=target: self.ended() >= wanted):  # type: ignore[misc]
                return
            name = self.rng.choice(RANKS)
            if self.rng.random() < 0.5 and not name.startswith("feeder"):
                kill = Kill(name=name, phase=self.rng.choice(PHASES_OF[name.partition("-")[0]]))
                if not self._obeyed(kill):
                    continue
            else:
                kill = Kill(name=name, phase="any moment")
                time.sleep(self.rng.random() * 0.3)
                kill_now(self.folder, name)
            started = time.perf_counter()
            highest = self._until_recovered()
            if not self._until(lambda least=highest: self.ended() > least):  # type: ignore[misc]
                return
            kill.recovery_s = time.perf_counter() - started
            self.kills.append(kill)

    def _obeyed(self, kill: Kill) -> bool:
        """Order a death and wait for it; by steps, not seconds, since the run must not end meanwhile."""
        order = order_death(self.folder, kill.name, kill.phase, self.rng.randrange(2))
        until = self.ended() + PATIENCE_STEPS
        self._until(lambda: not order.exists() or self.ended() >= until)
        try:
            order.unlink()
        except FileNotFoundError:
            return True
        return False  # this rank does not come into that phase (it holds nobody's snapshot, say)

    def _until_recovered(self) -> int:
        """The most steps that had ended when the loss was mended: steps in flight may still end after the kill."""
        highest, events = self.ended(), self.folder.parent / "events.jsonl"
        while not self.stop.is_set():
            highest = max(highest, self.ended())
            found = [event for event in read_events(events) if event["event"] == "recovered"] if events.exists() else []
            if len(found) > len(self.kills):
                return highest
            time.sleep(0.02)
        return highest

    def _until(self, holds, limit_s: float = DEADLINE_S) -> bool:  # type: ignore[no-untyped-def]
        until = time.perf_counter() + limit_s
        while time.perf_counter() < until and not self.stop.is_set():
            if holds():
                return True
            time.sleep(0.02)
        return False


def one_run(recipe: Recipe, out: Path, rng: random.Random) -> tuple[list[Kill], TrainResult]:
    """A run under fire."""
    folder = out / "mortal"
    actor, feeder = mortal_classes(folder)
    killer = _Killer(folder, out / "run" / "metrics.jsonl", rng)
    thread = threading.Thread(target=killer.run, daemon=True)
    with event_log_to(EventLog(jsonl=out / "events.jsonl")):
        thread.start()
        result = train(recipe, out / "run", quiet=True, actor=actor, feeder=feeder)
    killer.stop.set()
    thread.join()
    lost = [int(event["lost_steps"]) for event in read_events(out / "events.jsonl") if event["event"] == "recovered"]
    for kill, steps in zip(killer.kills, lost, strict=False):
        kill.lost = steps
    return killer.kills, result


def restart_s(recipe: Recipe, out: Path, expected: dict[str, Tensor]) -> float:
    """SIGKILL of the driver of a whole job, then ``train --resume``: seconds to the next new step.

    Raises:
        AssertionError: the restarted run ends with other bits.
    """
    out.mkdir(parents=True)
    save_recipe(recipe, out / "recipe.yaml")
    command = [sys.executable, "-m", "pipelines.cli", "train", str(out / "recipe.yaml"), "--out", str(out / "run")]
    metrics, checkpoints = out / "run" / "metrics.jsonl", out / "run" / "checkpoints"
    with (out / "log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log)
        _wait(lambda: ended_steps(metrics) >= 10 and bool(store.newest(checkpoints)), first, out / "log")
        first.send_signal(signal.SIGKILL)
        started, before = time.perf_counter(), ended_steps(metrics)
        first.wait()
        second = subprocess.Popen([*command, "--resume"], stdout=log, stderr=log)
        _wait(lambda: ended_steps(metrics) > before, second, out / "log")
        seconds = time.perf_counter() - started
        assert second.wait(timeout=HANGS_AFTER_S) == 0, _tail(out / "log")
    newest = store.newest(checkpoints)
    assert newest is not None
    assert differing(weights_of(newest), expected) == []
    return seconds


def _wait(holds, running: subprocess.Popen[bytes], log: Path) -> None:  # type: ignore[no-untyped-def]
    """Wait as long as the job may yet come to it: a busy machine is slow, a job that ended or hangs is an error."""
    until = time.perf_counter() + HANGS_AFTER_S
    while not holds():
        assert running.poll() is None, f"the job ended before its next step: {_tail(log)}"
        assert time.perf_counter() < until, f"the job did not come to its next step: {_tail(log)}"
        time.sleep(0.02)


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]


def ended_steps(metrics: Path) -> int:
    """Steps that have ended, by the last line of metrics.jsonl."""
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"]) + 1
        except ValueError:
            continue
    return 0


def weights(result: TrainResult) -> dict[str, Tensor]:
    """Final weights of a run."""
    assert result.checkpoint is not None
    return weights_of(result.checkpoint)


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint by network and published name."""
    found: dict[str, Tensor] = {}
    for name in ("language", "vision", "audio"):
        for path in sorted((checkpoint / "model" / name).glob("*.safetensors")):
            found |= {f"{name}/{key}": value for key, value in load_file(path).items()}
    return found


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names whose tensors differ in any bit."""
    names = first.keys() ^ second.keys()
    return sorted(names | {k for k in first.keys() & second.keys() if not torch.equal(first[k], second[k])})
