"""The latent cache: what MLA keeps of every row, in pages, for many sequences of their own lengths."""

# A attention slots (two per layer), T rows, L rows read, C latent rank, R rotary dim, X = C + R values per row and slot

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from omni_ray.config.model import LanguageConfig
from omni_ray.types.errors import ResourceError

PAGE_ROWS = 64
"""Rows of one page; a multiple of :data:`KEY_TILE`."""
KEY_TILE = 16
"""Keys are read in multiples of this: fewer than 16 columns change the bits of a product."""
VALUE_BLOCKS = (256, 128, 64, KEY_TILE)
"""Keys of one sum over values, to be tried: the library splits longer sums at places that depend on their length."""
FIRST_PAGES = 16


@functools.cache
def value_block() -> int:
    """The most keys that this processor's product sums in one order, however many zeros stand behind them.

    Tried, not assumed: Intel's kernels keep the order up to 256 keys, AMD's up to 128.
    """
    generator = torch.Generator().manual_seed(0)
    probs_QL = torch.rand(KEY_TILE, VALUE_BLOCKS[0], generator=generator)
    values_LX = torch.randn(VALUE_BLOCKS[0], 3 * KEY_TILE, generator=generator)
    for block in VALUE_BLOCKS:
        values_LC = values_LX[:block, : 2 * KEY_TILE]

        def in_order(length: int, block: int = block, values_LC: Tensor = values_LC) -> bool:
            short_QL = probs_QL[:, :block].clone()
            short_QL[:, length:] = 0.0
            return torch.equal(short_QL[:, :length] @ values_LC[:length], short_QL @ values_LC)

        if all(in_order(length) for length in range(KEY_TILE, block, KEY_TILE)):
            return block
    return KEY_TILE


class Keys(NamedTuple):
    """The first L rows of a sequence in one slot, L a multiple of :data:`KEY_TILE`; rows past the end are finite."""

    turned_XL: Tensor
    """Scaled latent, then turned rotary key, of every row."""
    value_blocks: tuple[Tensor, ...]
    """The latents [at most ``value_block()``, C], block after block."""


@dataclass(slots=True)
class _Sequence:
    pages: list[int] = field(default_factory=list)
    length: int = 0
    start: int | None = 0
    """First row of the storage when the pages follow each other, so that reading them needs no copy."""
    index: Tensor | None = None
    """Storage row of every row of scattered pages."""
    views: tuple[int, list[Keys]] | None = None
    """Rows read, and every slot's view of them, of pages that follow each other."""


class LatentCache:
    """Scaled latents and turned rotary keys of many sequences, in pages that forks share until one of them writes."""

    def __init__(
        self,
        config: LanguageConfig,
        *,
        max_pages: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.slots = 2 * config.num_layers
        self.rank = config.kv_lora_rank
        self.width = config.kv_lora_rank + config.qk_rope_head_dim
        self.max_pages = max_pages
        self._value_block = value_block()
        self._users: list[int] = []
        self._used = bytearray()
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0
        self._rows = torch.zeros(self.slots, 0, self.width, dtype=dtype, device=device)
        self._slots: tuple[Tensor, ...] = self._rows.unbind(0)

    @property
    def bytes(self) -> int:
        """Bytes of the rows of all sequences; a shared row counts once for each."""
        rows = sum(sequence.length for sequence in self._sequences.values())
        return rows * self.slots * self.width * self._rows.element_size()

    @property
    def storage(self) -> Tensor:
        """[A, storage rows, C + R]: all pages, as they are until one more is taken."""
        return self._rows

    @property
    def pages_held(self) -> int:
        """Pages that some sequence holds."""
        return sum(self._used)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Open sequences."""
        return tuple(self._sequences)

    def open(self) -> int:
        """A new empty sequence; its id is never used again."""
        self._next += 1
        self._sequences[self._next] = _Sequence()
        return self._next

    def close(self, sequence: int) -> None:
        """Forget a sequence; pages that no other shares are free again."""
        self._release(self._sequences.pop(sequence).pages)

    def length(self, sequence: int) -> int:
        """Rows of a sequence that every slot holds."""
        return self._sequences[sequence].length

    def pages(self, sequence: int) -> tuple[int, ...]:
        """Pages of a sequence, in the order of its rows."""
        return tuple(self._sequences[sequence].pages)

    def reserve(self, sequence: int, rows: int) -> None:
        """Make room for ``rows`` more rows; a shared page that they would change becomes the sequence's own.

        Raises:
            ResourceError: all ``max_pages`` are held.
        """
        entry = self._sequences[sequence]
        inside = entry.length // PAGE_ROWS
        if rows and entry.length % PAGE_ROWS and self._users[entry.pages[inside]] > 1:
            self._own(entry, inside)
        wanted = -(-(entry.length + rows) // PAGE_ROWS) - len(entry.pages)
        if wanted > 0:
            self._extend(entry, wanted)

    def places(self, sequence: int, rows: int) -> list[int]:
        """Storage places of the next ``rows`` rows, after :meth:`reserve`."""
        entry = self._sequences[sequence]
        return self._places(entry, entry.length, entry.length + rows)

    @staticmethod
    def _places(entry: _Sequence, start: int, end: int) -> list[int]:
        """Storage places of rows [start, end)."""
        if entry.start is not None:
            return list(range(entry.start + start, entry.start + end))
        return [entry.pages[row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS for row in range(start, end)]

    def write(self, slot: int, place_T: Tensor, rows_TX: Tensor) -> None:
        """Put rows of one slot at their places; :meth:`append` counts them once every slot has them.

        Args:
            slot: Attention slot.  place_T: From :meth:`places`.
            rows_TX: [T, C + R] scaled latent, then turned rotary key.
        """
        self._slots[slot].index_copy_(0, place_T, rows_TX.to(self._rows.dtype))

    def append(self, sequence: int, rows: int) -> None:
        """Rows written past the end now belong to the sequence."""
        self._sequences[sequence].length += rows

    def read(self, sequence: int, start: int, end: int) -> Tensor:
        """Copy of rows [start, end) of a sequence in all slots, [A, T, C + R]; what :meth:`write_all` takes."""
        entry = self._sequences[sequence]
        place_T = torch.tensor(self._places(entry, start, end), dtype=torch.long, device=self._rows.device)
        return self._rows.index_select(1, place_T)

    def write_all(self, sequence: int, rows_ATX: Tensor) -> None:
        """Append rows of another cache, as :meth:`read` gave them.

        Raises:
            ResourceError: all ``max_pages`` are held.
        """
        count = rows_ATX.shape[1]
        self.reserve(sequence, count)
        place_T = torch.tensor(self.places(sequence, count), dtype=torch.long, device=self._rows.device)
        for slot, rows_TX in enumerate(rows_ATX.to(self._rows.device).unbind(0)):
            self.write(slot, place_T, rows_TX)
        self.append(sequence, count)

    def keys(self, slot: int, sequence: int, length: int) -> Keys:
        """The first rows of a sequence in one slot, as decoding reads them."""
        entry = self._sequences[sequence]
        padded = length + -length % KEY_TILE
        if entry.start is not None:
            if entry.views is None or entry.views[0] != padded:
                rows = self._rows.narrow(1, entry.start, padded)
                entry.views = padded, [self._views(rows_LX) for rows_LX in rows.unbind(0)]
            return entry.views[1][slot]
        if entry.index is None:
            rows_P1 = torch.tensor(entry.pages)[:, None] * PAGE_ROWS
            entry.index = (rows_P1 + torch.arange(PAGE_ROWS)).flatten().to(self._rows.device)
        return self._views(self._slots[slot].index_select(0, entry.index[:padded]))

    def _views(self, rows_LX: Tensor) -> Keys:
        return Keys(rows_LX.t(), rows_LX[:, : self.rank].split(self._value_block))

    def crop(self, sequence: int, length: int) -> None:
        """Forget the rows of one sequence from ``length`` on; costs nothing but a few list entries.

        Raises:
            ValueError: the sequence is not that long.
        """
        entry = self._sequences[sequence]
        if not 0 <= length <= entry.length:
            raise ValueError(f"cannot crop sequence {sequence} of {entry.length} rows to {length}")
        kept = -(-length // PAGE_ROWS)
        entry.length = length
        if kept < len(entry.pages):
            self._release(entry.pages[kept:])
            self._lay(entry, entry.pages[:kept])

    def fork(self, sequence: int) -> int:
        """A new sequence with the same rows; pages are shared until one of the two writes into them."""
        entry = self._sequences[sequence]
        other = self.open()
        self.adopt(other, entry.pages[: -(-entry.length // PAGE_ROWS)], entry.length)
        return other

    def adopt(self, sequence: int, pages: Sequence[int], length: int) -> None:
        """Let an empty sequence share pages that others hold, as its first ``length`` rows."""
        entry = self._sequences[sequence]
        for page in pages:
            self._users[page] += 1
        self._lay(entry, list(pages))
        entry.length = length

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._used[page] = 0

    def _lay(self, entry: _Sequence, pages: list[int]) -> None:
        entry.pages, entry.index, entry.views = pages, None, None
        straight = all(page == pages[0] + place for place, page in enumerate(pages))
        entry.start = (pages[0] * PAGE_ROWS if pages else 0) if straight else None

    def _extend(self, entry: _Sequence, count: int) -> None:
        """More pages: right behind the last where they are free, else all in a new place, else wherever."""
        after = entry.pages[-1] + 1 if entry.pages else -1
        if after >= 0 and self._used[after : after + count] == bytes(count):
            self._take(after, count)
            self._lay(entry, [*entry.pages, *range(after, after + count)])
            return
        own = all(self._users[page] == 1 for page in entry.pages)
        # Moving doubles the room, so a growing sequence moves seldom.
        run = 2 * len(entry.pages) + count if own else count
        first = self._run(run, held=len(entry.pages) + count if own else count)
        if first is not None and own:
            old = entry.pages
            self._take(first, len(old) + count)
            if old:
                span = PAGE_ROWS * len(old)
                index = (torch.tensor(old)[:, None] * PAGE_ROWS + torch.arange(PAGE_ROWS)).flatten()
                moved = self._rows.index_select(1, index.to(self._rows.device))
                self._rows[:, first * PAGE_ROWS : first * PAGE_ROWS + span] = moved
                self._release(old)
            self._lay(entry, list(range(first, first + len(old) + count)))
            return
        self._lay(entry, [*entry.pages, *(self._single() for _ in range(count))])

    def _own(self, entry: _Sequence, place: int) -> None:
        old, new = entry.pages[place], self._single()
        source = self._rows[:, old * PAGE_ROWS : (old + 1) * PAGE_ROWS]
        self._rows[:, new * PAGE_ROWS : (new + 1) * PAGE_ROWS] = source
        self._release([old])
        self._lay(entry, [*entry.pages[:place], new, *entry.pages[place + 1 :]])

    def _single(self) -> int:
        first = self._run(1, held=1)
        if first is None:
            raise ResourceError(
                f"the latent cache is full: all {self.max_pages} pages of {PAGE_ROWS} rows are held by "
                f"{len(self._sequences)} sequences; close some, or allow more pages"
            )
        self._take(first, 1)
        return first

    def _take(self, first: int, count: int) -> None:
        for page in range(first, first + count):
            self._users[page] = 1
            self._used[page] = 1
        # Zeros, not a former owner's rows: nothing of one sequence is ever read by another.
        self._rows[:, first * PAGE_ROWS : (first + count) * PAGE_ROWS].zero_()

    def _run(self, wished: int, held: int) -> int | None:
        """First page of a free run of ``wished`` pages, at least ``held``; the storage grows while it may."""
        for count in (wished, held):
            first = self._used.find(bytes(count))
            if first >= 0:
                return first
            if self._grow(count):
                return self._used.find(bytes(count))
        return None

    def _grow(self, count: int) -> bool:
        have = len(self._used)
        wanted = max(FIRST_PAGES, 2 * have, have + count)
        if self.max_pages is not None:
            wanted = min(wanted, self.max_pages)
        if wanted <= have:
            return False
        grown = self._rows.new_zeros(self.slots, wanted * PAGE_ROWS, self.width)
        grown[:, : have * PAGE_ROWS] = self._rows
        self._rows, self._slots = grown, grown.unbind(0)
        for entry in self._sequences.values():
            entry.views = None
        self._used.extend(bytes(wanted - have))
        self._users.extend([0] * (wanted - have))
        return bytes(count) in self._used
