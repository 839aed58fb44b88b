"""The language model's weights laid out for few rows: inputs first, norm gains and ``sqrt(n)`` of norms folded in.

A product ``x [T, K] @ w [K, N]`` with the weight stored inputs first gives each row the same bits for every row count
from 2 on (docs/decisions, 0012); torch's own layout needs multiples of 16 rows and is slower for few.
"""

# T rows, H model dim, h heads, n nope dim, C latent rank, e value dim, N FFN experts, F inner dim, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omni_ray.models.attention import LatentAttention
from omni_ray.models.block import ShortcutLayer
from omni_ray.models.layers import ROW_TILE, GatedMLP, RMSNorm
from omni_ray.models.llm import LanguageModel
from omni_ray.models.moe import MoE

FEWEST_ROWS = (2, 4)
"""Rows of a product, to be tried: one row alone takes another path (matrix times vector), whose sums run in another
order; AMD's processors have other paths for two and three as well."""
ROW_BLOCK = 128
"""Most rows of one product: from 192 on, sums over 1,024 and more inputs are split at other places."""
PANEL = 256
"""Columns of one panel of a large matrix."""
PANEL_INPUTS = 512
"""From this many inputs on a matrix is stored in panels: a product of few rows reads them up to 1.5 times as fast."""
EDGE = 16
"""Columns behind the residual stream's: one of them holds a constant of its norm, the rest keep rows aligned."""


Panels = tuple[Tensor, ...]
"""A matrix [K, N] as contiguous blocks of columns, or one of results as views."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """One attention; the input norm's gain is inside ``qkv_a``, the queries' norm, scale and score scale in ``q_b``,
    the latents' norm and scale in ``key_up`` and ``value_up``."""

    module: LatentAttention
    """Dims."""
    qkv_a: Panels
    """[H + 1, q rank + 1 + C + 1 + R]; the last row times 1 puts ``sqrt(n eps)`` behind the queries and the latents."""
    q_b: Panels
    """[q rank, h * (n + R)]."""
    key_up: Tensor
    """[h, n, C]: queries into latent space."""
    value_up: Tensor
    """[h, C, e]: mixed latents to values."""
    out: Panels
    """[h * e, H]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """One dense gated MLP."""

    gate_up: Panels
    """[H, 2F], gate first."""
    down: Panels
    """[F, H]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One mixture."""

    router: Panels
    """[H, N + Z] fp32."""
    bias_E: NDArray[np.float64]
    """Correction of the choice."""
    biases: tuple[float, ...]
    """The same, for one row."""
    top_k: int
    """Experts chosen per token."""
    scaling: float
    """Factor of the chosen scores."""
    gate_up: tuple[Panels, ...]
    """[H, 2F] of every FFN expert."""
    down: tuple[Panels, ...]
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
    shared_gain: Tensor
    """[H] of the norm before the first MLP and the mixture; zero experts return its output, so it stays outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWeights:
    """Everything that rows pass on their way from embeddings to logits."""

    layers: tuple[LayerWeights, ...]
    """In order."""
    edge: float
    """``sqrt(H eps)`` of the norms over the residual stream."""
    final_gain: Tensor
    """[H] of the final norm."""
    text_head: Panels
    """[H, V]."""
    audio_heads: tuple[Panels, ...]
    """[H, codec vocabulary] of every codebook."""
    tile: int
    """2 or 4: fewest rows of a product; or 16, where only multiples of 16 rows agree (see :func:`row_tile`)."""

    def padded(self, rows: int) -> int:
        """Rows of a product that serves ``rows`` rows: no block of it has too few."""
        if self.tile in FEWEST_ROWS:
            last = rows % ROW_BLOCK
            return rows + max(0, self.tile - last) if last else rows
        return rows + -rows % self.tile


def fingerprint(model: LanguageModel) -> tuple[object, ...]:
    """Changes when a weight, buffer or the rotary base does: the layout must then be made again."""
    tensors = (*model.parameters(), *model.buffers())
    return (model.rope_base, *((tensor.data_ptr(), tensor._version) for tensor in tensors))


def panels_of(out_TN: Tensor, weight: Panels) -> Panels:
    """Views of ``out`` that the panels of ``weight`` are multiplied into."""
    return out_TN.split([panel.shape[1] for panel in weight], dim=1) if len(weight) > 1 else (out_TN,)


def product(x_TK: Tensor, weight: Panels) -> Tensor:
    """``x @ weight`` in blocks of :data:`ROW_BLOCK` rows."""
    out_TN = x_TK.new_empty(x_TK.shape[0], sum(panel.shape[1] for panel in weight))
    product_into(x_TK, weight, panels_of(out_TN, weight))
    return out_TN


def product_into(x_TK: Tensor, weight: Panels, out: Panels) -> None:
    """:func:`product`, written to ``out`` (see :func:`panels_of`)."""
    for weight_KN, out_TN in zip(weight, out, strict=True):
        if x_TK.size(0) <= ROW_BLOCK:
            torch.mm(x_TK, weight_KN, out=out_TN)
            continue
        for x_BK, out_BN in zip(x_TK.split(ROW_BLOCK), out_TN.split(ROW_BLOCK), strict=True):
            torch.mm(x_BK, weight_KN, out=out_BN)


def add_product(out: Panels, x_TK: Tensor, weight: Panels) -> None:
    """``out += x @ weight``."""
    for weight_KN, out_TN in zip(weight, out, strict=True):
        if x_TK.size(0) <= ROW_BLOCK:
            out_TN.addmm_(x_TK, weight_KN)
            continue
        for x_BK, out_BN in zip(x_TK.split(ROW_BLOCK), out_TN.split(ROW_BLOCK), strict=True):
            out_BN.addmm_(x_BK, weight_KN)


@torch.no_grad()
def row_weights(model: LanguageModel) -> RowWeights:
    """Lay out the weights of ``model`` as they are now.

    On CPU this is a second copy of them; on other devices experts, by far the most, stay views.
    """
    head = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    text_head, audio_heads = (
        _matrix(head),
        tuple(_matrix(cast(Tensor, part.weight)) for part in model.audio_heads),
    )
    layers = tuple(_layer(cast(ShortcutLayer, layer)) for layer in model.model.layers)
    matrices: list[Panels] = [text_head, *audio_heads]
    for layer in layers:
        matrices += [matrix for part in layer.attention for matrix in (part.qkv_a, part.q_b, part.out)]
        matrices += [matrix for part in layer.mlp for matrix in (part.gate_up, part.down)]
        matrices += [layer.experts.router, layer.experts.gate_up[0], layer.experts.down[0]]
    tile = row_tile(list({panel.shape: panel for matrix in matrices for panel in matrix}.values()))
    norm = model.model.norm
    return RowWeights(
        layers=layers,
        edge=math.sqrt(norm.weight.numel() * norm.eps),
        final_gain=_gain(norm),
        text_head=text_head,
        audio_heads=audio_heads,
        tile=tile,
    )


def inputs_first(weight: Tensor, gain: Tensor | None = None) -> Tensor:
    """[..., N, K] to [..., K, N], inputs times ``gain``: a copy on CPU, a view elsewhere unless there is a gain."""
    turned = weight.detach().transpose(-2, -1)
    if gain is not None:
        turned = (turned.float() * gain.detach().float().unsqueeze(-1)).to(weight.dtype)
    return turned.contiguous() if weight.device.type == "cpu" else turned


def in_panels(weight_KN: Tensor) -> Panels:
    """The matrix in contiguous blocks of columns on CPU where it is large, else itself alone."""
    if weight_KN.device.type != "cpu" or weight_KN.shape[0] < PANEL_INPUTS:
        return (weight_KN,)
    return tuple(panel.contiguous() for panel in weight_KN.split(PANEL, dim=1))


def _matrix(weight: Tensor, gain: Tensor | None = None) -> Panels:
    return in_panels(inputs_first(weight, gain))


def row_tile(matrices: Sequence[Tensor]) -> int:
    """The fewest rows from which on this processor's products give a row the same bits for any count: 2 or 4, else 16.

    Tried, not assumed: the property belongs to the library's kernels, which differ between processors.
    """
    exact = [matrix for matrix in matrices if matrix.dtype == torch.float32 and matrix.device.type == "cpu"]
    for fewest in FEWEST_ROWS:
        if all(_agrees(matrix, fewest) for matrix in exact):
            return fewest
    return ROW_TILE


def _agrees(matrix_KN: Tensor, fewest: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs = matrix_KN.shape[0]
    x_TK = torch.randn(ROW_BLOCK, inputs + EDGE, generator=generator)[:, :inputs]
    whole_TN = x_TK @ matrix_KN
    counts = (fewest, fewest + 1, 5, 6, 7, 11, 24)
    return all(torch.equal(x_TK[:rows] @ matrix_KN, whole_TN[:rows]) for rows in counts)


def _gain(norm: RMSNorm, scale: float = 1.0) -> Tensor:
    """What ``x / sqrt(sum(x^2) + n eps)`` is multiplied with: the gain times ``sqrt(n)``, and ``scale``."""
    gain_N = norm.weight.detach().float() * (math.sqrt(norm.weight.numel()) * scale)
    return gain_N.to(norm.weight.dtype)


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
            MlpWeights(gate_up=_matrix(first.gate_up_proj.weight), down=_matrix(first.down_proj.weight)),
            MlpWeights(
                gate_up=_matrix(last.gate_up_proj.weight, _gain(before_last)),
                down=_matrix(last.down_proj.weight),
            ),
        ),
        experts=_experts(layer.mlp),
        shared_gain=_gain(shared),
    )


def _attention(module: LatentAttention, norm: RMSNorm) -> AttentionWeights:
    up_hdC = module.kv_b_proj.weight.detach().unflatten(0, (module.heads, module.nope + module.value))
    up_hdC = (up_hdC.float() * _gain(module.kv_a_layernorm, module.kv_gain).float()).to(up_hdC.dtype)
    return AttentionWeights(
        module=module,
        qkv_a=in_panels(_with_edges(inputs_first(module.qkv_a_proj.weight, _gain(norm)), module)),
        q_b=_matrix(module.q_b_proj.weight, _gain(module.q_a_layernorm, module.q_gain)),
        key_up=up_hdC[:, : module.nope].contiguous(),
        value_up=up_hdC[:, module.nope :].transpose(1, 2).contiguous(),
        out=_matrix(module.o_proj.weight),
    )


def _with_edges(qkv_HA: Tensor, module: LatentAttention) -> Tensor:
    """One more row, and a column behind the queries and one behind the latents, for the constants of their norms."""
    q_HQ, kv_HC, rope_HR = qkv_HA.split([module.q_rank, module.kv_rank, module.rope], dim=1)
    zero_H1 = qkv_HA.new_zeros(len(qkv_HA), 1)
    wide_HA = torch.cat([q_HQ, zero_H1, kv_HC, zero_H1, rope_HR], dim=1)
    edge_1A = wide_HA.new_zeros(1, wide_HA.shape[1])
    edge_1A[0, module.q_rank] = math.sqrt(module.q_rank * module.q_a_layernorm.eps)
    edge_1A[0, module.q_rank + 1 + module.kv_rank] = math.sqrt(module.kv_rank * module.kv_a_layernorm.eps)
    return torch.cat([wide_HA, edge_1A])


def _experts(moe: MoE) -> ExpertWeights:
    bias_E = moe.router.e_score_correction_bias.detach().double().cpu().numpy().copy()
    return ExpertWeights(
        router=_matrix(moe.router.classifier.weight.float()),
        bias_E=bias_E,
        biases=tuple(bias_E.tolist()),
        top_k=moe.router.top_k,
        scaling=moe.router.scaling,
        gate_up=tuple(map(in_panels, inputs_first(moe.experts.gate_up_proj).unbind(0))),
        down=tuple(map(in_panels, inputs_first(moe.experts.down_proj).unbind(0))),
    )
