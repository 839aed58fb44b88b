"""Bytes of tensors that live at one time, counted operation by operation, whatever the allocator does."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while the block runs, until each is freed.

    What an operation takes and frees inside itself is not seen.
    """

    only_memory = True
    """Compiled functions take their memory through operations too, so they run as they do unwatched."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """``known``: tensors, parameters say, that were there before and do not count."""
        super().__init__()
        self.live = self.peak = 0
        self._known = list(known)
        self._seen = {tensor.untyped_storage()._cdata for tensor in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
