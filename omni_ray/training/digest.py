"""Short names of tensors' bits, to compare a step in many processes without moving it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """16 bytes of BLAKE2b over each tensor's memory, in hex; equal exactly where all bits are equal."""
    return {name: hashlib.blake2b(_memory(tensor), digest_size=16).hexdigest() for name, tensor in tensors.items()}


def _memory(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def differing_bits(first: Tensor, second: Tensor) -> int:
    """How many bits of two tensors of one shape and type differ."""
    ours = torch.frombuffer(bytearray(_memory(first)), dtype=torch.uint8)
    theirs = torch.frombuffer(bytearray(_memory(second)), dtype=torch.uint8)
    crossed = torch.bitwise_xor(ours, theirs)
    return int(sum(int(((crossed >> bit) & 1).sum()) for bit in range(8)))
