"""One phase of training: draw, gradients of the own parts, ordered sum, step; the same for every objective.

Chance hangs on seed, phase and step alone, so a run that goes on from a checkpoint equals the undisturbed one bit for
bit, and nothing about chance needs saving.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omni_ray.config.speech_training import PhaseConfig
from omni_ray.types.errors import OmniError
from pipelines.components.speech.group import Group, flat_gradients, own_parts, set_gradients, summed_in_order

TOTAL = "loss"
"""Name of the value that is differentiated; the others are only told."""


class Objective(Protocol):
    """The mathematics of one phase."""

    config: PhaseConfig
    players: dict[str, list[nn.Parameter]]
    """Who is trained; a turn belongs to one player."""
    modules: dict[str, nn.Module]
    """What a checkpoint holds, the codec among it."""

    def turns(self, step: int) -> tuple[str, ...]:
        """Players of a step in order."""
        ...

    def draw(self, chance: torch.Generator) -> Any:
        """The whole batch of a step, equal on every worker."""
        ...

    def losses(self, player: str, batch: Any, part: int, step: int) -> dict[str, Tensor]:
        """Scalars of one part, each already its share of the batch's; ``loss`` is what the player lowers."""
        ...

    def optimizers(self) -> dict[str, tuple[torch.optim.Optimizer, Any]]:
        """Optimiser and schedule (or None) of every player."""
        ...

    def finish(self) -> None:
        """What follows the last step."""
        ...


@dataclass(kw_only=True)
class PhaseState:
    """Where a phase stands."""

    step: int = 0
    """Steps done."""
    saved: dict[str, Any] | None = None
    """Weights and optimisers of a checkpoint, to go on from."""
    told: dict[str, float] = field(default_factory=dict)
    """What the last step told."""


def step_chance(seed: int, phase: str, step: int) -> torch.Generator:
    """Chance of one step."""
    word = hashlib.sha256(f"{seed} {phase} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(word[:8], "little") >> 1)


def run_phase(
    name: str,
    objective: Objective,
    group: Group,
    state: PhaseState,
    *,
    seed: int,
    keep: Callable[[PhaseState, Callable[[], dict[str, Any]]], None],
) -> None:
    """Train to the end of the phase.

    Args:
        state: Where to begin; changed as steps are done.
        keep: Called after every step with a function that makes the phase's checkpoint.
    Raises:
        OmniError: a loss is not finite.  ConfigError: workers and parts do not fit.
    """
    optimizers = objective.optimizers()
    if state.saved is not None:
        load_phase(objective, optimizers, state.saved)
    while state.step < objective.config.steps:
        batch = objective.draw(step_chance(seed, name, state.step))
        told: dict[str, float] = {}
        for player in objective.turns(state.step):
            told |= _turn(player, objective, optimizers[player], batch, group, state.step)
        _check_finite(told, name, state.step)
        state.told = told
        state.step += 1
        keep(state, lambda: save_phase(objective, optimizers))
    objective.finish()


def _turn(
    player: str, objective: Objective, optimizer: tuple[torch.optim.Optimizer, Any], batch: Any, group: Group, step: int
) -> dict[str, float]:
    weights, rows, told = objective.players[player], [], []
    for part in own_parts(objective.config.parts, group):
        losses = objective.losses(player, batch, part, step)
        losses[TOTAL].backward()
        rows.append(flat_gradients(weights))
        told.append(torch.stack([value.detach() for value in losses.values()]))
        names = list(losses)
    _forget_others(objective, player)
    set_gradients(weights, summed_in_order(torch.stack(rows), group))
    norm = nn.utils.clip_grad_norm_(weights, objective.config.clip_norm)
    optimizer[0].step()
    optimizer[0].zero_grad(set_to_none=True)
    if optimizer[1] is not None:
        optimizer[1].step()
    values = summed_in_order(torch.stack(told), group)
    prefix = "" if player == "generator" else f"{player}/"
    return {f"{prefix}{key}": float(value) for key, value in zip(names, values, strict=True)} | {
        f"{prefix}gradient_norm": float(norm)
    }


def _forget_others(objective: Objective, player: str) -> None:
    """A player's backward also reaches weights of the others; they must not find it in their own turn."""
    for name, weights in objective.players.items():
        if name != player:
            for weight in weights:
                weight.grad = None


def _check_finite(told: Mapping[str, float], phase: str, step: int) -> None:
    for name, value in told.items():
        if value != value or value in (float("inf"), float("-inf")):
            raise OmniError(
                f"{name} is {value} at step {step} of phase {phase!r}; lower its lr, or look for damaged recordings"
            )


def save_phase(objective: Objective, optimizers: Mapping[str, tuple[torch.optim.Optimizer, Any]]) -> dict[str, Any]:
    """Weights, optimisers and schedules."""
    return {
        "modules": {name: module.state_dict() for name, module in objective.modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, (optimizer, _) in optimizers.items()},
        "schedules": {name: s.state_dict() for name, (_, s) in optimizers.items() if s is not None},
    }


def load_phase(
    objective: Objective, optimizers: Mapping[str, tuple[torch.optim.Optimizer, Any]], saved: Mapping[str, Any]
) -> None:
    """The reverse of :func:`save_phase`."""
    for name, module in objective.modules.items():
        module.load_state_dict(saved["modules"][name])
    for name, (optimizer, schedule) in optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][name])
        if schedule is not None:
            schedule.load_state_dict(saved["schedules"][name])


def one_cycle(
    groups: list[dict[str, Any]], config: PhaseConfig, *, betas: tuple[float, float], weight_decay: float, rise: float
) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW whose rate rises over a share of the steps, then falls to almost nothing.

    Args:
        groups: Parameter groups, each with its own peak ``lr``.
    """
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        # One more than there are steps: the schedule is moved on after the last one as well.
        total_steps=config.steps + 1,
        pct_start=rise,
        cycle_momentum=False,
        final_div_factor=50,
    )
    return optimizer, schedule
