"""Multi-head latent attention (MLA) over packed sequences; decoding has its own form in ``inference/row_forward``."""

# T packed tokens, H model dim, h heads, n nope dim, R rotary dim, C latent rank

from __future__ import annotations

import math

from torch import Tensor, nn

from omni_ray.config.model import LanguageConfig
from omni_ray.models.layers import RMSNorm, rms_norm
from omni_ray.models.packed_attention import PackedLayout, packed_attention
from omni_ray.models.products import Linear

LATENT_NORM_EPS = 1e-6
"""The reference implementation leaves the low-rank norms at this default instead of the config's rms_norm_eps."""


class LatentAttention(nn.Module):
    """MLA: low-rank queries, one compressed key/value latent per token, rotary key shared by all heads.

    Source: networks.md section 4.  ``qkv_a_proj`` holds ``q_a_proj`` and ``kv_a_proj_with_mqa`` as one matrix (split on
    disk); the low-rank scales and the score scale are folded into the norms.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.heads, self.nope, self.rope, self.value = (
            heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.q_rank, self.kv_rank = config.q_lora_rank, config.kv_lora_rank
        # The scale of the scores rides on the queries' norm: one product less per score.
        self.q_gain = (math.sqrt(hidden / self.q_rank) if config.mla_scale_q_lora else 1.0) / math.sqrt(
            config.qk_nope_head_dim + config.qk_rope_head_dim
        )
        self.kv_gain = math.sqrt(hidden / self.kv_rank) if config.mla_scale_kv_lora else 1.0
        self.qkv_a_proj = Linear(hidden, self.q_rank + self.kv_rank + self.rope, bias=False)
        self.q_a_layernorm = RMSNorm(self.q_rank, LATENT_NORM_EPS)
        self.q_b_proj = Linear(self.q_rank, heads * (self.nope + self.rope), bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.kv_rank, heads * (self.nope + self.value), bias=False)
        self.o_proj = Linear(heads * self.value, hidden, bias=False)

    def project(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and what the cache keeps, before the rotary turn.

        Returns:
            q [T, h, n + R] times the score scale, latent [T, C] normed and scaled, k_rope [T, R].
        """
        q_a, kv_a, k_rope = self.qkv_a_proj(x_TH).split([self.q_rank, self.kv_rank, self.rope], dim=-1)
        q_norm = rms_norm(q_a, self.q_a_layernorm.weight, self.q_a_layernorm.eps, self.q_gain)
        latent = rms_norm(kv_a, self.kv_a_layernorm.weight, self.kv_a_layernorm.eps, self.kv_gain)
        return self.q_b_proj(q_norm).unflatten(-1, (self.heads, self.nope + self.rope)), latent, k_rope

    def forward(self, x_TH: Tensor, layout: PackedLayout) -> Tensor:
        """Whole sequences, packed: [T, H] -> [T, H]."""
        return self.attend_packed(*self.project(x_TH), layout)

    def attend_packed(self, q_Thd: Tensor, latent_TC: Tensor, k_rope_TR: Tensor, layout: PackedLayout) -> Tensor:
        """The rest of :meth:`forward` after :meth:`project`: [T, H]."""
        kv = self.kv_b_proj(latent_TC).unflatten(-1, (self.heads, self.nope + self.value))
        out: Tensor = self.o_proj(packed_attention(q_Thd, kv, k_rope_TR, self.nope, layout).flatten(1))
        return out
