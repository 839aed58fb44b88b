"""The feeder: numbered steps through Ray Data, put back in order, handed out piece by piece to whoever needs them.

Ray Data reads, decodes and packs; what is read in which step is arithmetic (data/order.py), so the feeder has no state
but the next step's number.  Media goes from here straight to the pool that encodes it; the driver holds handles only.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from actors.language import StepContext
from actors.transport import pack
from omni_ray.bridge.route import RouteTable
from omni_ray.config.recipe import Recipe
from omni_ray.training.prepare import PreparedStep, StepBuilder
from omni_ray.types.batch import StepPlan
from omni_ray.types.modality import Modality

STEPS_PER_BLOCK = 4
PAUSE_S = 0.02
"""Between two looks of Ray Data's scheduling loop."""
PayloadKey = tuple[str, int, int]
"""('rows', micro-batch, 0), or (modality, micro-batch, encoder rank)."""


class PrepareSteps:
    """The function that Ray Data maps over step numbers; one per decode task."""

    def __init__(self, recipe: Recipe, root: Path) -> None:
        import torch

        torch.set_num_threads(1)
        self.builder = StepBuilder(recipe, root)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prepared = self.builder.build(int(row["step"]))
        packed = (prepared.plan, [pack(b) for b in prepared.batches], prepared.media, prepared.targets, prepared.bad)
        return {"step": row["step"], "prepared": pickle.dumps(packed, protocol=5)}


class Feeder:
    """Prepares steps ahead and gives out their parts; a plain class, held by an actor."""

    def __init__(self, recipe: Recipe, root: Path, first_step: int) -> None:
        self.recipe = recipe
        self.root = root
        self._next = first_step
        self._ready: dict[int, PreparedStep] = {}
        self._rows: Iterator[dict[str, Any]] | None = None

    def plan(self, step: int) -> tuple[StepPlan, tuple[str, ...]]:
        """The plan of a step and its bad samples; steps are asked for in order."""
        if self._rows is None:
            self._rows = self._stream(step)
        while step not in self._ready:
            row = next(self._rows)
            plan, batches, media, targets, bad = pickle.loads(row["prepared"])
            prepared = PreparedStep(plan=plan, batches=batches, media=media, targets=targets, bad=bad)
            self._ready[int(row["step"])] = prepared
        prepared = self._ready[step]
        return prepared.plan, prepared.bad

    def payloads(self, step: int, keys: Sequence[PayloadKey]) -> list[Any]:
        """The parts of a planned step, one object each, and forget the step."""
        prepared = self._ready.pop(step)
        routes = RouteTable.of(prepared.plan)
        out = [self._payload(prepared, routes, key) for key in keys]
        return out[0] if len(out) == 1 else out

    def _payload(self, prepared: PreparedStep, routes: RouteTable, key: PayloadKey) -> Any:
        what, micro_batch, rank = key
        if what == "rows":
            items = tuple(item for item in prepared.plan.items if item.micro_batch == micro_batch)
            targets = frozenset(item.id for item in items) & prepared.targets
            context = StepContext(counts=prepared.plan.counts, items=items, targets=targets)
            return prepared.batches[micro_batch], context
        items = routes.select(micro_batch, Modality(what), rank)
        return {item.id: prepared.media[item.id] for item in items}

    def _stream(self, first: int) -> Iterator[dict[str, Any]]:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        context.custom_execution_callback_classes = [_breathing_callback()]
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
            object_store_memory=200e6
        )
        count = self.recipe.total_steps - first
        blocks = max(1, count // STEPS_PER_BLOCK)  # small blocks, or nothing streams
        steps = ray.data.range(count, override_num_blocks=blocks).map(lambda row: {"step": row["id"] + first})
        prepared = steps.map(
            PrepareSteps,  # type: ignore[arg-type]  # Ray Data makes one per task
            fn_constructor_args=(self.recipe, self.root),
            compute=ray.data.ActorPoolStrategy(size=self.recipe.data.workers),
            num_cpus=1,
        )
        return iter(prepared.iter_rows())


def _breathing_callback() -> type:
    """Let Ray Data's scheduling loop rest.

    While its output is held back, Ray 2.60's streaming executor has nothing to wait for and turns at full speed: a
    whole core, measured, on a machine that has two.  A pause of 20 ms a turn still gives far more than a step needs.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Breathing(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            time.sleep(PAUSE_S)

    return Breathing
