"""Tells whether a weight has changed since a copy in another layout was made of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


def state_of(weight: Tensor) -> tuple[int, int]:
    """Address and version of a weight: another one after any write, but for writes through ``.data``."""
    return weight.data_ptr(), weight._version


def _count_up(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimizers write weights without counting their version up."""
    increment_version([weight for group in optimizer.param_groups for weight in group["params"]])


register_optimizer_step_post_hook(_count_up)
