"""Sizes of the networks. Published key names where a published file has them (networks.md sections 1 to 4)."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from omni_ray.types.errors import ConfigError

SizeName = Literal["tiny", "small", "flash-omni"]


class Checked(BaseModel):
    """Frozen settings; unknown keys are refused (with the nearest known key, by config/load.py)."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class LanguageConfig(Checked):
    """LongCat-Flash language backbone; keys of the published ``config.json``."""

    vocab_size: PositiveInt = 131072
    hidden_size: PositiveInt = 6144
    num_layers: PositiveInt = 28
    """Shortcut-connected layers, each with two attentions, two dense MLPs and one MoE."""
    num_attention_heads: PositiveInt = 64
    ffn_hidden_size: PositiveInt = 12288
    q_lora_rank: PositiveInt = 1536
    kv_lora_rank: PositiveInt = 512
    qk_nope_head_dim: PositiveInt = 128
    qk_rope_head_dim: PositiveInt = 64
    v_head_dim: PositiveInt = 128
    n_routed_experts: PositiveInt = 512
    """FFN experts N."""
    zero_expert_num: NonNegativeInt = 256
    """Zero-computation (identity) experts Z."""
    moe_topk: PositiveInt = 12
    """Experts chosen per token, zero-computation experts included."""
    target_ffn_experts: PositiveFloat = 8.0
    """K_e: FFN experts per token that the bias controller aims at."""
    expert_ffn_hidden_size: PositiveInt = 2048
    routed_scaling_factor: PositiveFloat = 6.0
    rms_norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 1e7
    max_position_embeddings: PositiveInt = 131072
    initializer_range: PositiveFloat = 0.02
    tie_word_embeddings: bool = False
    mla_scale_q_lora: bool = True
    mla_scale_kv_lora: bool = True
    num_codebooks: NonNegativeInt = 4
    """Audio embedding tables and heads; 0 for a text-only checkpoint."""
    codec_vocab_size: PositiveInt = 8224
    """32 reserved + codes per codebook."""
    mtp_layers: NonNegativeInt = 0
    """Multi-token-prediction heads: 0 or 1."""
    bos_token_id: NonNegativeInt = 1
    eos_token_id: NonNegativeInt = 2
    pad_token_id: NonNegativeInt = 3
    """The text-pad of parallel text-speech rows as well."""

    @model_validator(mode="after")
    def can_be(self) -> Self:
        """Refuse sizes that contradict each other, with the numbers and the mend."""
        available = self.n_routed_experts + self.zero_expert_num
        if self.moe_topk > available:
            raise ConfigError(f"moe_topk is {self.moe_topk}, yet {available} experts exist; choose 1..{available}")
        if self.target_ffn_experts > self.moe_topk:
            raise ConfigError(
                f"target_ffn_experts is {self.target_ffn_experts}, above moe_topk {self.moe_topk}; lower it"
            )
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; RoPE rotates pairs, so make it even")
        if self.mtp_layers > 1:
            raise ConfigError(f"mtp_layers is {self.mtp_layers}; the published head has one layer, choose 0 or 1")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, yet vocab_size is {self.vocab_size}; choose an id below it"
                )
        if self.num_codebooks not in (0, 4):
            raise ConfigError(f"num_codebooks is {self.num_codebooks}; the codec has 4 (0 for a text-only model)")
        return self


class VisionConfig(Checked):
    """LongCat-ViT and its projector (networks.md section 1)."""

    patch_size: PositiveInt = 14
    temporal_patch_size: PositiveInt = 2
    hidden_size: PositiveInt = 1280
    num_heads: PositiveInt = 16
    num_layers: PositiveInt = 32
    intermediate_size: PositiveInt = 5184
    """I of the published config; the SwiGLU's real width is floor(2 I / 3)."""
    layer_scale_init: PositiveFloat = 0.1
    rope_base: PositiveFloat = 1e4
    norm_eps: PositiveFloat = 1e-6
    merge: tuple[PositiveInt, PositiveInt] = (1, 2)
    """Rows and columns of patches joined into one token."""
    adaptor_dim: PositiveInt = 7168
    projector_linears: Literal[2, 3] = 3
    """Linears of the projector: 3 in the published demo code, 2 in the report's words."""
    output_size: PositiveInt = 6144
    """Language hidden size."""
    min_patches: PositiveInt = 576
    max_patches: PositiveInt = 5832
    side_multiple: PositiveInt = 112
    """Each side is rounded to a multiple of this many pixels."""
    max_frames: PositiveInt = 128

    @property
    def mlp_size(self) -> int:
        """Real SwiGLU width."""
        return 2 * self.intermediate_size // 3

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch: 3 channels, two frames, p x p."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @model_validator(mode="after")
    def can_be(self) -> Self:
        """Refuse head sizes that 2D-RoPE cannot split."""
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ConfigError(
                f"vision hidden_size {self.hidden_size} over {self.num_heads} heads must give a multiple of 4 "
                "for 2D-RoPE; change either"
            )
        joined = self.patch_size * math.lcm(*self.merge)
        if self.side_multiple % joined:
            raise ConfigError(
                f"side_multiple is {self.side_multiple} pixels; merge {self.merge} needs a multiple of {joined}"
            )
        unit = (self.side_multiple // self.patch_size) ** 2
        if self.min_patches > self.max_patches or self.max_patches < unit:
            limits = f"min_patches {self.min_patches} and max_patches {self.max_patches}"
            raise ConfigError(f"{limits} leave no picture: the smallest has {unit} patches; raise max_patches")
        return self


class AudioConfig(Checked):
    """Streaming FSMN audio encoder and its projector (networks.md section 2)."""

    sample_rate_hz: PositiveInt = 16000
    num_mels: PositiveInt = 80
    mel_low_hz: PositiveFloat = 40.0
    mel_high_hz: PositiveFloat = 7800.0
    splice_left: NonNegativeInt = 7
    splice_right: NonNegativeInt = 7
    """Splice window = left + 1 + right fbank frames."""
    stride: PositiveInt = 8
    """fbank frames per output row: 8 x 10 ms = 80 ms."""
    hidden_size: PositiveInt = 6144
    projection_size: PositiveInt = 1536
    num_layers: PositiveInt = 22
    num_lookahead_layers: NonNegativeInt = 6
    left_order: PositiveInt = 10
    right_order: NonNegativeInt = 1
    num_post_layers: PositiveInt = 2
    ctc_vocab_size: PositiveInt = 5252
    dropout: float = 0.1
    output_size: PositiveInt = 6144
    """Language hidden size."""

    @property
    def splice_frames(self) -> int:
        """Frames joined into one input vector."""
        return self.splice_left + 1 + self.splice_right

    def num_frames(self, samples: int) -> int:
        """fbank frames of a recording, 25 ms every 10 ms without padding: floor((S - 400) / 160) + 1 at 16 kHz."""
        window, shift = round(0.025 * self.sample_rate_hz), round(0.010 * self.sample_rate_hz)
        return max(0, (samples - window) // shift + 1)

    def num_rows(self, samples: int) -> int:
        """Language rows of a recording: ceil(frames / stride); 0 where the encoder refuses it as too short."""
        return -(-self.num_frames(samples) // self.stride)

    @property
    def lookahead_ms(self) -> int:
        """How long after the nominal end of a row (80 ms each) its last needed sample comes.

        Row t needs layer input t + A (A = right_order of every look-ahead layer), hence fbank frame
        stride * (t + A) + splice_right, whose window ends 25 ms after its start; row t ends at 10 * stride * (t + 1).
        """
        layers_ms = 10 * self.stride * self.num_lookahead_layers * self.right_order
        return layers_ms + 10 * self.splice_right + 25 - 10 * self.stride

    @model_validator(mode="after")
    def can_be(self) -> Self:
        """Refuse a splice that skips frames, and more look-ahead layers than layers."""
        if self.splice_frames < self.stride:
            raise ConfigError(
                f"splice_left {self.splice_left} + 1 + splice_right {self.splice_right} = {self.splice_frames} frames "
                f"leave gaps at stride {self.stride}; widen the splice or lower the stride"
            )
        if self.num_lookahead_layers > self.num_layers:
            raise ConfigError(
                f"num_lookahead_layers is {self.num_lookahead_layers}, yet there are {self.num_layers} layers; lower it"
            )
        if not self.mel_low_hz < self.mel_high_hz <= self.sample_rate_hz / 2:
            limits = f"mel_low_hz {self.mel_low_hz:g} and mel_high_hz {self.mel_high_hz:g} do not fit"
            raise ConfigError(f"{limits} {self.sample_rate_hz} samples a second; choose low < high <= half of it")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"audio dropout is {self.dropout:g}; choose 0 up to, not including, 1")
        return self


class CodecConfig(Checked):
    """Four-codebook audio codec (networks.md section 3)."""

    sample_rate_hz: PositiveInt = 16000
    output_rate_hz: PositiveInt = 24000
    num_mels: PositiveInt = 80
    semantic_dim: PositiveInt = 1280
    semantic_heads: PositiveInt = 20
    semantic_layers: PositiveInt = 26
    semantic_ffn: PositiveInt = 5120
    semantic_codes: PositiveInt = 8192
    semantic_ctc_vocab_size: PositiveInt = 5252
    encoder_base: PositiveInt = 64
    latent_dim: PositiveInt = 1024
    encoder_strides: tuple[PositiveInt, ...] = (4, 5, 6, 8)
    levels: PositiveInt = 3
    group_codes: PositiveInt = 90
    """Entries of each of the two sub-codebooks of a level; a level has group_codes squared codes."""
    group_dim: PositiveInt = 8
    decoder_dim: PositiveInt = 1536
    decoder_rates_24k: tuple[PositiveInt, ...] = (8, 6, 6, 5)
    decoder_rates_16k: tuple[PositiveInt, ...] = (8, 6, 5, 4)
    max_segment_s: PositiveFloat = 30.0

    @property
    def hop(self) -> int:
        """Input samples a frame (960 at 16 kHz = 60 ms)."""
        return math.prod(self.encoder_strides)

    @property
    def output_hop(self) -> int:
        """24 kHz samples a frame (1440 = 60 ms)."""
        return math.prod(self.decoder_rates_24k)


class OmniConfig(Checked):
    """The four networks of one size."""

    language: LanguageConfig
    vision: VisionConfig
    audio: AudioConfig
    codec: CodecConfig

    @model_validator(mode="after")
    def fits_together(self) -> Self:
        """Projectors end in the language width; codec tables hold every code."""
        for name, size in (("vision", self.vision.output_size), ("audio", self.audio.output_size)):
            if size != self.language.hidden_size:
                raise ConfigError(
                    f"{name}.output_size is {size}, yet language.hidden_size is {self.language.hidden_size}; "
                    "make them equal"
                )
        need = 32 + max(self.codec.semantic_codes, self.codec.group_codes**2)
        if self.language.num_codebooks and self.language.codec_vocab_size < need:
            raise ConfigError(
                f"language.codec_vocab_size is {self.language.codec_vocab_size}, yet the codec needs {need} "
                "(32 reserved + codes); raise it"
            )
        return self


def model_preset(size: SizeName) -> OmniConfig:
    """The networks of one size name.

    Raises:
        ConfigError: the name is none of tiny, small, flash-omni.
    """
    from omni_ray.config.sizes import PRESETS

    if size not in PRESETS:
        raise ConfigError(f"size {size!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[size]
