"""Fixtures of the serving tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live import local


@pytest.fixture(scope="module")
def model_and_stages(tiny_checkpoint: Path) -> Any:
    """An untrained tiny model and its stages in this process."""
    torch.set_num_threads(1)
    return local(tiny_checkpoint)
