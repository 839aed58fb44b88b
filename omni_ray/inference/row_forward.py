"""Rows of many sequences, one forward: prefill pieces and decode rows alike, over the latent cache.

A row's result depends on its own sequence alone, bit for bit in fp32 on CPU: on neither the number of rows that share
the forward nor on how its prompt was cut into pieces.  Attention always runs in latent space over cached keys, in key
blocks of one size, so a prompt row sees the arithmetic that a decoded row would.
"""

# T rows of all spans, N rows of one span, h heads, L keys, C latent rank, R rotary dim, X = C + R, H model dim
# K chosen experts, P rows of all busy experts with padding, F inner dim

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from omni_ray.inference.cache import KEY_TILE, LatentCache
from omni_ray.inference.row_weights import (
    FEWEST_ROWS,
    AttentionWeights,
    ExpertWeights,
    LayerWeights,
    MlpWeights,
    RowWeights,
    add_product,
    product,
    product_into,
)
from omni_ray.models.layers import ROW_TILE
from omni_ray.models.rope import rope_tables

QUERY_BLOCK = 128
"""Prompt rows that look back together; each block sees the keys up to its own end."""
VALUE_BLOCK = 256
"""Keys of one sum over values: longer sums are split by the library at places that depend on their length."""
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
    """cos + i sin of every row, padding included."""
    singles: tuple[_Single, ...]
    single_T: Tensor | None
    """Rows of the singles; None when they are the first rows."""
    pieces: tuple[_Piece, ...]

    @property
    def alone(self) -> bool:
        """Whether all rows are decoded ones."""
        return self.single_T is None and not self.pieces


class RowForward:
    """The layers over a cache; :attr:`weights` may be exchanged between calls."""

    def __init__(self, weights: RowWeights, rope_base: float, cache: LatentCache) -> None:
        self.weights, self.rope_base, self.cache = weights, rope_base, cache
        attention = weights.layers[0].attention[0]
        self.heads, self.rope = attention.module.heads, attention.module.rope
        self._tiled_heads = self.heads + -self.heads % ROW_TILE
        self.device, self.dtype = attention.out.device, attention.out.dtype
        self._eps: dict[float, Tensor] = {}
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
        total = x_TH.shape[0]
        padded = self.weights.padded(total)
        rows = self._rows(spans, padded)
        x_TH = torch.cat([x_TH, x_TH.new_zeros(padded - total, x_TH.shape[1])]) if padded > total else x_TH.clone()
        for index, layer in enumerate(self.weights.layers):
            self._layer(x_TH, layer, 2 * index, rows, total)
        for sequence, count in spans:
            self.cache.append(sequence, count)
        ends = np.cumsum([count for _, count in spans]) - 1
        last_SH = x_TH.index_select(0, torch.from_numpy(ends).to(self.device))
        norm = self.weights.norm
        return self._normed(last_SH, norm.eps).mul_(norm.weight)

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
        leading = all(single.row == place for place, single in enumerate(singles))
        index = torch.tensor([*positions, *[0] * (padded - len(positions))])
        return _Rows(
            place_T=torch.tensor(places, device=self.device),
            phase_T1R=self._phases(max(positions) + 1).index_select(0, index.to(self.device)).unsqueeze(1),
            singles=tuple(singles),
            single_T=None if leading else torch.tensor([single.row for single in singles], device=self.device),
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

    def _layer(self, x_TH: Tensor, layer: LayerWeights, slot: int, rows: _Rows, total: int) -> None:
        """One shortcut-connected layer, in place."""
        self._attend(x_TH, layer.attention[0], slot, rows)
        u_TH = self._normed(x_TH, layer.shared_norm.eps).mul_(layer.shared_norm.weight)
        shortcut_TH = self._mixture(u_TH, layer.experts, total)
        self._mlp(x_TH, u_TH, layer.mlp[0])
        self._attend(x_TH, layer.attention[1], slot + 1, rows)
        self._mlp(x_TH, self._normed(x_TH, layer.last_eps), layer.mlp[1])
        x_TH[:total].add_(shortcut_TH)

    def _normed(self, x_TH: Tensor, eps: float) -> Tensor:
        """``x / sqrt(mean(x^2) + eps)``, statistics in fp32; the gain is the caller's."""
        x32_TH = x_TH if x_TH.dtype == torch.float32 else x_TH.float()
        if eps not in self._eps:
            self._eps[eps] = torch.tensor([[eps]], device=self.device)
        size_T1 = torch.linalg.vector_norm(x32_TH, dim=-1, keepdim=True)
        scale_T1 = torch.addcmul(self._eps[eps], size_T1, size_T1, value=1.0 / x_TH.shape[1]).rsqrt_()
        return torch.mul(x32_TH, scale_T1).to(x_TH.dtype)

    def _mlp(self, x_TH: Tensor, u_TH: Tensor, weights: MlpWeights) -> None:
        inner_TF = _gated(product(u_TH, weights.gate_up), weights.down.shape[0])
        add_product(x_TH, inner_TF, weights.down)

    def _attend(self, x_TH: Tensor, weights: AttentionWeights, slot: int, rows: _Rows) -> None:
        part, rank = weights.module, self.cache.rank
        qkv_TA = product(self._normed(x_TH, weights.input_eps), weights.qkv_a)
        q_a, latent, k_rope = qkv_TA.split([part.q_rank, rank, self.rope], dim=1)
        q_TA = product(self._normed(q_a, part.q_a_layernorm.eps), weights.q_b)
        q_Thd = q_TA.view(-1, self.heads, part.nope + self.rope)
        kept_TX = x_TH.new_empty(x_TH.shape[0], self.cache.width)
        torch.mul(self._normed(latent, part.kv_a_layernorm.eps), weights.latent_gain, out=kept_TX[:, :rank])
        _turn_into(kept_TX[:, None, rank:], k_rope[:, None], rows.phase_T1R)
        self.cache.write(slot, rows.place_T, kept_TX[: len(rows.place_T)])
        query_ThX = x_TH.new_zeros(x_TH.shape[0], self._tiled_heads if rows.alone else self.heads, self.cache.width)
        query_ThX[:, : self.heads, :rank] = torch.bmm(
            q_Thd[..., : part.nope].transpose(0, 1), weights.key_up
        ).transpose(0, 1)
        _turn_into(query_ThX[:, : self.heads, rank:], q_Thd[..., part.nope :], rows.phase_T1R)
        mixed_ThC = self._look_back(query_ThX, slot, rows)
        value_hTe = torch.bmm(mixed_ThC.transpose(0, 1), weights.value_up)
        add_product(x_TH, value_hTe.transpose(0, 1).reshape(x_TH.shape[0], -1), weights.out)

    def _look_back(self, query_ThX: Tensor, slot: int, rows: _Rows) -> Tensor:
        """Attention-weighted latents of every row: [T, h, C]."""
        heads, rank, count = self.heads, self.cache.rank, len(rows.singles)
        single_BhX = query_ThX[:count] if rows.single_T is None else query_ThX.index_select(0, rows.single_T)
        missing = self._tiled_heads - single_BhX.shape[1]
        if missing:
            single_BhX = F.pad(single_BhX, (0, 0, 0, missing))
        mixed_BhC = query_ThX.new_zeros(len(query_ThX) if rows.alone else count, self._tiled_heads, rank)
        for single, query_hX, out_hC in zip(rows.singles, single_BhX.unbind(0), mixed_BhC.unbind(0), strict=False):
            keys_LX = self.cache.keys(slot, single.sequence, single.length)
            scores_hL = torch.addmm(single.unseen_L, query_hX, keys_LX.t())
            _sum_values(torch.softmax(scores_hL, dim=-1), keys_LX.narrow(1, 0, rank), out_hC)
        if rows.alone:
            return mixed_BhC[:, :heads]
        mixed_ThC = query_ThX.new_zeros(query_ThX.shape[0], heads, rank)
        if rows.single_T is None:
            mixed_ThC[:count] = mixed_BhC[:, :heads]
        else:
            mixed_ThC.index_copy_(0, rows.single_T, mixed_BhC[:, :heads].contiguous())
        for piece in rows.pieces:
            self._look_back_piece(query_ThX, slot, piece, mixed_ThC)
        return mixed_ThC

    def _look_back_piece(self, query_ThX: Tensor, slot: int, piece: _Piece, mixed_ThC: Tensor) -> None:
        rank = self.cache.rank
        for begin in range(0, piece.count, QUERY_BLOCK):
            count = min(QUERY_BLOCK, piece.count - begin)
            first = piece.first + begin
            keys_LX = self.cache.keys(slot, piece.sequence, piece.start + begin + count)
            query_QX = query_ThX[first : first + count].flatten(0, 1)
            missing = -len(query_QX) % ROW_TILE
            if missing:
                query_QX = F.pad(query_QX, (0, 0, 0, missing))
            scores_QL = torch.mm(query_QX, keys_LX.t())
            position_N1 = torch.arange(piece.start + begin, piece.start + begin + count, device=self.device)[:, None]
            unseen_NL = torch.arange(len(keys_LX), device=self.device) > position_N1
            real_NhL = scores_QL[: count * self.heads].view(count, self.heads, -1)
            real_NhL.masked_fill_(unseen_NL[:, None], INVISIBLE)
            mixed_QC = query_ThX.new_empty(len(query_QX), rank)
            _sum_values(torch.softmax(scores_QL, dim=-1), keys_LX.narrow(1, 0, rank), mixed_QC)
            mixed_ThC[first : first + count] = mixed_QC[: count * self.heads].view(count, self.heads, rank)

    def _mixture(self, u_TH: Tensor, weights: ExpertWeights, total: int) -> Tensor:
        """The shortcut branch: chosen FFN experts, and the share of the zero-computation ones.

        Args:
            u_TH: Normed rows, filler behind the first ``total``.
        Returns:
            [total, H].
        """
        u32_TH = u_TH if u_TH.dtype == torch.float32 else u_TH.float()
        scores_TE = product(u32_TH, weights.router).softmax(dim=-1)[:total]
        expert_TK = torch.topk(scores_TE + weights.bias_E, weights.top_k, dim=-1).indices
        weight_TK = scores_TE.gather(1, expert_TK).mul_(weights.scaling)
        zero_TK = expert_TK >= len(weights.down)
        out_TH = u_TH[:total] * (weight_TK * zero_TK).sum(dim=1, keepdim=True).to(u_TH.dtype)
        if total == 1 and len(u_TH) == FEWEST_ROWS:
            return self._mixture_of_one(u_TH, weights, expert_TK, weight_TK, out_TH)
        token_P, share_P1, bounds = self._busy(expert_TK.cpu().numpy(), weight_TK.cpu().numpy(), len(weights.down))
        if not bounds:
            return out_TH
        inner = weights.down[0].shape[0]
        x_PH = u_TH.index_select(0, token_P)
        hidden_PF2 = x_PH.new_empty(x_PH.shape[0], 2 * inner)
        for expert, start, end in bounds:
            product_into(x_PH[start:end], weights.gate_up[expert], hidden_PF2[start:end])
        inner_PF = _gated(hidden_PF2, inner).mul_(share_P1)
        for expert, start, end in bounds:
            product_into(inner_PF[start:end], weights.down[expert], x_PH[start:end])
        return out_TH.index_add_(0, token_P, x_PH)

    def _mixture_of_one(
        self, u_2H: Tensor, weights: ExpertWeights, expert_1K: Tensor, weight_1K: Tensor, out_1H: Tensor
    ) -> Tensor:
        """One row beside its filler: the same products and sums without any gathering."""
        ffn, inner = len(weights.down), weights.down[0].shape[0]
        shares = weight_1K.to(u_2H.dtype).unbind(1)
        for expert, place in sorted((expert, place) for place, expert in enumerate(expert_1K[0].tolist())):
            if expert < ffn:
                inner_2F = _gated(torch.mm(u_2H, weights.gate_up[expert]), inner).mul_(shares[place])
                out_1H.add_(torch.mm(inner_2F, weights.down[expert])[:1])
        return out_1H

    def _busy(
        self, expert_TK: NDArray[np.int64], weight_TK: NDArray[np.float32], ffn: int
    ) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
        """Rows of every busy expert, padded: token of each row [P], its share [P, 1], (expert, start, end) of each.

        A padding row repeats its expert's first token with a share of 0.
        """
        flat = expert_TK.ravel()
        order = np.argsort(flat, kind="stable")
        counts = np.bincount(flat, minlength=ffn)[:ffn]
        pairs: list[int] = []
        real: list[float] = []
        bounds = []
        taken = 0
        for expert in np.flatnonzero(counts).tolist():
            count = int(counts[expert])
            mine = order[taken : taken + count].tolist()
            missing = self.weights.padded(count) - count
            bounds.append((expert, len(pairs), len(pairs) + count + missing))
            pairs += mine + mine[:1] * missing
            real += [1.0] * count + [0.0] * missing
            taken += count
        pair_P = np.array(pairs, dtype=np.int64)
        share_P = weight_TK.ravel()[pair_P] * np.array(real, dtype=np.float32)
        token_P = torch.from_numpy(pair_P // expert_TK.shape[1]).to(self.device)
        return token_P, torch.from_numpy(share_P[:, None]).to(self.device, self.dtype), bounds


def _gated(gate_up: Tensor, inner: int) -> Tensor:
    """``silu(gate) * up``."""
    return F.silu(gate_up.narrow(1, 0, inner)).mul_(gate_up.narrow(1, inner, inner))


def _sum_values(probs_QL: Tensor, values_LC: Tensor, out_QC: Tensor) -> None:
    """``probs @ values`` in key blocks of one size, so that keys of probability 0 behind the end change no bit."""
    length = probs_QL.shape[1]
    if length <= VALUE_BLOCK:
        torch.mm(probs_QL, values_LC, out=out_QC)
        return
    torch.mm(probs_QL[:, :VALUE_BLOCK], values_LC[:VALUE_BLOCK], out=out_QC)
    for start in range(VALUE_BLOCK, length, VALUE_BLOCK):
        out_QC.addmm_(probs_QL[:, start : start + VALUE_BLOCK], values_LC[start : start + VALUE_BLOCK])


def _turn_into(out_ThR: Tensor, x_ThR: Tensor, phase_T1R: Tensor) -> None:
    """Rotate pairs (2i, 2i+1) of the last dim of ``x`` into ``out``; fp32 at least."""
    even = all(
        part.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in part.stride()[:-1]) for part in (out_ThR, x_ThR)
    )
    if x_ThR.dtype == torch.float32 and even:
        pairs, into = (torch.view_as_complex(part.unflatten(-1, (-1, 2))) for part in (x_ThR, out_ThR))
        torch.mul(pairs, phase_T1R, out=into)
        return
    turned = torch.view_as_complex(x_ThR.float().unflatten(-1, (-1, 2)).contiguous()) * phase_T1R
    out_ThR.copy_(torch.view_as_real(turned).flatten(-2))
