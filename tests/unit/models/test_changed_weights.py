"""Every write to a weight changes its state, so no copy in another layout grows stale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from omni_ray.config.model import model_preset
from omni_ray.inference.row_weights import fingerprint
from omni_ray.models.changed_weights import state_of
from omni_ray.models.llm import LanguageModel

Write = Callable[[nn.Linear], object]


def step(linear: nn.Linear, *, fused: bool) -> None:
    optimizer = torch.optim.AdamW(linear.parameters(), fused=fused)
    linear(torch.ones(1, 4)).sum().backward()
    optimizer.step()


WRITES: dict[str, Write] = {
    "fused-step": lambda linear: step(linear, fused=True),
    "step": lambda linear: step(linear, fused=False),
    "load": lambda linear: linear.load_state_dict(nn.Linear(4, 4).state_dict()),
    "move": lambda linear: linear.to(torch.float64),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_changes_the_state(write: Write) -> None:
    linear = nn.Linear(4, 4)
    before = state_of(linear.weight)
    write(linear)
    assert state_of(linear.weight) != before


def test_a_fused_step_renews_the_layout_for_decoding() -> None:
    model = LanguageModel(model_preset("tiny").language)
    before = fingerprint(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), fused=True).step()
    assert fingerprint(model) != before
