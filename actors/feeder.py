"""The feeder: numbered steps through Ray Data, put back in order, handed out piece by piece to whoever needs them.

Ray Data reads, decodes and packs; what is read in which step is arithmetic (data/planner.py), so that the feeder's
state is the data position: a step number, and for nested mixtures and packing a small record.  Media goes from here
straight to the pool that encodes it; the driver holds handles only.
"""

from __future__ import annotations

import os
import pickle
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.drawing import draw_dataset, needs_drawing
from actors.language import StepContext
from actors.transport import pack
from omni_ray.bridge.route import RouteTable
from omni_ray.config.recipe import Recipe
from omni_ray.data.order_state import OrderState
from omni_ray.training.gap_measure import next_measurement, validation_recipe
from omni_ray.training.prepare import PreparedStep, StepBuilder
from omni_ray.types.batch import StepPlan
from omni_ray.types.modality import Modality

STEPS_PER_BLOCK = 4
BLOCK_BYTES = 4096
"""Ray Data joins rows into blocks of so many bytes before it passes them on: a few draws, or one prepared step. By its
default, 128 MiB, the draws of a whole curriculum were one block, for one decode worker, before the first plan."""
KEPT_POSITIONS = 64
"""Data positions that are kept behind the newest plan; a checkpoint asks for one of the last few."""
PAUSE_S = 0.02
"""Between two looks of Ray Data's scheduling loop."""
PayloadKey = tuple[str, int, int]
"""('rows', micro-batch, 0), or (modality, micro-batch, encoder rank)."""


class PrepareSteps:
    """The function that Ray Data maps over step numbers; one per decode task."""

    def __init__(self, recipe: Recipe, root: Path, state: OrderState | None = None) -> None:
        import torch

        torch.set_num_threads(1)
        self.builder = StepBuilder(recipe, root, state=state)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        draw = pickle.loads(row["draw"]) if "draw" in row else self.builder.draw(int(row["step"]))
        prepared = self.builder.assemble(draw)
        batches = [pack(batch) for batch in prepared.batches]
        packed = (prepared.plan, batches, prepared.media, prepared.targets, prepared.bad, prepared.after)
        return {"step": row["step"], "worker": os.getpid(), "prepared": pickle.dumps(packed, protocol=5)}


class Feeder:
    """Prepares steps ahead and gives out their parts; a plain class, held by an actor."""

    def __init__(self, recipe: Recipe, root: Path, first_step: int, state: OrderState | None = None) -> None:
        """Start.

        Args:
            recipe: The run.  root: Data root.  first_step: Step that is asked for first.
            state: Data position of a resumed run; None = the recipe's own at ``first_step``.
        """
        self.recipe = recipe
        self.state = state
        self._validation: dict[int, StepBuilder] = {}
        self._positions: OrderedDict[int, OrderState] = OrderedDict()
        self.root = root
        self._next = first_step
        self._ready: dict[int, PreparedStep] = {}
        self._workers: dict[int, int] = {}
        self._rows: Iterator[dict[str, Any]] | None = None

    def plan(self, step: int) -> tuple[StepPlan, tuple[str, ...]]:
        """The plan of a step and its bad samples; steps are asked for in order."""
        if self._rows is None:
            self._rows = self._stream(step)  # from self.state, which is the position there
        while step not in self._ready:
            row = next(self._rows)
            plan, batches, media, targets, bad, after = pickle.loads(row["prepared"])
            prepared = PreparedStep(plan=plan, batches=batches, media=media, targets=targets, bad=bad, after=after)
            if after is not None:
                self._keep_position(after)
            self._ready[int(row["step"])] = prepared
            self._workers[int(row["step"])] = int(row["worker"])
        prepared = self._ready[step]
        return prepared.plan, prepared.bad

    def position(self, step: int) -> OrderState:
        """Where the order stands before ``step``, one of the last that were planned: for a checkpoint."""
        return self._positions[step]

    def prepared_by(self, step: int) -> int:
        """Process that decoded a step given out: a worker of Ray Data's."""
        return self._workers.pop(step)

    def stop(self) -> None:
        """End the stream and its workers; a later :meth:`plan` starts another."""
        self._rows = None
        self._ready.clear()
        self._workers.clear()

    def weigh(self, step: int, factors: Mapping[str, float]) -> None:
        """Go on from ``step`` with other weights; what was prepared from there on is forgotten."""
        state = self._positions.get(step) or self.state
        assert state is not None
        assert state.step == step
        self.state = replace(state, factors=dict(factors))
        self._rows = None
        self._ready = {number: prepared for number, prepared in self._ready.items() if number < step}

    def validation(self, stage: int, subset: int) -> list[Any]:
        """A subset's validation samples as one packed batch with its context, and their media by modality."""
        if stage not in self._validation:
            self._validation[stage] = StepBuilder(validation_recipe(self.recipe, stage), self.root)
        prepared = self._validation[stage].build(subset)
        context = StepContext(counts=prepared.plan.counts, items=prepared.plan.items, targets=prepared.targets)
        media = [
            [prepared.media[item.id] for item in prepared.plan.items if item.modality == modality]
            for modality in Modality
        ]
        return [(pack(prepared.batches[0]), context), *media]

    def _keep_position(self, after: OrderState) -> None:
        self._positions[after.step] = after
        while len(self._positions) > KEPT_POSITIONS:
            self._positions.popitem(last=False)

    def payloads(self, step: int, keys: Sequence[PayloadKey]) -> list[Any]:
        """The parts of a planned step, one object each; the step is kept for a replay until :meth:`forget`."""
        prepared = self._ready[step]
        routes = RouteTable.of(prepared.plan)
        out = [self._payload(prepared, routes, key) for key in keys]
        return out[0] if len(out) == 1 else out

    def forget(self, before: int) -> None:
        """Let go of steps below ``before``: a snapshot covers them, they will not run again."""
        self._ready = {step: prepared for step, prepared in self._ready.items() if step >= before}

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

        use_small_blocks()
        stop = next_measurement(self.recipe, first)  # what comes after has weights that are not known yet
        if needs_drawing(self.recipe, first, stop):
            steps = draw_dataset(self.recipe, self.root, self.state, first, stop)
        else:
            count = stop - first
            blocks = min(count, max(self.recipe.data.workers, count // STEPS_PER_BLOCK))  # small, or nothing streams
            steps = ray.data.range(count, override_num_blocks=blocks).map(lambda row: {"step": row["id"] + first})
        prepared = steps.map(
            PrepareSteps,  # type: ignore[arg-type]  # Ray Data makes one per task
            fn_constructor_args=(self.recipe, self.root, self.state),
            compute=ray.data.ActorPoolStrategy(size=self.recipe.data.workers),
            num_cpus=1,
        )
        return iter(prepared.iter_rows())


def use_small_blocks() -> None:
    """Set Ray Data in this process so that steps stream: in order, a few at a time, in bounded memory."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [_breathing_callback()]
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=200e6
    )


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
