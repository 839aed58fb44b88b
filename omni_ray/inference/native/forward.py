"""The forward over the cache as one compiled function; another form of ``row_forward``, of its own last bits."""

# T rows of all spans, H model dim, R rotary dim

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from omni_ray.inference.cache import LatentCache
from omni_ray.inference.native.weights import NativeWeights, Rows, pointer
from omni_ray.inference.row_forward import RowForward
from omni_ray.inference.row_weights import RowWeights, row_weights
from omni_ray.models.llm import LanguageModel
from omni_ray.models.native.library import library
from omni_ray.models.rope import rope_tables


def forward_of(model: LanguageModel, cache: LatentCache) -> RowForward | NativeForward:
    """The compiled form where it fits: fp32 on CPU, one thread, sums of whole vectors; else torch's operations."""
    weights = row_weights(model)
    found = library() if torch.get_num_threads() == 1 and weights.final_gain.device.type == "cpu" else None
    config = model.config
    sizes = (config.kv_lora_rank, config.ffn_hidden_size, config.expert_ffn_hidden_size)
    if found is None or weights.final_gain.dtype != torch.float32 or any(size % found.lanes() for size in sizes):
        return RowForward(weights, model.rope_base, cache)
    return NativeForward(found, weights, model.rope_base, cache)


class NativeForward:
    """See :class:`omni_ray.inference.row_forward.RowForward`: the same calls, and the same promise about bits."""

    def __init__(self, found: ctypes.CDLL, weights: RowWeights, rope_base: float, cache: LatentCache) -> None:
        """``found``: from :func:`omni_ray.models.native.library.library`."""
        self._library, self._rope_base, self.cache = found, rope_base, cache
        self._native = NativeWeights(weights, found.panel_columns())
        self._model = self._native.model
        self.weights = dataclasses.replace(weights, layers=())
        """For the heads; the layers' are held in panels."""
        self._scratch = torch.zeros(0)
        self._cos = self._sin = np.zeros((0, self._model.rope // 2), np.float32)

    @torch.inference_mode()
    def advance(self, x_TH: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
        """See :meth:`omni_ray.inference.row_forward.RowForward.advance`."""
        for sequence, count in spans:
            self.cache.reserve(sequence, count)
        starts = [self.cache.length(sequence) for sequence, _ in spans]
        counts = [count for _, count in spans]
        places = np.array([p for sequence, count in spans for p in self.cache.places(sequence, count)], np.int64)
        pages = [self.cache.pages(sequence) for sequence, _ in spans]
        first_page = np.cumsum([0, *map(len, pages)], dtype=np.int64)
        page = np.array([p for held in pages for p in held], np.int32)
        position = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
        cos, sin = self._phases(position)
        span_rows, span_start = np.array(counts, np.int64), np.array(starts, np.int64)
        storage = self.cache.storage
        rows = Rows(
            rows=len(places),
            spans=len(spans),
            span_rows=pointer(span_rows),
            span_start=pointer(span_start),
            span_pages=pointer(first_page),
            pages=pointer(page),
            place=pointer(places),
            cos=pointer(cos),
            sin=pointer(sin),
            cache=storage.data_ptr(),
            slot_stride=storage.stride(0),
        )
        x_TH = x_TH.detach().clone(memory_format=torch.contiguous_format)
        last_SH = torch.empty(len(spans), x_TH.shape[1])
        self._run(rows, x_TH, last_SH, int(position.max()) + 1)
        for sequence, count in spans:
            self.cache.append(sequence, count)
        return last_SH

    def _run(self, rows: Rows, x_TH: Tensor, last_SH: Tensor, longest: int) -> None:
        needed = self._library.rows_scratch_floats(byref(self._model), c_int64(rows.rows), c_int64(longest))
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed + needed // 4)
        self._library.rows_advance(
            byref(self._model),
            byref(rows),
            c_void_p(x_TH.data_ptr()),
            c_void_p(last_SH.data_ptr()),
            c_void_p(self._scratch.data_ptr()),
            c_int64(longest),
        )

    def _phases(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin [T, R / 2] of the rows' positions."""
        if len(self._cos) <= position.max():
            cos, sin = rope_tables(torch.arange(2 * int(position.max()) + 2), self._model.rope, self._rope_base)
            self._cos, self._sin = cos.numpy().astype(np.float32), sin.numpy().astype(np.float32)
        return self._cos[position], self._sin[position]
