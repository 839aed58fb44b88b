"""Running sounds side by side: states of single streams joined for one forward, and taken apart again.

A row's bits do not depend on the streams beside it (``AudioEncoder``), so who shares a forward is a question of cost.
"""

# B streams, S samples, N rows, D language width

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni_ray.models.audio_encoder import AudioState
from omni_ray.models.fbank import FbankState
from omni_ray.models.fsmn import LayerState


def shape_of(state: AudioState) -> tuple[object, ...]:
    """States of equal shapes can be joined."""
    frames = None if state.frames_BTM is None else state.frames_BTM.shape[1]
    layers = tuple((layer.history_BNP.shape[1], layer.pending_BNP.shape[1]) for layer in state.layers)
    return state.fbank.tail_BS.shape[1], frames, layers


def join(states: Sequence[AudioState]) -> AudioState:
    """One state of all streams, in their order.

    Args:
        states: Of equal shapes; see :func:`shape_of`.
    """
    frames = [state.frames_BTM for state in states if state.frames_BTM is not None]
    return AudioState(
        fbank=FbankState(tail_BS=torch.cat([state.fbank.tail_BS for state in states])),
        frames_BTM=torch.cat(frames) if frames else None,
        layers=tuple(
            LayerState(
                history_BNP=torch.cat([layer.history_BNP for layer in same]),
                pending_BNP=torch.cat([layer.pending_BNP for layer in same]),
            )
            for same in zip(*(state.layers for state in states), strict=True)
        ),
    )


def split(state: AudioState) -> list[AudioState]:
    """The streams of a state, each by itself and holding nothing of the others."""
    return [_one(state, stream) for stream in range(state.fbank.tail_BS.shape[0])]


def _one(state: AudioState, stream: int) -> AudioState:
    def own(values: Tensor) -> Tensor:
        return values[stream : stream + 1].clone()

    return AudioState(
        fbank=FbankState(tail_BS=own(state.fbank.tail_BS)),
        frames_BTM=None if state.frames_BTM is None else own(state.frames_BTM),
        layers=tuple(
            LayerState(history_BNP=own(layer.history_BNP), pending_BNP=own(layer.pending_BNP)) for layer in state.layers
        ),
    )
