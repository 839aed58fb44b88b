"""Buffers of one forward over a number of rows, and every view of them that it uses.

Decoding runs thousands of small products; where making a view costs as much as the arithmetic on it, views are made
once.  Rows of a buffer beyond the real ones are filler: what they hold is finite and never read.
"""

# T rows with filler, H model dim, h heads, n nope dim, C latent rank, R rotary dim, X = C + R, e value dim
# Q query rank, K chosen experts, P rows of chosen FFN experts, F inner dim

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from omni_ray.inference.row_weights import EDGE, Panels, RowWeights, panels_of
from omni_ray.models.layers import ROW_TILE

_Memory = TypeVar("_Memory")
REMEMBERED_ROWS = 64
"""Forwards of at most so many rows keep their memory for the next one of the same size."""
REMEMBERED_SIZES = 8
"""Memories kept; the number of rows changes with every conversation that begins or ends, but seldom within a second."""
_MOST_SPANS = 4096
"""Views of experts' rows kept in one memory."""


def remember(kept: dict[int, _Memory], size: int, memory: _Memory) -> _Memory:
    """Keep a memory by its size; beyond :data:`REMEMBERED_SIZES` the one made first goes."""
    if len(kept) >= REMEMBERED_SIZES and size not in kept:
        del kept[next(iter(kept))]
    kept[size] = memory
    return memory


class ExpertSpan(NamedTuple):
    """Rows of one expert."""

    x_BH: Tensor
    gate_up: Panels
    inner_BF: Tensor
    out: Panels


class Normed:
    """``x / sqrt(sum(x^2) + n eps)`` of a buffer with one column behind its ``n`` that holds ``sqrt(n eps)``.

    That is the root mean square norm over ``sqrt(n)``; the factor lies in the weights behind it.
    """

    __slots__ = ("_all", "_size", "_values", "out")

    def __init__(self, values: Tensor, edge: Tensor, out: Tensor) -> None:
        """``values`` [T, n] and ``edge`` [T, n + 1] are views of one buffer; ``out`` [T, n]."""
        self._values, self._all, self.out = values, edge, out
        self._size = torch.empty(len(values), 1, dtype=torch.float32, device=values.device)

    def __call__(self) -> Tensor:
        """Norm what the buffer holds now, statistics in fp32."""
        torch.linalg.vector_norm(self._all, dim=-1, keepdim=True, dtype=torch.float32, out=self._size)
        return torch.div(self._values, self._size, out=self.out)


class RowMemory:
    """For ``total`` rows; made once and used again, or made for one forward of many rows."""

    def __init__(self, weights: RowWeights, total: int) -> None:
        self.weights, self.total = weights, total
        self.padded = weights.padded(total)
        part = weights.layers[0].attention[0]
        self._like = part.out[0]
        self.heads, self.rank, self.rope = part.module.heads, part.module.kv_rank, part.module.rope
        self._residual(sum(panel.shape[1] for panel in part.out), weights.edge)
        self._attention(part.module.q_rank, part.module.nope, part.module.value)
        self._mlp(weights.layers[0].mlp[0].down[0].shape[0])
        self._experts()

    def _new(self, *shape: int) -> Tensor:
        return self._like.new_zeros(shape)

    def _residual(self, hidden: int, edge: float) -> None:
        x_TE = self._new(self.padded, hidden + EDGE)
        x_TE[:, hidden] = edge
        normed_TE = self._new(self.padded, hidden + EDGE)
        normed_TE[:, hidden] = 1.0
        self.x_TH = x_TE[:, :hidden]
        """The residual stream."""
        self.x = panels_of(self.x_TH, self.weights.layers[0].attention[0].out)
        self.x_real_TH = self.x_TH[: self.total]
        self.x_filler = self.x_TH[self.total :]
        self.normed_TH = normed_TE[:, :hidden]
        self.normed_edge_T1 = normed_TE[:, : hidden + 1]
        """With the column of ones that puts the constants of the next norms in their places."""
        self.norm = Normed(self.x_TH, x_TE[:, : hidden + 1], self.normed_TH)
        self.u_TH = self._new(self.padded, hidden)
        """Normed rows with their gain: what zero-computation experts return."""
        self.u_real_TH = self.u_TH[: self.total]

    def _attention(self, q_rank: int, nope: int, value: int) -> None:
        heads, rank, rope, padded = self.heads, self.rank, self.rope, self.padded
        tiled = heads + -heads % ROW_TILE
        qkv_TA = self._new(padded, q_rank + 1 + rank + 1 + rope)
        self.qkv = panels_of(qkv_TA, self.weights.layers[0].attention[0].qkv_a)
        q_edge, kv, k_rope = qkv_TA.split([q_rank + 1, rank + 1, rope], dim=1)
        self.kept_TX = self._new(padded, rank + rope)
        """What the cache keeps of each row."""
        self.kept_real_TX = self.kept_TX[: self.total]
        self.q_norm = Normed(q_edge[:, :q_rank], q_edge, self._new(padded, q_rank))
        self.kv_norm = Normed(kv[:, :rank], kv, self.kept_TX[:, :rank])
        q_TD = self._new(padded, heads * (nope + rope))
        self.q = panels_of(q_TD, self.weights.layers[0].attention[0].q_b)
        q_Thd = q_TD.view(padded, heads, nope + rope)
        self.q_nope_hTn = q_Thd[..., :nope].transpose(0, 1)
        self.absorbed_hTC = self._new(heads, padded, rank)
        self.absorbed_ThC = self.absorbed_hTC.transpose(0, 1)
        self.query_ThX = self._new(padded, tiled, rank + rope)
        """Queries in latent space; heads come in tiles, the last of them filler."""
        self.query_heads_ThX = self.query_ThX[:, :heads]
        self.query_latent_ThC = self.query_heads_ThX[..., :rank]
        self.query_rows = self.query_ThX.unbind(0)
        self.turns = (
            Turned(self.kept_TX[:, None, rank:], k_rope[:, None]),
            Turned(self.query_heads_ThX[..., rank:], q_Thd[..., nope:]),
        )
        self.mixed_ThC = self._new(padded, tiled, rank)
        """Attention-weighted latents."""
        self.mixed_rows = self.mixed_ThC.unbind(0)
        self.mixed_heads_ThC = self.mixed_ThC[:, :heads]
        self.mixed_hTC = self.mixed_heads_ThC.transpose(0, 1)
        self.value_hTe = self._new(heads, padded, value)
        self.value_The = self._new(padded, heads, value)
        self.value_turned_The = self.value_hTe.transpose(0, 1)
        self.value_TD = self.value_The.view(padded, heads * value)

    def _mlp(self, inner: int) -> None:
        gate_up_TF2 = self._new(self.padded, 2 * inner)
        self.gate_up = panels_of(gate_up_TF2, self.weights.layers[0].mlp[0].gate_up)
        self.gate_TF, self.up_TF = gate_up_TF2.split(inner, dim=1)

    def _experts(self) -> None:
        weights = self.weights.layers[0].experts
        self._down, self._gate_up = weights.down[0], weights.gate_up[0]
        inner, hidden = self._down[0].shape[0], self.x_TH.shape[1]
        rows = self.total * weights.top_k + self.weights.padded(1)
        experts = sum(panel.shape[1] for panel in weights.router)
        scores_TE = torch.zeros(self.padded, experts, device=self._like.device)
        self.scores = panels_of(scores_TE, weights.router)
        self.scores_real_TE = scores_TE[: self.total]
        self._x_PH, self._out_PH = self._new(rows, hidden), self._new(rows, hidden)
        self._gate_up_PF2 = self._new(rows, 2 * inner)
        self._inner_PF, self._up_PF = self._gate_up_PF2.split(inner, dim=1)
        self.shortcut_TH = self._new(self.total, hidden)
        self._first: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._spans: dict[tuple[int, int], ExpertSpan] = {}

    def expert_rows(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first ``count`` rows of the experts' inputs, gates (then inner values), ups and outputs."""
        found = self._first.get(count)
        if found is None:
            found = (self._x_PH[:count], self._inner_PF[:count], self._up_PF[:count], self._out_PH[:count])
            self._first[count] = found
        return found

    def expert_span(self, start: int, count: int) -> ExpertSpan:
        """``count`` rows from ``start`` on."""
        found = self._spans.get((start, count))
        if found is None:
            if len(self._spans) >= _MOST_SPANS:
                self._spans.clear()
            rows = slice(start, start + count)
            gate_up, out = panels_of(self._gate_up_PF2[rows], self._gate_up), panels_of(self._out_PH[rows], self._down)
            found = self._spans[start, count] = ExpertSpan(self._x_PH[rows], gate_up, self._inner_PF[rows], out)
        return found


class Turned:
    """Rotates pairs (2i, 2i+1) of the last dim of one view into another; fp32 at least."""

    __slots__ = ("_complex", "_out", "_x")

    def __init__(self, out: Tensor, x: Tensor) -> None:
        """Both [T, h, R]."""
        self._out, self._x = out, x
        even = all(
            part.dtype == torch.float32
            and part.storage_offset() % 2 == 0
            and all(stride % 2 == 0 for stride in part.stride()[:-1])
            for part in (out, x)
        )
        self._complex = [torch.view_as_complex(part.unflatten(-1, (-1, 2))) for part in (out, x)] if even else None

    def __call__(self, phase_T1R: Tensor) -> None:
        """``phase`` is cos + i sin of every row."""
        if self._complex is not None:
            torch.mul(self._complex[1], phase_T1R, out=self._complex[0])
            return
        turned = torch.view_as_complex(self._x.float().unflatten(-1, (-1, 2)).contiguous()) * phase_T1R
        self._out.copy_(torch.view_as_real(turned).flatten(-2))
