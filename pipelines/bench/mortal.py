"""Actors that die when told: by SIGKILL, at the start of a named phase, or from outside at any moment.

A folder holds the orders and the process ids: an order ``vision-0-encode`` with the text ``2`` ends that rank's process
when it enters the phase for the third time from now.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from actors.feeder import Feeder
from actors.pool_actor import PoolActor

PHASES = (
    "encode",
    "language",
    "encoder_backward",
    "add_pieces",
    "finish",
    "step",
    "keep_snapshot",
    "hold",
    "start_saving",
)


def mortal_classes(folder: Path) -> tuple[type, type]:
    """(pool actor, feeder) that obey the orders of ``folder``."""
    (folder / "pids").mkdir(parents=True, exist_ok=True)
    (folder / "orders").mkdir(exist_ok=True)

    class MortalActor(PoolActor):
        """A pool's actor under orders."""

        def adopt(self, recipe: Any, rank: Any) -> None:
            """Become a rank, and say which process it is."""
            super().adopt(recipe, rank)
            self.name, self.entered = f"{rank.pool}-{rank.rank}", dict.fromkeys(PHASES, 0)
            write_pid(folder, self.name)

        def enter(self, phase: str) -> None:
            """Die if this is the moment."""
            order = folder / "orders" / f"{self.name}-{phase}" if self.worker is not None else None
            if order is None or not order.exists():
                return
            if self.entered[phase] < int(order.read_text(encoding="utf-8") or 0):
                self.entered[phase] += 1
                return
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    class MortalFeeder(Feeder):
        """A feeder that says which process it is."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            write_pid(folder, "feeder-0")

    return MortalActor, MortalFeeder


def write_pid(folder: Path, name: str) -> None:
    """Note this process under a rank's name, whole or not at all."""
    aside = folder / "pids" / f".{name}.{os.getpid()}"
    aside.write_text(str(os.getpid()), encoding="utf-8")
    aside.replace(folder / "pids" / name)


def order_death(folder: Path, name: str, phase: str, skip: int = 0) -> Path:
    """Order a rank to die when it enters ``phase`` after ``skip`` more times; returns the order, gone once obeyed."""
    order = folder / "orders" / f"{name}-{phase}"
    aside = order.with_name(f".{order.name}")
    aside.write_text(str(skip), encoding="utf-8")
    aside.replace(order)
    return order


def kill_now(folder: Path, name: str) -> int:
    """SIGKILL a rank's process at once; returns its id."""
    pid = int((folder / "pids" / name).read_text(encoding="utf-8"))
    os.kill(pid, signal.SIGKILL)
    return pid
