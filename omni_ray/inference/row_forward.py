"""Rows of many sequences, one forward: prefill pieces and decode rows alike, over the latent cache.

A row's result depends on its own sequence alone, bit for bit in fp32 on CPU: on neither the number of rows that share
the forward nor on how its prompt was cut into pieces.  Attention always runs in latent space over cached keys, in key
blocks of one size, so a prompt row sees the arithmetic that a decoded row would.
"""

# T rows of all spans, N rows of one span, h heads, L keys, C latent rank, R rotary dim, X = C + R, H model dim

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omni_ray.inference.cache import KEY_TILE, LatentCache
from omni_ray.inference.row_memory import REMEMBERED_ROWS, RowMemory, remember
from omni_ray.inference.row_mixture import mixture
from omni_ray.inference.row_weights import (
    AttentionWeights,
    LayerWeights,
    MlpWeights,
    RowWeights,
    add_product,
    product_into,
)
from omni_ray.models.layers import ROW_TILE
from omni_ray.models.rope import rope_tables

QUERY_BLOCK = 128
"""Prompt rows that look back together; each block sees the keys up to its own end."""
INVISIBLE = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Single:
    """One decoded row."""

    row: int
    sequence: int
    length: int
    unseen_L: Tensor
    """0 for its keys, minus infinity for the padding behind them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Rows of a prompt."""

    first: int
    count: int
    sequence: int
    start: int
    """Rows before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Where the rows of a forward stand; made once, used by every attention."""

    place_T: Tensor
    phase_T1R: Tensor
    """cos + i sin of every row, filler included."""
    singles: tuple[_Single, ...]
    pieces: tuple[_Piece, ...]


class RowForward:
    """The layers over a cache; :attr:`weights` may be exchanged between calls."""

    def __init__(self, weights: RowWeights, rope_base: float, cache: LatentCache) -> None:
        self.weights, self.rope_base, self.cache = weights, rope_base, cache
        attention = weights.layers[0].attention[0]
        self.heads, self.rope = attention.module.heads, attention.module.rope
        self.device, self.dtype = attention.out[0].device, attention.out[0].dtype
        self._memories: dict[int, RowMemory] = {}
        self._phase = torch.zeros(0, self.rope // 2, dtype=torch.complex64)
        self._unseen = torch.zeros(0)

    @torch.inference_mode()
    def advance(self, x_TH: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
        """Append rows to sequences of the cache.

        Args:
            x_TH: Input embeddings, span after span.
            spans: (sequence, rows) of each span, no sequence twice.
        Returns:
            [spans, H]: final-normed hidden state of each span's last row.
        Raises:
            ResourceError: the cache is full; nothing was appended.
        """
        for sequence, count in spans:
            self.cache.reserve(sequence, count)
        memory = self._memory(len(x_TH))
        rows = self._rows(spans, memory.padded)
        memory.x_real_TH.copy_(x_TH)
        memory.x_filler.zero_()
        for index, layer in enumerate(self.weights.layers):
            self._layer(memory, layer, 2 * index, rows)
        for sequence, count in spans:
            self.cache.append(sequence, count)
        ends = np.cumsum([count for _, count in spans]) - 1
        last_SH = memory.norm().index_select(0, torch.from_numpy(ends).to(self.device))
        return last_SH.mul_(self.weights.final_gain)

    def _memory(self, total: int) -> RowMemory:
        found = self._memories.get(total)
        if found is None:
            found = RowMemory(self.weights, total)
            if total <= REMEMBERED_ROWS:
                remember(self._memories, total, found)
        return found

    def _rows(self, spans: Sequence[tuple[int, int]], padded: int) -> _Rows:
        places: list[int] = []
        positions: list[int] = []
        singles, pieces = [], []
        for sequence, count in spans:
            start = self.cache.length(sequence)
            if count == 1:
                unseen_L = self._unseen_keys(start + 1)
                single = _Single(row=len(places), sequence=sequence, length=start + 1, unseen_L=unseen_L)
                singles.append(single)
            elif count:
                pieces.append(_Piece(first=len(places), count=count, sequence=sequence, start=start))
            places += self.cache.places(sequence, count)
            positions += range(start, start + count)
        index = torch.tensor([*positions, *[0] * (padded - len(positions))])
        return _Rows(
            place_T=torch.tensor(places, device=self.device),
            phase_T1R=self._phases(max(positions) + 1).index_select(0, index.to(self.device)).unsqueeze(1),
            singles=tuple(singles),
            pieces=tuple(pieces),
        )

    def _phases(self, count: int) -> Tensor:
        if len(self._phase) < count:
            cos, sin = rope_tables(torch.arange(2 * count, device=self.device), self.rope, self.rope_base)
            self._phase = torch.complex(cos, sin)
        return self._phase

    def _unseen_keys(self, length: int) -> Tensor:
        padded = length + -length % KEY_TILE
        if len(self._unseen) < padded + KEY_TILE:
            self._unseen = torch.zeros(2 * padded + KEY_TILE, dtype=self.dtype, device=self.device)
            self._unseen[-KEY_TILE:] = INVISIBLE
        first = len(self._unseen) - KEY_TILE - length
        return self._unseen[first : first + padded]

    def _layer(self, memory: RowMemory, layer: LayerWeights, slot: int, rows: _Rows) -> None:
        """One shortcut-connected layer, in place."""
        self._attend(memory, layer.attention[0], slot, rows)
        torch.mul(memory.norm(), layer.shared_gain, out=memory.u_TH)
        shortcut_TH = mixture(memory, layer.experts)
        _mlp(memory, memory.u_TH, layer.mlp[0])
        self._attend(memory, layer.attention[1], slot + 1, rows)
        _mlp(memory, memory.norm(), layer.mlp[1])
        memory.x_real_TH.add_(shortcut_TH)

    def _attend(self, memory: RowMemory, weights: AttentionWeights, slot: int, rows: _Rows) -> None:
        memory.norm()
        product_into(memory.normed_edge_T1, weights.qkv_a, memory.qkv)
        memory.kv_norm()
        product_into(memory.q_norm(), weights.q_b, memory.q)
        for turned in memory.turns:
            turned(rows.phase_T1R)
        self.cache.write(slot, rows.place_T, memory.kept_real_TX)
        # A batched product into strided memory is copied inside, slower than here.
        torch.bmm(memory.q_nope_hTn, weights.key_up, out=memory.absorbed_hTC)
        memory.query_latent_ThC.copy_(memory.absorbed_ThC)
        for single in rows.singles:
            self._look_back(memory, slot, single)
        for piece in rows.pieces:
            self._look_back_piece(memory, slot, piece)
        torch.bmm(memory.mixed_hTC, weights.value_up, out=memory.value_hTe)
        memory.value_The.copy_(memory.value_turned_The)
        add_product(memory.x, memory.value_TD, weights.out)

    def _look_back(self, memory: RowMemory, slot: int, single: _Single) -> None:
        keys_XL, value_blocks = self.cache.keys(slot, single.sequence, single.length)
        scores_hL = torch.addmm(single.unseen_L, memory.query_rows[single.row], keys_XL)
        _sum_values(torch.softmax(scores_hL, dim=-1, out=scores_hL), value_blocks, memory.mixed_rows[single.row])

    def _look_back_piece(self, memory: RowMemory, slot: int, piece: _Piece) -> None:
        heads, rank = self.heads, self.cache.rank
        for begin in range(0, piece.count, QUERY_BLOCK):
            count = min(QUERY_BLOCK, piece.count - begin)
            first = piece.first + begin
            keys_XL, value_blocks = self.cache.keys(slot, piece.sequence, piece.start + begin + count)
            query_QX = memory.query_heads_ThX[first : first + count].flatten(0, 1)
            missing = -len(query_QX) % ROW_TILE
            if missing:
                query_QX = F.pad(query_QX, (0, 0, 0, missing))
            scores_QL = torch.mm(query_QX, keys_XL)
            position_N1 = torch.arange(piece.start + begin, piece.start + begin + count, device=self.device)[:, None]
            unseen_NL = torch.arange(keys_XL.shape[1], device=self.device) > position_N1
            real_NhL = scores_QL[: count * heads].view(count, heads, -1)
            real_NhL.masked_fill_(unseen_NL[:, None], INVISIBLE)
            mixed_QC = query_QX.new_empty(len(query_QX), rank)
            _sum_values(torch.softmax(scores_QL, dim=-1), value_blocks, mixed_QC)
            memory.mixed_heads_ThC[first : first + count] = mixed_QC[: count * heads].view(count, heads, rank)


def _mlp(memory: RowMemory, u_TH: Tensor, weights: MlpWeights) -> None:
    product_into(u_TH, weights.gate_up, memory.gate_up)
    add_product(memory.x, F.silu(memory.gate_TF, inplace=True).mul_(memory.up_TF), weights.down)


def _sum_values(probs_QL: Tensor, value_blocks: tuple[Tensor, ...], out_QC: Tensor) -> None:
    """``probs @ values`` in key blocks of one size, so that keys of probability 0 behind the end change no bit."""
    if len(value_blocks) == 1:
        torch.mm(probs_QL, value_blocks[0], out=out_QC)
        return
    first, *others = zip(probs_QL.split(len(value_blocks[0]), dim=1), value_blocks, strict=True)
    torch.mm(*first, out=out_QC)
    for probs_QB, values_BC in others:
        out_QC.addmm_(probs_QB, values_BC)
