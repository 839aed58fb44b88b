"""The two language models that training and decoding are compared on."""

from __future__ import annotations

from typing import Any

from omni_ray.config.model import LanguageConfig

_COMMON: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_codebooks": 0,
    "rope_theta": 1e4,
    "routed_scaling_factor": 2.5,
}
SMALL = LanguageConfig(
    hidden_size=256,
    num_layers=2,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=32,
    ffn_hidden_size=512,
    expert_ffn_hidden_size=128,
    n_routed_experts=32,
    zero_expert_num=16,
    moe_topk=4,
    target_ffn_experts=2.7,
    vocab_size=4096,
    max_position_embeddings=4096,
    **_COMMON,
)
"""Config S of the targets."""
LARGE = LanguageConfig(
    hidden_size=512,
    num_layers=4,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_rope_head_dim=32,
    qk_nope_head_dim=64,
    v_head_dim=64,
    ffn_hidden_size=1024,
    expert_ffn_hidden_size=256,
    n_routed_experts=64,
    zero_expert_num=32,
    moe_topk=6,
    target_ffn_experts=4.0,
    vocab_size=8192,
    max_position_embeddings=4096,
    **_COMMON,
)
"""Config L of the targets."""
