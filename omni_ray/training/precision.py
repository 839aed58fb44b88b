"""Half-precision weights to compute with, over fp32 masters that are trained and saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from omni_ray.models.moe import Router

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEEPS_FP32 = (Router,)
"""Modules whose parameters stay: rounded router scores would choose other experts."""


def compute_in(network: nn.Module, precision: Precision, masters_in_host: bool = False) -> dict[str, Tensor]:
    """Round a network's parameters to the dtype that it computes in; buffers (statistics, biases) stay as they are.

    Args:
        masters_in_host: Keep the masters in host memory, whatever device the network is on.
    Returns:
        The fp32 master of every parameter by name; the parameter itself where it was not rounded and need not move.
    """
    dtype = DTYPES[precision]
    kept = {id(p) for module in network.modules() if isinstance(module, KEEPS_FP32) for p in module.parameters()}
    masters: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        masters[name] = parameter
        if parameter.dtype != dtype and id(parameter) not in kept:
            masters[name] = parameter.detach()
            parameter.data = parameter.data.to(dtype)
        if masters_in_host and masters[name].device.type != "cpu":
            masters[name] = host_copy(masters[name])
    return masters


def host_copy(tensor: Tensor) -> Tensor:
    """A tensor's values in host memory of their own."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def copy_with(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network in host memory whose parameters have the values (and dtype) of ``weights``.

    Args:
        network: On any device.  weights: By parameter name; those that are left out are copied as they are.
    """
    memo: dict[int, Tensor] = {id(buffer): host_copy(buffer) for buffer in network.buffers()}
    for name, parameter in network.named_parameters():
        memo[id(parameter)] = nn.Parameter(host_copy(weights.get(name, parameter)), parameter.requires_grad)
    return copy.deepcopy(network, memo)
