"""The language model's weights laid out for few rows: inputs first, norm gains folded in.

A product ``x [T, K] @ w [K, N]`` with the weight stored inputs first gives each row the same bits for every row count
from 2 on (docs/decisions, 0012); torch's own layout needs multiples of 16 rows and is slower for few.
"""

# T rows, H model dim, h heads, n nope dim, C latent rank, e value dim, N FFN experts, F inner dim, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from omni_ray.models.attention import LatentAttention
from omni_ray.models.block import ShortcutLayer
from omni_ray.models.layers import ROW_TILE, GatedMLP, RMSNorm
from omni_ray.models.llm import LanguageModel
from omni_ray.models.moe import MoE

FEWEST_ROWS = 2
"""One row alone takes another path (matrix times vector), whose sums run in another order."""
ROW_BLOCK = 128
"""Most rows of one product: from 192 on, sums over 1,024 and more inputs are split at other places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """One attention; the input norm's gain is inside ``qkv_a``, the queries' norm, scale and score scale in ``q_b``."""

    module: LatentAttention
    """Dims and norm constants."""
    input_eps: float
    """Of the norm before it."""
    qkv_a: Tensor
    """[H, q rank + C + R]."""
    q_b: Tensor
    """[q rank, h * (n + R)]."""
    latent_gain: Tensor
    """[C] gain of the latents' norm times their scale."""
    key_up: Tensor
    """[h, n, C]: queries into latent space."""
    value_up: Tensor
    """[h, C, e]: mixed latents to values."""
    out: Tensor
    """[h * e, H]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """One dense gated MLP."""

    gate_up: Tensor
    """[H, 2F], gate first."""
    down: Tensor
    """[F, H]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One mixture."""

    router: Tensor
    """[H, N + Z] fp32."""
    bias_E: Tensor
    """Correction of the choice, fp32."""
    top_k: int
    """Experts chosen per token."""
    scaling: float
    """Factor of the chosen scores."""
    gate_up: tuple[Tensor, ...]
    """[H, 2F] of every FFN expert."""
    down: tuple[Tensor, ...]
    """[F, H] of every FFN expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One shortcut-connected layer."""

    attention: tuple[AttentionWeights, AttentionWeights]
    """Both attentions, in order."""
    mlp: tuple[MlpWeights, MlpWeights]
    """Both dense MLPs; the second holds its norm's gain."""
    experts: ExpertWeights
    """The mixture beside them."""
    shared_norm: RMSNorm
    """Norm before the first MLP and the mixture; zero experts return its output, so its gain stays outside."""
    last_eps: float
    """Of the norm before the second MLP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWeights:
    """Everything that rows pass on their way from embeddings to logits."""

    layers: tuple[LayerWeights, ...]
    """In order."""
    norm: RMSNorm
    """The final one."""
    text_head: Tensor
    """[H, V]."""
    audio_heads: tuple[Tensor, ...]
    """[H, codec vocabulary] of every codebook."""
    tile: int
    """2, or 16 where only multiples of 16 rows agree (see :func:`row_tile`)."""

    def padded(self, rows: int) -> int:
        """Rows of a product that serves ``rows`` rows: no block of it is a lone row."""
        if self.tile == FEWEST_ROWS:
            return rows + 1 if rows % ROW_BLOCK == 1 else rows
        return rows + -rows % self.tile


def fingerprint(model: LanguageModel) -> tuple[object, ...]:
    """Changes when a weight, buffer or the rotary base does: the layout must then be made again."""
    tensors = (*model.parameters(), *model.buffers())
    return (model.rope_base, *((tensor.data_ptr(), tensor._version) for tensor in tensors))


def product(x_TK: Tensor, weight_KN: Tensor) -> Tensor:
    """``x @ weight`` in blocks of :data:`ROW_BLOCK` rows."""
    if len(x_TK) <= ROW_BLOCK:
        return torch.mm(x_TK, weight_KN)
    out_TN = x_TK.new_empty(len(x_TK), weight_KN.shape[1])
    product_into(x_TK, weight_KN, out_TN)
    return out_TN


def product_into(x_TK: Tensor, weight_KN: Tensor, out_TN: Tensor) -> None:
    """:func:`product`, written to ``out``."""
    if len(x_TK) <= ROW_BLOCK:
        torch.mm(x_TK, weight_KN, out=out_TN)
        return
    for x_BK, out_BN in zip(x_TK.split(ROW_BLOCK), out_TN.split(ROW_BLOCK), strict=True):
        torch.mm(x_BK, weight_KN, out=out_BN)


def add_product(out_TN: Tensor, x_TK: Tensor, weight_KN: Tensor) -> None:
    """``out += x @ weight``."""
    if len(x_TK) <= ROW_BLOCK:
        out_TN.addmm_(x_TK, weight_KN)
        return
    for x_BK, out_BN in zip(x_TK.split(ROW_BLOCK), out_TN.split(ROW_BLOCK), strict=True):
        out_BN.addmm_(x_BK, weight_KN)


@torch.no_grad()
def row_weights(model: LanguageModel) -> RowWeights:
    """Lay out the weights of ``model`` as they are now.

    On CPU this is a second copy of them; on other devices experts, by far the most, stay views.
    """
    head = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    text_head, audio_heads = (
        inputs_first(head),
        tuple(inputs_first(cast(Tensor, part.weight)) for part in model.audio_heads),
    )
    layers = tuple(_layer(cast(ShortcutLayer, layer)) for layer in model.model.layers)
    matrices = [text_head, *audio_heads]
    for layer in layers:
        matrices += [matrix for part in layer.attention for matrix in (part.qkv_a, part.q_b, part.out)]
        matrices += [matrix for part in layer.mlp for matrix in (part.gate_up, part.down)]
        matrices += [layer.experts.router, layer.experts.gate_up[0], layer.experts.down[0]]
    tile = row_tile({matrix.shape: matrix for matrix in matrices}.values())
    return RowWeights(layers=layers, norm=model.model.norm, text_head=text_head, audio_heads=audio_heads, tile=tile)


def inputs_first(weight: Tensor, gain: Tensor | None = None) -> Tensor:
    """[..., N, K] to [..., K, N], inputs times ``gain``: a copy on CPU, a view elsewhere unless there is a gain."""
    turned = weight.detach().transpose(-2, -1)
    if gain is not None:
        turned = (turned.float() * gain.detach().float().unsqueeze(-1)).to(weight.dtype)
    return turned.contiguous() if weight.device.type == "cpu" else turned


def row_tile(matrices: object) -> int:
    """2 where this processor's products give a row the same bits for any count from 2 on, else 16.

    Tried, not assumed: the property belongs to the library's kernels, which differ between processors.
    """
    for matrix in cast("list[Tensor]", matrices):
        if matrix.dtype != torch.float32 or matrix.device.type != "cpu":
            continue
        generator = torch.Generator().manual_seed(0)
        x_TK = torch.randn(ROW_BLOCK, matrix.shape[0], generator=generator)
        whole_TN = x_TK @ matrix
        if not all(torch.equal(x_TK[:rows] @ matrix, whole_TN[:rows]) for rows in (2, 3, 5, 11, 24)):
            return ROW_TILE
    return FEWEST_ROWS


def _layer(layer: ShortcutLayer) -> LayerWeights:
    attentions = tuple(
        _attention(cast(LatentAttention, layer.self_attn[part]), cast(RMSNorm, layer.input_layernorm[part]))
        for part in range(2)
    )
    first, last = (cast(GatedMLP, mlp) for mlp in layer.mlps)
    shared, before_last = (cast(RMSNorm, norm) for norm in layer.post_attention_layernorm)
    return LayerWeights(
        attention=cast("tuple[AttentionWeights, AttentionWeights]", attentions),
        mlp=(
            MlpWeights(gate_up=inputs_first(first.gate_up_proj.weight), down=inputs_first(first.down_proj.weight)),
            MlpWeights(
                gate_up=inputs_first(last.gate_up_proj.weight, before_last.weight),
                down=inputs_first(last.down_proj.weight),
            ),
        ),
        experts=_experts(layer.mlp),
        shared_norm=shared,
        last_eps=before_last.eps,
    )


def _attention(module: LatentAttention, norm: RMSNorm) -> AttentionWeights:
    up_hdC = module.kv_b_proj.weight.detach().unflatten(0, (module.heads, module.nope + module.value))
    return AttentionWeights(
        module=module,
        input_eps=norm.eps,
        qkv_a=inputs_first(module.qkv_a_proj.weight, norm.weight),
        q_b=inputs_first(module.q_b_proj.weight, module.q_a_layernorm.weight * module.q_gain),
        latent_gain=module.kv_a_layernorm.weight.detach() * module.kv_gain,
        key_up=up_hdC[:, : module.nope].contiguous(),
        value_up=up_hdC[:, module.nope :].transpose(1, 2).contiguous(),
        out=inputs_first(module.o_proj.weight),
    )


def _experts(moe: MoE) -> ExpertWeights:
    return ExpertWeights(
        router=inputs_first(moe.router.classifier.weight.float()),
        bias_E=moe.router.e_score_correction_bias.detach().float().clone(),
        top_k=moe.router.top_k,
        scaling=moe.router.scaling,
        gate_up=inputs_first(moe.experts.gate_up_proj).unbind(0),
        down=inputs_first(moe.experts.down_proj).unbind(0),
    )
