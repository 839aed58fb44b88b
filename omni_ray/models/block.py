"""The shortcut-connected layer: two attentions, two dense MLPs, one mixture of experts beside them."""

from __future__ import annotations

from torch import Tensor, nn

from omni_ray.config.model import LanguageConfig
from omni_ray.models.attention import LatentAttention
from omni_ray.models.layers import GatedMLP, RMSNorm
from omni_ray.models.moe import MoE, Routing
from omni_ray.models.packed_attention import PackedLayout


class ShortcutLayer(nn.Module):
    """ScMoE layer; the mixture reads the first sub-layer's normed state and joins at the very end.

    Source: networks.md section 4, layer.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = nn.ModuleList([LatentAttention(config) for _ in range(2)])
        self.mlps = nn.ModuleList([GatedMLP(hidden, config.ffn_hidden_size) for _ in range(2)])
        self.input_layernorm = nn.ModuleList([RMSNorm(hidden, eps) for _ in range(2)])
        self.post_attention_layernorm = nn.ModuleList([RMSNorm(hidden, eps) for _ in range(2)])
        self.mlp = MoE(config)

    def forward(self, x_TH: Tensor, layout: PackedLayout) -> tuple[Tensor, Routing]:
        """Packed rows [T, H] -> [T, H] and the mixture's routing."""
        h1 = x_TH + self.self_attn[0](self.input_layernorm[0](x_TH), layout)
        u = self.post_attention_layernorm[0](h1)
        shortcut, routing = self.mlp(u)
        h2 = h1 + self.mlps[0](u)
        h3 = h2 + self.self_attn[1](self.input_layernorm[1](h2), layout)
        return h3 + self.mlps[1](self.post_attention_layernorm[1](h3)) + shortcut, routing
