"""Checkpoints of a run: one directory for all pools and the data position, and who may write it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.pool import Pool, start_saving, wait_for
from omni_ray.checkpoint import store
from omni_ray.config.load import save_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.data.order_state import OrderState
from omni_ray.observability.events import emit
from omni_ray.training.data_position import guarantees, position_record, resumed_state
from omni_ray.training.networks import components_fingerprint
from omni_ray.training.prepare import StepBuilder, tokenizer_file
from omni_ray.types.errors import CheckpointError
from pipelines.training.data_root import data_fingerprint, data_root

ORDER_KEYS = ("mixture", "packing", "micro_batches", "seq_len", "steps")
"""Keys of a stage that the data position compares by itself, with a sentence for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where a run begins."""

    step: int
    """First step to run."""
    checkpoint: Path | None
    """Folder to load, or None to start from the recipe."""
    guarantees: Mapping[str, Any]
    """What the data position rests on; goes into every checkpoint of the run."""
    order: OrderState | None = None
    """Data position to go on from."""


def resume_point(recipe: Recipe, out: Path, resume: bool) -> ResumePoint:
    """Find the newest whole checkpoint of ``out`` and check that it belongs to this recipe.

    Raises:
        CheckpointError: ``out`` holds checkpoints and ``resume`` is False, or they come from another recipe or data.
    """
    newest = store.newest_to_resume(out / "checkpoints")
    if newest is None:
        return ResumePoint(step=0, checkpoint=None, guarantees=guarantees(StepBuilder(recipe, data_root(recipe))))
    if not resume:
        raise CheckpointError(
            f"{out} already holds {newest.name}; add --resume to continue it, or choose another --out"
        )
    state, root = store.read_state(newest), data_root(recipe)
    builder, accepted = StepBuilder(recipe, root), recipe.checkpoint.accept_changed
    order: OrderState | None = None
    # Where only the order can differ, the position says by name what does; anything else is another run altogether.
    if state.get("recipe_but_order") == recipe.numbers_fingerprint(without=ORDER_KEYS):
        order = resumed_state(builder, state["order"], accepted)
    mine_recipe = state["recipe"] if order is not None and accepted else recipe.numbers_fingerprint()
    for what, mine in (("recipe", mine_recipe), ("data", data_fingerprint(root))):
        if state[what] != mine:
            raise CheckpointError(
                f"{newest} was made by another {what} (fingerprint {state[what]}, now {mine}); resuming would not "
                f"continue the same run: restore the {what}, or start in another --out"
            )
    _check_components(recipe, newest, state)
    return ResumePoint(step=int(state["step"]), checkpoint=newest, guarantees=guarantees(builder), order=order)


def _check_components(recipe: Recipe, newest: Path, state: Mapping[str, Any]) -> None:
    """Other pretrained parts make another run; a checkpoint of an earlier version does not say which it had."""
    made = state.get("components")
    if made is None:
        return
    mine = components_fingerprint(recipe)
    if made["weights"] != mine:
        raise CheckpointError(
            f"{newest} was made with components {made['name']} (weights {made['weights']}), not with "
            f"{recipe.components} (weights {mine}); restore them, or start in another --out"
        )


class CheckpointWriter:
    """Writes checkpoints beside the training: every rank copies its state and writes its shard in a thread.

    Args:
        recipe: The run.  out: Its folder.  pools: The pools, by name; the mapping may change when actors are replaced.
        rests_on: Output of ``guarantees``.
    """

    def __init__(self, recipe: Recipe, out: Path, pools: Mapping[str, Pool], rests_on: Mapping[str, Any]) -> None:
        self.recipe, self.pools, self.rests_on = recipe, pools, rests_on
        self._position: Any = None
        self.parent = out / "checkpoints"
        self._step = -1
        self._side: Path | None = None
        self._started: list[Any] = []
        self._asked: list[Any] = []
        store.sweep(self.parent)

    def begin(self, step: int, position: Any) -> None:
        """Submit the writing of the state after ``step`` steps; an earlier one is finished first.

        Args:
            position: Handle of the data position there.

        Raises:
            CheckpointError: the folder cannot be made, or the earlier one failed.
        """
        self.finish()
        self._side, self._step, self._position = store.open_side(self.parent, step), step, position
        self._started = [ref for pool in self.pools.values() for ref in start_saving(self.recipe, pool, self._side)]

    def poll(self, done: int) -> None:
        """Make the checkpoint whole if every rank has written and its steps have ended well (``done`` of them).

        Raises:
            CheckpointError: a rank could not write; earlier checkpoints are intact.
        """
        if self._side is None or done < self._step:
            return
        if not self._asked:
            self._asked = [ref for pool in self.pools.values() for ref in pool.all("saving_status")]
        _, running = wait_for(self._asked, 0.0)
        if running:
            return
        answers = ray.get(self._asked)
        self._asked = []
        if all(answer != "writing" for answer in answers):
            self._complete(answers)

    def finish(self) -> None:
        """Wait for the one that is being written.

        Raises:
            CheckpointError: as :meth:`poll`.
        """
        if self._side is not None:
            self._complete(ray.get([ref for pool in self.pools.values() for ref in pool.all("saving_status", True)]))

    def abandon(self) -> None:
        """Forget the one that is being written: a rank of it is gone."""
        if self._side is not None:
            shutil.rmtree(self._side, ignore_errors=True)
        self._side, self._asked, self._started = None, [], []

    def _complete(self, answers: Sequence[str]) -> None:
        side, step = self._side, self._step
        assert side is not None
        try:
            ray.get(self._started)
            problems = [answer for answer in answers if answer != "done"]
            if problems:
                raise CheckpointError(
                    f"checkpoint of step {step}: {problems[0]}; free space or choose another --out; "
                    "earlier checkpoints are intact"
                )
            with store.written(self.parent, step):
                write_run_state(self.recipe, side, step, position_record(ray.get(self._position), self.rests_on))
                folder = store.complete(side, self.parent / store.checkpoint_name(step))
        finally:
            self.abandon()
        store.prune(self.parent, self.recipe.checkpoint.keep)
        emit("checkpoint", step=step, folder=str(folder))


def write_run_state(recipe: Recipe, folder: Path, step: int, position: Mapping[str, Any]) -> None:
    """Everything of a checkpoint that is no tensor: recipe, tokenizer, step, data position."""
    root = data_root(recipe)
    save_recipe(recipe, folder / "recipe.yaml")
    (folder / "tokenizer.json").write_bytes(tokenizer_file(recipe, root).read_bytes())
    store.write_state(
        folder,
        {
            "step": step,
            "stage": recipe.stage_at(step - 1)[0].name if step else "",
            "order": position,
            "seed": recipe.seed,
            "recipe": recipe.numbers_fingerprint(),
            "recipe_but_order": recipe.numbers_fingerprint(without=ORDER_KEYS),
            "components": {"name": recipe.components, "weights": components_fingerprint(recipe)},
            "data": data_fingerprint(root),
        },
    )


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Keep a second driver out of the same folder; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: another process holds it, or the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise CheckpointError(f"--out {out} cannot be used ({error.strerror}); choose another folder") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise CheckpointError(f"another run writes {out}; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        os.close(handle)
