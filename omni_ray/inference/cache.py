"""The latent cache: what MLA keeps of every row, for many sequences of their own lengths."""

# A attention slots (two per layer), B sequences, C latent rank, R rotary dim, X = C + R values kept per row and slot

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from omni_ray.config.model import LanguageConfig

GROWTH_TILE = 64
"""Capacity is a multiple of this, and grows by at least half."""


class LatentCache:
    """Scaled latents and turned rotary keys of B sequences; contiguous storage, behind which paging can come."""

    def __init__(
        self, config: LanguageConfig, sequences: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        self.slots = 2 * config.num_layers
        self.rank = config.kv_lora_rank
        self.width = config.kv_lora_rank + config.qk_rope_head_dim
        self.lengths: list[int] = [0] * sequences
        """Rows of each sequence that every slot holds."""
        self._rows = torch.zeros(self.slots, sequences, 0, self.width, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        """Bytes of the rows held, capacity not counted."""
        return sum(self.lengths) * self.slots * self.width * self._rows.element_size()

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` rows in every sequence."""
        have = self._rows.shape[2]
        if capacity <= have:
            return
        wanted = max(capacity, have + have // 2)
        wanted += -wanted % GROWTH_TILE
        # Zeros, not whatever memory held: a masked key's value is multiplied by 0, and 0 * NaN is NaN.
        grown = self._rows.new_zeros(self.slots, len(self.lengths), wanted, self.width)
        grown[:, :, :have] = self._rows
        self._rows = grown

    def write(self, slot: int, sequence_T: Tensor, position_T: Tensor, rows_TX: Tensor) -> None:
        """Put rows of one slot at their places; :meth:`append` counts them once every slot has them.

        Args:
            slot: Attention slot.
            sequence_T: [T] sequence of each row.  position_T: [T] place in it; :meth:`reserve` must cover it.
            rows_TX: [T, C + R] scaled latent, then turned rotary key.
        """
        flat = self._rows[slot].view(-1, self.width)
        flat.index_copy_(0, sequence_T * self._rows.shape[2] + position_T, rows_TX.to(flat.dtype))

    def append(self, counts: Sequence[int]) -> None:
        """Rows written past the end of each sequence now belong to it."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keys(self, slot: int, start: int, end: int, length: int) -> Tensor:
        """A view [end - start, length, C + R] of consecutive sequences; rows past a sequence's end are not its own."""
        return self._rows[slot, start:end, :length]

    def crop(self, sequence: int, length: int) -> None:
        """Forget the rows of one sequence from ``length`` on; costs nothing.

        Raises:
            ValueError: the sequence is not that long.
        """
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(f"cannot crop sequence {sequence} of {self.lengths[sequence]} rows to {length}")
        self.lengths[sequence] = length

    def fork(self, sequences: Sequence[int]) -> Self:
        """A cache of its own holding copies of these sequences, in this order (repeats are fine)."""
        copy = object.__new__(type(self))
        copy.slots, copy.rank, copy.width = self.slots, self.rank, self.width
        copy.lengths = [self.lengths[sequence] for sequence in sequences]
        longest = max(copy.lengths, default=0)
        longest += -longest % GROWTH_TILE
        index = torch.as_tensor(sequences, dtype=torch.int64, device=self._rows.device)
        copy._rows = self._rows[:, :, :longest].index_select(1, index)
        return copy
