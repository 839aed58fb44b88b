"""Prefix reuse: whole pages of prompt rows, found again by what they hold and all that stands before them."""

# T rows of a prompt, H model dim

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from omni_ray.inference.cache import PAGE_ROWS, LatentCache


def page_keys(ids_T5: Tensor, features: Sequence[tuple[int, Tensor]], tenant: str = "") -> list[bytes]:
    """One key per whole page of a prompt's rows, each over all rows up to the page's end.

    Args:
        ids_T5: [T, 5] rows.  features: (first row, [n, H]) of media; their values count, not only their number.
        tenant: Prompts of different tenants never share.
    """
    digest = hashlib.blake2b(tenant.encode(), digest_size=16)
    ids_T5 = ids_T5.cpu().contiguous()
    keys = []
    for start in range(0, len(ids_T5) - PAGE_ROWS + 1, PAGE_ROWS):
        end = start + PAGE_ROWS
        digest.update(ids_T5[start:end].numpy().tobytes())
        for offset, values_NH in features:
            first, last = max(start, offset), min(end, offset + len(values_NH))
            if first < last:
                rows_NH = values_NH[first - offset : last - offset].detach().cpu().contiguous()
                digest.update(f"{first}:{last}:{rows_NH.dtype}".encode())
                digest.update(rows_NH.view(torch.uint8).numpy().tobytes())
        keys.append(digest.digest())
    return keys


class PrefixStore:
    """Pages kept for later prompts that begin alike; the longest unused go first."""

    def __init__(self, cache: LatentCache, max_pages: int) -> None:
        self._cache, self.max_pages = cache, max_pages
        self._held: OrderedDict[bytes, int] = OrderedDict()
        self.rows_reused = 0

    def __len__(self) -> int:
        return len(self._held)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest known beginning."""
        pages: list[int] = []
        for key in keys:
            sequence = self._held.get(key)
            if sequence is None:
                break
            self._held.move_to_end(key)
            pages += self._cache.pages(sequence)
        self.rows_reused += len(pages) * PAGE_ROWS
        return pages

    def keep(self, key: bytes, page: int) -> None:
        """Hold a page that is full and will not be written again."""
        if key in self._held or self.max_pages == 0:
            return
        while len(self._held) >= self.max_pages:
            self.drop()
        sequence = self._cache.open()
        self._cache.adopt(sequence, [page], PAGE_ROWS)
        self._held[key] = sequence

    def drop(self) -> bool:
        """Let go of the page that was unused for longest; False when none is held."""
        if not self._held:
            return False
        _, sequence = self._held.popitem(last=False)
        self._cache.close(sequence)
        return True

    def clear(self) -> None:
        """Let go of all."""
        while self.drop():
            pass
