"""The speech worker: sound to four codec ids every 60 ms, and back to sound."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from actors.worker import Rank, check_device
from omni_ray.config.recipe import Recipe
from omni_ray.models.codec import Codec
from omni_ray.training.networks import build_network
from omni_ray.training.process import settle_process
from omni_ray.types.batch import EmbeddingBatch, ItemRoute

CACHED_CLIPS = 20_000
"""Clips whose codes are kept; a clip's codes are a pure function of its samples and of the frozen codec."""


class SpeechWorker:
    """Owns the codec, frozen in the language curriculum; its rows are ids, so it has no backward."""

    network_name = "codec"

    def __init__(self, recipe: Recipe, rank: Rank) -> None:
        self.recipe = recipe
        self.rank = rank
        self._codes: dict[bytes, NDArray[np.int64]] = {}

    def build(self, folder: Path | None = None) -> None:
        """Make the codec, from ``folder`` or as the recipe starts."""
        check_device(self.rank)
        settle_process(threads=self.recipe.pools.speech.threads, deterministic=self.recipe.deterministic)
        network = build_network("codec", self.recipe, folder)
        assert isinstance(network, Codec)
        self.network = network.to(torch.device(self.rank.device)).eval()

    def set_stage(self, index: int) -> bool:
        """No stage of the curriculum trains the codec."""
        return False

    def encode(self, wave: NDArray[np.float32], sample_rate_hz: int = 16000) -> NDArray[np.int64]:
        """Codes [N, 4] of a clip, from memory when the same samples were encoded before."""
        key = hashlib.blake2b(wave.tobytes(), digest_size=16).digest()
        if key not in self._codes:
            if len(self._codes) >= CACHED_CLIPS:
                self._codes.pop(next(iter(self._codes)))
            codes = self.network.encode(torch.from_numpy(wave.copy()), sample_rate_hz)
            self._codes[key] = codes.cpu().numpy().astype(np.int64)
        return self._codes[key]

    def decode(self, codes_N4: NDArray[np.int64]) -> NDArray[np.float32]:
        """24 kHz wave of codes [N, 4]."""
        return self.network.decode(torch.from_numpy(np.array(codes_N4))).cpu().numpy().astype(np.float32)

    def features(self, media: Sequence[NDArray[np.float32]]) -> list[NDArray[np.int64]]:
        """Codes [N, 4] of every clip."""
        return [self.encode(wave) for wave in media]

    def forward(
        self, micro_batch: int, items: Sequence[ItemRoute], media: Mapping[int, NDArray]
    ) -> list[EmbeddingBatch]:
        """Codes of this rank's items of a micro-batch; ``lengths`` count frames (a route holds frames + 1 rows)."""
        codes = [self.encode(media[item.id]) for item in items]
        return [
            EmbeddingBatch(
                values_ID=torch.from_numpy(np.concatenate(codes)) if codes else torch.zeros(0, 4, dtype=torch.int64),
                item_ids=tuple(item.id for item in items),
                lengths=tuple(len(c) for c in codes),
            )
        ]

    def backward(self, micro_batch: int, gradients: Sequence[EmbeddingBatch]) -> None:
        """Ids carry no gradient."""

    def step(self, step: int, norms_squared: Sequence[float]) -> tuple[float, bool]:
        """Nothing to step."""
        return 0.0, True

    def save(self, folder: Path) -> None:
        """Write ``model/codec`` under a checkpoint folder."""
        self.network.save_pretrained(folder / "model" / "codec")

    def start_saving(self, folder: Path) -> None:
        """Write the codec; it is frozen and small, so this does not wait for a thread."""
        if self.rank.rank == 0:
            self.save(folder)

    def saving_status(self, wait: bool = False) -> str:
        """Always done."""
        return "done"

    def load(self, folder: Path) -> None:
        """Take the codec of a checkpoint folder."""
        self.build(folder / "model" / "codec")
