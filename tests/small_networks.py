"""Sizes of the smallest networks that have every part."""

from __future__ import annotations

from omni_ray.config.model import LanguageConfig

SMALL_LANGUAGE = LanguageConfig(
    vocab_size=40,
    hidden_size=32,
    num_layers=1,
    num_attention_heads=2,
    ffn_hidden_size=24,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=3,
    zero_expert_num=2,
    moe_topk=2,
    target_ffn_experts=1.2,
    expert_ffn_hidden_size=10,
    routed_scaling_factor=1.5,
    max_position_embeddings=64,
    codec_vocab_size=40,
)
