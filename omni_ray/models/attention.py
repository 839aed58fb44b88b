"""Multi-head latent attention over packed sequences; no token sees another sequence, no Python loop per sequence."""

# T packed tokens, H model dim, h heads, d query/key head dim, e value head dim, C latent rank, R rotary dim
# G padded rows of all buckets, S sequences of one bucket, L their padded length

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.config.model import LanguageConfig
from omni_ray.models.layers import RMSNorm, rms_norm
from omni_ray.models.rope import rotate_pairs

LENGTH_TILE = 16
"""Sequences are padded to a multiple of this: a sequence's bucket depends on its own length only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """How packed rows are laid out as a few rectangles of equal-length sequences; made once per forward."""

    buckets: tuple[tuple[int, int], ...]
    """(sequences, padded length) of each rectangle, in ascending length."""
    gather_G: Tensor | None
    """Packed row of every padded row (a padded place repeats a real row); None: the packing is one exact rectangle."""
    restore_T: Tensor | None
    """Padded row of every packed row."""


def packed_layout(cu_seqlens: Sequence[int], device: torch.device) -> PackedLayout:
    """Group sequences by padded length.

    Args:
        cu_seqlens: 0, then running sums of the lengths; empty sequences are fine.
        device: Where the index tensors live.
    """
    lengths = [b - a for a, b in itertools.pairwise(cu_seqlens)]
    present = [(n, a) for n, a in zip(lengths, cu_seqlens, strict=False) if n]
    if present and len({n for n, _ in present}) == 1:
        return PackedLayout(buckets=((len(present), present[0][0]),), gather_G=None, restore_T=None)
    by_length: dict[int, list[tuple[int, int]]] = {}
    for n, start in present:
        by_length.setdefault(n + -n % LENGTH_TILE, []).append((n, start))
    buckets, gather, rows = [], [], []
    base = 0
    for padded in sorted(by_length):
        members = by_length[padded]
        lengths_S1 = torch.tensor([[n] for n, _ in members])
        starts_S1 = torch.tensor([[s] for _, s in members])
        place_SL = torch.arange(padded).expand(len(members), padded)
        gather.append((starts_S1 + torch.minimum(place_SL, lengths_S1 - 1)).flatten())
        real = (place_SL < lengths_S1).flatten()
        rows.append(base + real.nonzero().flatten())
        buckets.append((len(members), padded))
        base += len(members) * padded
    gather_G = torch.cat(gather) if gather else torch.zeros(0, dtype=torch.int64)
    kept = torch.cat(rows) if rows else gather_G
    restore_T = torch.empty_like(kept)
    restore_T[gather_G[kept]] = kept
    return PackedLayout(buckets=tuple(buckets), gather_G=gather_G.to(device), restore_T=restore_T.to(device))


class _Rearrange(torch.autograd.Function):
    """Row gather whose backward is a gather too: no scatter, no atomics, same bits every time."""

    @staticmethod
    def forward(ctx, x: Tensor, forward_index: Tensor, backward_index: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(backward_index)
        return x.index_select(0, forward_index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def, override]
        (backward_index,) = ctx.saved_tensors
        return grad.index_select(0, backward_index), None, None


class _Restore(torch.autograd.Function):
    """Padded rows back to packed order; padded places get a zero gradient."""

    @staticmethod
    def forward(ctx, x_G: Tensor, restore_T: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(restore_T)
        ctx.rows = x_G.shape[0]
        return x_G.index_select(0, restore_T)

    @staticmethod
    def backward(ctx, grad_T: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        (restore_T,) = ctx.saved_tensors
        grad_G = grad_T.new_zeros((ctx.rows, *grad_T.shape[1:]))
        # Every packed row has its own padded place, so this copy never adds.
        grad_G.index_copy_(0, restore_T, grad_T)
        return grad_G, None


def causal_attention(q_SLhd: Tensor, k_SLhd: Tensor, v_SLhe: Tensor, scale: float) -> Tensor:
    """Causal softmax attention of a rectangle of sequences.

    Padding stands at the end, so causality already hides it from every real query.

    Returns:
        [S, L, h, e].
    """
    value_dim = v_SLhe.shape[-1]
    missing = q_SLhd.shape[-1] - value_dim
    # The fused CPU kernel needs equal head dims; a narrower v would take the slow path.
    v = F.pad(v_SLhe, (0, missing)) if missing > 0 else v_SLhe
    out = F.scaled_dot_product_attention(
        q_SLhd.transpose(1, 2), k_SLhd.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=scale
    )
    return out.transpose(1, 2)[..., :value_dim]


def packed_causal_attention(q_Thd: Tensor, k_Thd: Tensor, v_The: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """Causal attention inside each packed sequence.

    Args:
        q_Thd: [T, heads, d].  k_Thd: the same.  v_The: [T, heads, e].
        layout: Of this packing.
        scale: Multiplies the scores.
    Returns:
        [T, heads, e].
    """
    if layout.gather_G is None or layout.restore_T is None:
        ((count, length),) = layout.buckets or ((0, 0),)
        shape = (count, length)
        return causal_attention(
            q_Thd.unflatten(0, shape), k_Thd.unflatten(0, shape), v_The.unflatten(0, shape), scale
        ).flatten(0, 1)
    q_Ghd, k_Ghd, v_Ghe = (_Rearrange.apply(x, layout.gather_G, layout.restore_T) for x in (q_Thd, k_Thd, v_The))
    parts, base = [], 0
    for count, length in layout.buckets:
        rows = slice(base, base + count * length)
        shape = (count, length)
        out = causal_attention(
            q_Ghd[rows].unflatten(0, shape), k_Ghd[rows].unflatten(0, shape), v_Ghe[rows].unflatten(0, shape), scale
        )
        parts.append(out.flatten(0, 1))
        base += count * length
    restored: Tensor = _Restore.apply(torch.cat(parts), layout.restore_T)
    return restored


class LatentAttention(nn.Module):
    """MLA: low-rank queries, one compressed key/value latent per token, rotary part shared by all heads.

    Source: models.md section 4.  ``qkv_a_proj`` holds ``q_a_proj`` and ``kv_a_proj_with_mqa`` as one matrix (split on
    disk); the scale of the latent is folded into its norm.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        heads, nope, rope, value = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.heads, self.nope, self.rope, self.value = heads, nope, rope, value
        self.q_rank, self.kv_rank = config.q_lora_rank, config.kv_lora_rank
        self.q_gain = math.sqrt(config.hidden_size / self.q_rank) if config.mla_scale_q_lora else 1.0
        self.kv_gain = math.sqrt(config.hidden_size / self.kv_rank) if config.mla_scale_kv_lora else 1.0
        self.scale = 1.0 / math.sqrt(nope + rope)
        hidden = config.hidden_size
        self.qkv_a_proj = nn.Linear(hidden, self.q_rank + self.kv_rank + rope, bias=False)
        self.q_a_layernorm = RMSNorm(self.q_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(self.q_rank, heads * (nope + rope), bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(self.kv_rank, heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(heads * value, hidden, bias=False)

    def project(self, x_TH: Tensor, rope_TP: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and what the cache keeps.

        Returns:
            q_nope [T, h, nope], q_rope [T, h, R] turned, latent [T, C] scaled, k_rope [T, R] turned.
        """
        q_a, kv_a, k_rope = self.qkv_a_proj(x_TH).split([self.q_rank, self.kv_rank, self.rope], dim=-1)
        q_norm = rms_norm(q_a, self.q_a_layernorm.weight, self.q_a_layernorm.eps, self.q_gain)
        q = self.q_b_proj(q_norm).unflatten(-1, (self.heads, self.nope + self.rope))
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent = rms_norm(kv_a, self.kv_a_layernorm.weight, self.kv_a_layernorm.eps, self.kv_gain)
        return q_nope, rotate_pairs(q_rope, *rope_TP), latent, rotate_pairs(k_rope.unsqueeze(1), *rope_TP).squeeze(1)

    def forward(self, x_TH: Tensor, layout: PackedLayout, rope_TP: tuple[Tensor, Tensor]) -> Tensor:
        """[T, H] -> [T, H]; ``rope_TP`` from :func:`rope_tables`."""
        q_nope, q_rope, latent, k_rope = self.project(x_TH, rope_TP)
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).split([self.nope, self.value], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, self.heads, -1)], dim=-1)
        out: Tensor = self.o_proj(packed_causal_attention(q, k, v, layout, self.scale).flatten(1))
        return out
