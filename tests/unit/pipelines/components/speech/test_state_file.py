"""Training state without pickle: what goes in comes out, and damage is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni_ray.types.errors import CheckpointError
from pipelines.components.speech.state_file import load_state, save_state


def test_a_nested_state_comes_back(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    whole = torch.arange(10.0)
    state = {
        "optimizer": optimizer.state_dict(),
        "views": [whole[:4], whole[4:], whole],
        "bits": torch.arange(5, dtype=torch.uint8),
        "empty": {},
        "step": 7,
        "names": ("a", None, 0.1, True),
    }
    save_state(tmp_path / "state", state)
    back = load_state(tmp_path / "state")
    assert list(back) == list(state)
    assert (back["step"], back["names"], back["empty"]) == (7, ("a", None, 0.1, True), {})
    assert all(torch.equal(one, other) for one, other in zip(back["views"], state["views"], strict=True))
    assert back["bits"].dtype == torch.uint8
    other = torch.optim.AdamW(layer.parameters())
    other.load_state_dict(back["optimizer"])
    assert str(other.state_dict()) == str(optimizer.state_dict())


def test_damage_and_foreign_files_are_told(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"x": torch.ones(100)})
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-8])
    for name in ("state", "missing"):
        with pytest.raises(CheckpointError, match="train that stage again"):
            load_state(tmp_path / name)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_state(tmp_path / "other", {"x": object()})
