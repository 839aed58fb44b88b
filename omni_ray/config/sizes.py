"""The networks of each size name: the columns of networks.md; ``flash-omni`` is what the settings' own defaults say."""

from __future__ import annotations

from omni_ray.config.model import AudioConfig, CodecConfig, LanguageConfig, OmniConfig, VisionConfig

# Sizes of a prototype that learned the tiny world; LayerScale 1 and RoPE base 10 fit a 4 x 4 grid of patches.
_TINY_LANGUAGE = LanguageConfig(
    vocab_size=1024,
    hidden_size=160,
    num_layers=2,
    num_attention_heads=4,
    ffn_hidden_size=320,
    q_lora_rank=80,
    kv_lora_rank=48,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=24,
    n_routed_experts=8,
    zero_expert_num=4,
    moe_topk=3,
    target_ffn_experts=2.0,
    expert_ffn_hidden_size=64,
    routed_scaling_factor=1.5,
    rope_theta=1e4,
    max_position_embeddings=4096,
    codec_vocab_size=132,
)
_TINY_VISION = VisionConfig(
    hidden_size=64,
    num_heads=4,
    num_layers=4,
    intermediate_size=192,
    layer_scale_init=1.0,
    rope_base=10.0,
    adaptor_dim=128,
    output_size=160,
    min_patches=16,
    max_patches=256,
    side_multiple=28,
    max_frames=16,
)
_TINY_AUDIO = AudioConfig(
    splice_left=2,
    splice_right=9,
    hidden_size=256,
    projection_size=96,
    num_layers=6,
    num_lookahead_layers=3,
    left_order=4,
    ctc_vocab_size=64,
    output_size=160,
)
_TINY_CODEC = CodecConfig(
    semantic_dim=64,
    semantic_heads=4,
    semantic_layers=2,
    semantic_ffn=256,
    semantic_codes=64,
    semantic_ctc_vocab_size=64,
    encoder_base=8,
    latent_dim=64,
    group_codes=10,
    decoder_dim=128,
)


_SMALL_LANGUAGE = LanguageConfig(
    vocab_size=32768,
    hidden_size=768,
    num_layers=8,
    num_attention_heads=12,
    ffn_hidden_size=2048,
    q_lora_rank=384,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=32,
    zero_expert_num=16,
    moe_topk=6,
    target_ffn_experts=4.0,
    expert_ffn_hidden_size=512,
    routed_scaling_factor=3.0,
    rope_theta=1e6,
    max_position_embeddings=32768,
    codec_vocab_size=8224,
)
_SMALL_VISION = VisionConfig(
    hidden_size=384,
    num_heads=6,
    num_layers=12,
    intermediate_size=1152,
    adaptor_dim=1536,
    output_size=768,
    min_patches=64,
    max_patches=1024,
)
_SMALL_AUDIO = AudioConfig(
    hidden_size=2048,
    projection_size=512,
    num_layers=12,
    output_size=768,
)
_SMALL_CODEC = CodecConfig(
    semantic_dim=512,
    semantic_heads=8,
    semantic_layers=12,
    semantic_ffn=2048,
    encoder_base=32,
    latent_dim=512,
    decoder_dim=768,
)


def _small() -> OmniConfig:
    return OmniConfig(language=_SMALL_LANGUAGE, vision=_SMALL_VISION, audio=_SMALL_AUDIO, codec=_SMALL_CODEC)


PRESETS = {
    "tiny": OmniConfig(language=_TINY_LANGUAGE, vision=_TINY_VISION, audio=_TINY_AUDIO, codec=_TINY_CODEC),
    "small": OmniConfig(language=_SMALL_LANGUAGE, vision=_SMALL_VISION, audio=_SMALL_AUDIO, codec=_SMALL_CODEC),
    "flash-omni": OmniConfig(
        language=LanguageConfig(), vision=VisionConfig(), audio=AudioConfig(), codec=CodecConfig()
    ),
}
"""Size name -> its four networks."""
