"""The log of step plans: one line a step, each step once; a step that runs again must have the plan it had."""

from __future__ import annotations

from pathlib import Path

from omni_ray.observability.metrics import keep_steps_before
from omni_ray.types.batch import StepPlan
from omni_ray.types.errors import PlanError


class PlanLog:
    """Writes ``plans.jsonl``.

    Args:
        path: The file.  first_step: The step this run begins with; lines of an interrupted run from there on go.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        keep_steps_before(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._recent: dict[int, str] = {}

    def write(self, plan: StepPlan) -> bool:
        """Log a plan, or check the plan of a step that is replayed; returns whether it is new.

        Raises:
            PlanError: the replayed step got another plan than it was recorded with.
        """
        line = plan.to_json()
        known = self._recent.get(plan.step)
        if known is None:
            self._file.write(line + "\n")
            self._recent[plan.step] = line
            return True
        if known != line:
            raise PlanError(
                f"step {plan.step} is replayed with another plan than it was recorded with; the sources changed under "
                "the run: restore them and resume from a checkpoint"
            )
        return False

    def forget(self, before: int) -> None:
        """Steps below ``before`` will not run again."""
        self._recent = {step: line for step, line in self._recent.items() if step >= before}

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
