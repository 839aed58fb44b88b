"""Weights as ``rows.c`` reads them: its structures, and matrices in panels of its own width."""

# K inputs, N outputs, h heads, n nope dim, C latent rank, e value dim, H model dim

from __future__ import annotations

from ctypes import POINTER, Structure, c_double, c_float, c_int64, c_void_p
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from omni_ray.inference.row_weights import AttentionWeights, ExpertWeights, LayerWeights, Panels, RowWeights
from omni_ray.models.native.panels import Held, Matrix


class Attention(Structure):
    """See ``rows.c``."""

    _fields_: ClassVar = [
        *((name, Matrix) for name in ("qkv_a", "q_b", "out")),
        *((name, POINTER(Matrix)) for name in ("key_up", "value_up")),
    ]


class Layer(Structure):
    """See ``rows.c``."""

    _fields_: ClassVar = [
        ("attention", Attention * 2),
        ("gate_up", Matrix * 2),
        ("down", Matrix * 2),
        ("router", Matrix),
        ("expert_gate_up", POINTER(Matrix)),
        ("expert_down", POINTER(Matrix)),
        ("bias", POINTER(c_double)),
        ("shared_gain", c_void_p),
    ]


_SIZES = (
    *("layers", "hidden", "heads", "nope", "rope", "value", "q_rank", "kv_rank"),
    *("inner", "experts", "zeros", "top_k", "expert_inner"),
)


class Model(Structure):
    """See ``rows.c``."""

    _fields_: ClassVar = [
        *((name, c_int64) for name in _SIZES),
        ("scaling", c_double),
        *((name, c_float) for name in ("hidden_eps", "q_eps", "kv_eps")),
        ("layer", POINTER(Layer)),
        ("final_gain", c_void_p),
    ]


class Rows(Structure):
    """See ``rows.c``."""

    _fields_: ClassVar = [
        ("rows", c_int64),
        ("spans", c_int64),
        *((name, c_void_p) for name in ("span_rows", "span_start", "span_pages", "pages", "place", "cos", "sin")),
        ("cache", c_void_p),
        ("slot_stride", c_int64),
    ]


class NativeWeights:
    """A copy of the layers' weights in panels, and the structures that name them."""

    def __init__(self, weights: RowWeights, panel: int) -> None:
        """``panel``: columns of one panel."""
        self._held = Held(panel)
        part, experts = weights.layers[0].attention[0].module, weights.layers[0].experts
        layers = self._held.array(Layer, [self._layer(layer) for layer in weights.layers])
        self.model = Model(
            layers=len(weights.layers),
            hidden=weights.final_gain.numel(),
            heads=part.heads,
            nope=part.nope,
            rope=part.rope,
            value=part.value,
            q_rank=part.q_rank,
            kv_rank=part.kv_rank,
            inner=_columns(weights.layers[0].mlp[0].gate_up) // 2,
            experts=len(experts.down),
            zeros=_columns(experts.router) - len(experts.down),
            top_k=experts.top_k,
            expert_inner=_columns(experts.gate_up[0]) // 2,
            scaling=experts.scaling,
            hidden_eps=weights.edge**2,
            q_eps=part.q_rank * part.q_a_layernorm.eps,
            kv_eps=part.kv_rank * part.kv_a_layernorm.eps,
            layer=layers,
            final_gain=self._held.values(weights.final_gain),
        )

    def _layer(self, layer: LayerWeights) -> Layer:
        experts: ExpertWeights = layer.experts
        return Layer(
            attention=(Attention * 2)(*map(self._attention, layer.attention)),
            gate_up=(Matrix * 2)(*(self._held.matrix(_whole(mlp.gate_up)) for mlp in layer.mlp)),
            down=(Matrix * 2)(*(self._held.matrix(_whole(mlp.down)) for mlp in layer.mlp)),
            router=self._held.matrix(_whole(experts.router)),
            expert_gate_up=self._held.array(Matrix, [self._held.matrix(_whole(one)) for one in experts.gate_up]),
            expert_down=self._held.array(Matrix, [self._held.matrix(_whole(one)) for one in experts.down]),
            bias=self._held.array(c_double, experts.bias_E.tolist()),
            shared_gain=self._held.values(layer.shared_gain),
        )

    def _attention(self, weights: AttentionWeights) -> Attention:
        part, wide_EA = weights.module, _whole(weights.qkv_a)
        # The row and the two columns that hold constants of norms are of use to products alone.
        places = [*range(part.q_rank), *range(part.q_rank + 1, part.q_rank + 1 + part.kv_rank)]
        places += range(wide_EA.shape[1] - part.rope, wide_EA.shape[1])
        return Attention(
            qkv_a=self._held.matrix(wide_EA[:-1, places]),
            q_b=self._held.matrix(_whole(weights.q_b)),
            out=self._held.matrix(_whole(weights.out)),
            key_up=self._held.array(Matrix, [self._held.matrix(one) for one in weights.key_up.unbind(0)]),
            value_up=self._held.array(Matrix, [self._held.matrix(one) for one in weights.value_up.unbind(0)]),
        )


def _whole(panels: Panels) -> Tensor:
    return panels[0] if len(panels) == 1 else torch.cat(panels, dim=1)


def _columns(panels: Panels) -> int:
    return sum(panel.shape[1] for panel in panels)


def pointer(array: np.ndarray) -> int:
    """Address of a contiguous array's first value."""
    address: int = array.ctypes.data
    return address
