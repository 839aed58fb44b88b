"""Multi-token prediction: one dense layer that looks one token further than the backbone."""

# T packed tokens, H model dim

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omni_ray.config.model import LanguageConfig
from omni_ray.models.attention import LatentAttention
from omni_ray.models.layers import GatedMLP, RMSNorm
from omni_ray.models.packed_attention import PackedLayout
from omni_ray.models.products import Linear


class AheadLayer(nn.Module):
    """``z = W_eh [RMS_e(E(x_{t+1})); RMS_h(h_t)]``, then a pre-norm attention and a dense MLP.

    Source: networks.md section 4, MTP head; module names are the published ones.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.eh_proj = Linear(2 * hidden, hidden, bias=False)
        self.enorm = nn.ModuleDict({"m": RMSNorm(hidden, eps)})
        self.hnorm = nn.ModuleDict({"m": RMSNorm(hidden, eps)})
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.transformer_layer = nn.ModuleDict({"mlp": GatedMLP(hidden, config.ffn_hidden_size)})

    def forward(self, hidden_TH: Tensor, next_TH: Tensor, layout: PackedLayout) -> Tensor:
        """[T, H] final hidden rows and the input embeddings of the rows after them -> [T, H]."""
        z_TH = self.eh_proj(torch.cat([self.enorm["m"](next_TH), self.hnorm["m"](hidden_TH)], dim=-1))
        z_TH = z_TH + self.self_attn(self.input_layernorm(z_TH), layout)
        out_TH: Tensor = z_TH + self.transformer_layer["mlp"](self.post_attention_layernorm(z_TH))
        return out_TH


class MultiTokenPrediction(nn.Module):
    """The published ``model.mtp`` without its copy of the embedding table, which is the backbone's own."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([AheadLayer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_TH: Tensor, embeddings_TH: Tensor, cu_seqlens: Sequence[int], layout: PackedLayout
    ) -> Tensor:
        """Rows for the text head that predict the token after the next.

        Args:
            hidden_TH: [T, H] of the backbone, after its final norm.
            embeddings_TH: [T, H] the backbone's input rows: text, summed codec rows and media features alike.
            cu_seqlens: Packing.  layout: Of this packing.
        Returns:
            [T, H]; row t is a prediction of token t + 2.  The last row of a sequence has no next row, reads itself
            in its place, and predicts nothing.
        """
        next_T = next_rows(cu_seqlens, hidden_TH.device)
        out_TH: Tensor = self.norm(self.layers[0](hidden_TH, embeddings_TH.index_select(0, next_T), layout))
        return out_TH


def next_rows(cu_seqlens: Sequence[int], device: torch.device) -> Tensor:
    """[T] number of the row after each row of its sequence; the last row's own number where there is none."""
    next_T = torch.arange(1, cu_seqlens[-1] + 1)
    lasts = torch.tensor([end - 1 for start, end in itertools.pairwise(cu_seqlens) if end > start])
    next_T[lasts.long()] = lasts.long()
    return next_T.to(device)
