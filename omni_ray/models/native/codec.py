"""The streaming codec decoder as compiled functions; another form of ``codec_stream.FrameDecoder``."""

# N frames, D input width, C channels, S samples of a frame

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from omni_ray.models.audio_decoder import AudioDecoder
from omni_ray.models.codec_blocks import DILATIONS, EPSILON, KERNEL, folded_weight
from omni_ray.models.codec_stream import RowTables
from omni_ray.models.native.panels import Held, Matrix

NORM_EPS = 1e-5
"""Of ``F.layer_norm``."""


class Conv(Structure):
    """See ``codec.c``."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("weight", "bias")),
        *((name, c_int64) for name in ("inputs", "outputs", "taps", "dilation")),
    ]


class Snake(Structure):
    """See ``codec.c``."""

    _fields_: ClassVar = [("alpha", c_void_p), ("inverse", c_void_p)]


class Unit(Structure):
    """See ``codec.c``."""

    _fields_: ClassVar = [("snake_in", Snake), ("snake_mid", Snake), ("wide", Conv), ("point", Conv)]


class Stage(Structure):
    """See ``codec.c``."""

    _fields_: ClassVar = [
        ("snake", Snake),
        ("up", Matrix),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("rate", "inputs", "outputs", "samples")),
        ("unit", Unit * len(DILATIONS)),
    ]


class Lstm(Structure):
    """See ``codec.c``."""

    _fields_: ClassVar = [("gates", Matrix), *((name, c_void_p) for name in ("bias", "scale", "shift"))]


class Decoder(Structure):
    """See ``codec.c``."""

    _fields_: ClassVar = [
        *((name, c_int64) for name in ("width", "lstms", "stages", "samples")),
        ("norm_eps", c_float),
        ("lstm", POINTER(Lstm)),
        ("inlet", Matrix),
        ("in_bias", c_void_p),
        ("stage", POINTER(Stage)),
        ("snake_out", Snake),
        ("out", Conv),
    ]


@dataclass(frozen=True, slots=True)
class NativeState:
    """Everything a running stream keeps; never changed in place, so a copy of the object is a snapshot."""

    values: Tensor

    def bytes(self) -> int:
        """Size in memory."""
        return self.values.numel() * self.values.element_size()


class NativeFrames:
    """The decoder of a codec with weight norms folded, one frame at a time."""

    def __init__(self, library: ctypes.CDLL, decoder: AudioDecoder, rows: RowTables) -> None:
        """``library``: from :func:`omni_ray.models.native.library.library`; ``rows``: what codes add to the input."""
        self._library, self.rows = library, rows
        self._held = Held(library.panel_columns())
        conv_in: Any = decoder.conv_in
        lstms: Iterable[Any] = decoder.glstm.lstms
        norms: Iterable[Any] = decoder.glstm.norms
        stages: Iterable[Any] = decoder.stages
        made: list[Stage] = []
        samples = 1
        for stage in stages:
            samples *= stage.rate
            made.append(self._stage(stage, samples))
        parts = [self._lstm(lstm, norm) for lstm, norm in zip(lstms, norms, strict=True)]
        weight_OCK, bias_O = folded_weight(conv_in)
        self.samples, self.width = samples, int(conv_in.in_channels)
        self._decoder = Decoder(
            width=self.width,
            lstms=len(parts),
            stages=len(made),
            samples=samples,
            norm_eps=NORM_EPS,
            lstm=self._held.array(Lstm, parts),
            inlet=self._held.matrix(weight_OCK.permute(2, 1, 0).reshape(-1, weight_OCK.shape[0])),
            in_bias=self._held.values(bias_O),
            stage=self._held.array(Stage, made),
            snake_out=self._snake(decoder.snake_out),
            out=self._conv(decoder.conv_out, 1),
        )
        self._state_floats = int(library.codec_state_floats(byref(self._decoder)))
        self._scratch_floats = int(library.codec_scratch_floats(byref(self._decoder)))
        self._own = threading.local()

    @staticmethod
    def fits(library: ctypes.CDLL, decoder: AudioDecoder) -> bool:
        """Whether the compiled form can run this decoder: fp32 on CPU, and a width of whole vectors."""
        conv_in: Any = decoder.conv_in
        weight = next(decoder.parameters())
        return bool(
            weight.device.type == "cpu" and weight.dtype == torch.float32 and conv_in.in_channels % library.lanes() == 0
        )

    def initial_state(self) -> NativeState:
        """The state of a stream that has not begun."""
        return NativeState(torch.zeros(self._state_floats))

    def advance(self, x_1D: Tensor | None, state: NativeState) -> NativeState:
        """See :meth:`omni_ray.models.codec_stream.FrameDecoder.advance`."""
        after = torch.empty(self._state_floats)
        x_1D = None if x_1D is None else x_1D.contiguous()
        self._library.codec_take(
            byref(self._decoder),
            c_void_p(None if x_1D is None else x_1D.data_ptr()),
            c_void_p(state.values.data_ptr()),
            c_void_p(after.data_ptr()),
            c_void_p(self._scratch()),
        )
        return NativeState(after)

    def render(self, state: NativeState) -> tuple[Tensor, NativeState]:
        """See :meth:`omni_ray.models.codec_stream.FrameDecoder.render`."""
        after, sound_S = torch.empty(self._state_floats), torch.empty(self.samples)
        self._library.codec_render(
            byref(self._decoder),
            c_void_p(state.values.data_ptr()),
            c_void_p(after.data_ptr()),
            c_void_p(sound_S.data_ptr()),
            c_void_p(self._scratch()),
            c_int64(self._scratch_floats // 2),
        )
        return sound_S, NativeState(after)

    def _scratch(self) -> int:
        """Address of this thread's working memory: streams of one codec may run in several."""
        if not hasattr(self._own, "scratch"):
            # Vectors run over into room that holds nothing: zeros, since what is no number at all is slow.
            self._own.scratch = torch.zeros(self._scratch_floats)
        address: int = self._own.scratch.data_ptr()
        return address

    def _stage(self, stage: Any, samples: int) -> Stage:
        weight_COR, bias_O = folded_weight(stage.up)
        units = [self._unit(unit, dilation) for unit, dilation in zip(stage.units, DILATIONS, strict=True)]
        return Stage(
            snake=self._snake(stage.snake),
            up=self._held.matrix(weight_COR.flatten(1)),
            bias=self._held.values(bias_O),
            rate=stage.rate,
            inputs=weight_COR.shape[0],
            outputs=weight_COR.shape[1],
            samples=samples,
            unit=(Unit * len(DILATIONS))(*units),
        )

    def _unit(self, unit: Any, dilation: int) -> Unit:
        return Unit(
            snake_in=self._snake(unit.snake_in),
            snake_mid=self._snake(unit.snake_mid),
            wide=self._conv(unit.wide, dilation),
            point=self._conv(unit.point, 1),
        )

    def _lstm(self, lstm: Any, norm: Any) -> Lstm:
        return Lstm(
            gates=self._held.matrix(torch.cat([lstm.weight_ih_l0, lstm.weight_hh_l0], dim=1).t()),
            bias=self._held.values(lstm.bias_ih_l0 + lstm.bias_hh_l0),
            scale=self._held.values(norm.weight),
            shift=self._held.values(norm.bias),
        )

    def _conv(self, conv: nn.Module, dilation: int) -> Conv:
        weight_OCK, bias_O = folded_weight(conv)
        outputs, inputs, taps = weight_OCK.shape
        assert taps in (1, KERNEL)
        weight, bias = self._held.values(weight_OCK), self._held.values(bias_O)
        return Conv(weight=weight, bias=bias, inputs=inputs, outputs=outputs, taps=taps, dilation=dilation)

    def _snake(self, snake: Any) -> Snake:
        alpha_C = snake.alpha.detach().float().flatten()
        inverse = self._held.values(1.0 / (alpha_C + EPSILON))
        return Snake(alpha=self._held.values(alpha_C), inverse=inverse)
