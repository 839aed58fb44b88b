"""The comparison side of the ``resume`` bench: one source through torchdata's StatefulDataLoader."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from omni_ray.config.model import model_preset
from omni_ray.data.chat import encode_sample
from omni_ray.data.sources import WebDatasetSource
from omni_ray.data.tokenizer import Tokenizer

SAMPLES_SMALL, SAMPLES_LARGE = 100, 10_000
BATCH = 8


class _Rows(Dataset[int]):
    """Row counts of a source's samples, read and encoded as the builder does; long, by repeating its numbers."""

    def __init__(self, root: Path) -> None:
        self.source = WebDatasetSource(root / "text", "text")
        self.tokenizer = Tokenizer.load(root / "tokenizer.json")

    def __len__(self) -> int:
        return 4 * SAMPLES_LARGE

    def __getitem__(self, index: int) -> int:
        return len(encode_sample(self.source[index % len(self.source)], self.tokenizer, model_preset("tiny")))


def _loader(root: Path) -> Any:
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader

    generator = torch.Generator().manual_seed(0)
    return StatefulDataLoader(_Rows(root), batch_size=BATCH, shuffle=True, num_workers=2, generator=generator)


def growth(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """States after few and after many samples."""
    loader = _loader(root)
    states = []
    for batch, _ in enumerate(loader, start=1):
        if batch * BATCH in (SAMPLES_SMALL // BATCH * BATCH, SAMPLES_LARGE):
            states.append(loader.state_dict())
        if batch * BATCH >= SAMPLES_LARGE:
            break
    return states[0], states[1]


def time_first_batch(root: Path, state: dict[str, Any] | None) -> float:
    """Seconds from nothing to the first batch, from the start or from a state."""
    started = time.perf_counter()
    loader = _loader(root)
    if state is not None:
        loader.load_state_dict(state)
    rows = iter(loader)
    next(rows)
    seconds = time.perf_counter() - started
    del rows
    return seconds
