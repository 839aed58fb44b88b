"""The 24 kHz decoder one frame at a time: packed weights, state as an object, the same bits for any chunking.

Every frame runs the same kernels on the same shapes, whether frames come one by one or all at once; so chunked decoding
equals whole decoding bit for bit. (A convolution over a longer signal may pick another kernel or split and differ in
the last bit, which is why the whole-clip module in audio_decoder.py is for training and accelerators.)

Legend: D input width, C channels of a stage, T samples a frame of a stage, K = 7 taps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.models.audio_decoder import LOOKAHEAD_FRAMES, AudioDecoder, UpsampleStage
from omni_ray.models.codec_blocks import KERNEL, ResidualUnit, Snake, folded_weight
from omni_ray.models.quantizer import Quantizer
from omni_ray.types.errors import RequestError

if TYPE_CHECKING:
    from omni_ray.models.codec import Codec


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderState:
    """Everything a running stream keeps; tensors are never changed in place, so a copy of the object is a snapshot."""

    lstm: tuple[tuple[Tensor, Tensor], ...]
    """(h [1, D], c [1, D]) of each LSTM layer."""
    window_7D: Tensor
    """GLSTM outputs under the symmetric convolution, newest last; zeros before the first frame."""
    pasts: tuple[Tensor, ...]
    """Samples that each causal convolution still sees: 6 x dilation of each unit, 6 of the last convolution."""

    def bytes(self) -> int:
        """Size in memory."""
        tensors = [self.window_7D, *self.pasts, *(part for pair in self.lstm for part in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _PackedSnake:
    """Snake with its constants ready: ``x + sin^2(alpha x) / alpha``."""

    def __init__(self, snake: Snake, rows_are_time: bool) -> None:
        alpha_1C1 = snake.alpha.detach().float()
        shape = (1, -1) if rows_are_time else (-1, 1)
        self.alpha = alpha_1C1.reshape(shape).contiguous()
        self.inverse = (1.0 / (alpha_1C1 + 1e-9)).reshape(shape).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        wave = (self.alpha * x).sin_()
        return torch.addcmul(x, wave.mul_(wave), self.inverse)


class _PackedConv:
    """Causal dilated convolution as one matrix product over gathered taps."""

    def __init__(self, conv: nn.Module, dilation: int, rows_are_time: bool) -> None:
        weight_OCK, bias_O = folded_weight(conv)
        flat_OX = weight_OCK.permute(0, 2, 1).reshape(weight_OCK.shape[0], -1)
        self.rows_are_time = rows_are_time
        self.dilation = dilation
        self.past = (KERNEL - 1) * dilation
        self.weight = (flat_OX.t() if rows_are_time else flat_OX).contiguous()
        self.bias = bias_O.contiguous() if rows_are_time else bias_O.unsqueeze(1).contiguous()

    def __call__(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """This frame's outputs and the next past; x is [T, C] when rows are time, else [C, T]."""
        step = self.dilation
        if self.rows_are_time:
            frame, channels = x.shape
            long = torch.cat([past, x])
            taps = long.as_strided((frame, KERNEL, channels), (channels, step * channels, 1)).reshape(frame, -1)
            return torch.addmm(self.bias, taps, self.weight), long[frame:]
        channels, frame = x.shape
        long = torch.cat([past, x], dim=1)
        taps = long.as_strided((KERNEL, channels, frame), (step, long.shape[1], 1)).reshape(-1, frame)
        return torch.addmm(self.bias, self.weight, taps), long[:, frame:].contiguous()


class _PackedUnit:
    """Causal residual unit."""

    def __init__(self, unit: ResidualUnit, rows_are_time: bool) -> None:
        self.snake_in = _PackedSnake(unit.snake_in, rows_are_time)
        self.wide = _PackedConv(unit.wide, unit.dilation, rows_are_time)
        self.snake_mid = _PackedSnake(unit.snake_mid, rows_are_time)
        weight_OC1, bias_O = folded_weight(unit.point)
        weight_OC = weight_OC1.squeeze(-1)
        self.rows_are_time = rows_are_time
        self.weight = (weight_OC.t() if rows_are_time else weight_OC).contiguous()
        self.bias = bias_O.contiguous() if rows_are_time else bias_O.unsqueeze(1).contiguous()

    def __call__(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        inner, past = self.wide(self.snake_in(x), past)
        inner = self.snake_mid(inner)
        sides = (inner, self.weight) if self.rows_are_time else (self.weight, inner)
        return torch.addmm(x, *sides).add_(self.bias), past


class _PackedStage:
    """Snake, transposed convolution (kernel = stride, hence one product), three units."""

    def __init__(self, stage: UpsampleStage, frame: int, input_rows_are_time: bool) -> None:
        """``frame``: output samples a frame of this stage."""
        weight_COR, bias_O = folded_weight(stage.up)
        self.channels = weight_COR.shape[1]
        # Few long rows make the best products: time along the rows while channels outnumber samples, else channels.
        self.rows_are_time = self.channels >= frame
        self.input_rows_are_time = input_rows_are_time
        self.snake = _PackedSnake(stage.snake, input_rows_are_time)
        self.weight = weight_COR.permute(0, 2, 1).reshape(weight_COR.shape[0], -1).contiguous()
        self.bias = bias_O.repeat(stage.rate).contiguous()
        self.units = [_PackedUnit(unit, self.rows_are_time) for unit in stage.units if isinstance(unit, ResidualUnit)]

    def __call__(self, x: Tensor, pasts: list[Tensor], new_pasts: list[Tensor]) -> Tensor:
        x = self.snake(x)
        rows = x if self.input_rows_are_time else x.t()
        x = torch.addmm(self.bias, rows, self.weight).view(-1, self.channels)
        if not self.rows_are_time:
            x = x.t().contiguous()
        for unit in self.units:
            x, past = unit(x, pasts[len(new_pasts)])
            new_pasts.append(past)
        return x


class RowTables:
    """What every code adds to the decoder's input, read once: a look-up instead of six products."""

    @torch.no_grad()
    def __init__(self, decoder: AudioDecoder, quantizer: Quantizer) -> None:
        levels: Iterable[Any] = quantizer.levels
        self.group_codes = quantizer.group_codes
        self.semantic = decoder.semantic.weight.detach().float()
        self.groups: list[tuple[Tensor, Tensor]] = []
        for level in levels:
            first, second = (
                out(book.entries_GP.t().unsqueeze(0))[0].t().float().contiguous()
                for book, out in zip(level.codebooks, level.project_out, strict=True)
            )
            self.groups.append((first, second))

    def __call__(self, codes_NK: Tensor) -> Tensor:
        """Decoder input [N, D] of rows of codes; copies and sums of single values, so a row never feels its company."""
        semantic_ND, latents_NZ = F.embedding(codes_NK[:, 0], self.semantic), None
        for number, (first, second) in enumerate(self.groups[: codes_NK.shape[1] - 1], start=1):
            code_N = codes_NK[:, number]
            parts = (F.embedding(code_N // self.group_codes, first), F.embedding(code_N % self.group_codes, second))
            level_NZ = torch.cat(parts, dim=1)
            latents_NZ = level_NZ if latents_NZ is None else latents_NZ + level_NZ
        assert latents_NZ is not None  # checked codes have an acoustic column
        return torch.cat([semantic_ND, latents_NZ], dim=1)


class FrameDecoder:
    """The decoder of a codec with weight norms folded, ready to run frame by frame on CPU in fp32."""

    def __init__(self, decoder: AudioDecoder, rows: RowTables) -> None:
        conv_in: Any = decoder.conv_in
        lstms: Iterable[Any] = decoder.glstm.lstms
        norms: Iterable[Any] = decoder.glstm.norms
        stages: Iterable[Any] = decoder.stages
        self.rows = rows
        self.width: int = conv_in.in_channels
        self.lstms = [
            (
                torch.cat([lstm.weight_ih_l0, lstm.weight_hh_l0], dim=1).detach().float().t().contiguous(),
                (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach().float(),
            )
            for lstm in lstms
        ]
        self.norms = [(norm.weight.detach().float(), norm.bias.detach().float()) for norm in norms]
        weight_OCK, bias_O = folded_weight(conv_in)
        self.in_weight = weight_OCK.permute(2, 1, 0).reshape(-1, weight_OCK.shape[0]).contiguous()
        self.in_bias = bias_O
        self.stages: list[_PackedStage] = []
        frame, rows_are_time = 1, True
        for stage in stages:
            frame *= stage.rate
            self.stages.append(_PackedStage(stage, frame, rows_are_time))
            rows_are_time = self.stages[-1].rows_are_time
        self.samples = frame
        self.snake_out = _PackedSnake(decoder.snake_out, rows_are_time)
        self.conv_out = _PackedConv(decoder.conv_out, 1, rows_are_time)

    def initial_state(self) -> DecoderState:
        """The state of a stream that has not begun."""
        pasts = [self._empty_past(unit.wide, stage.channels) for stage in self.stages for unit in stage.units]
        pasts.append(self._empty_past(self.conv_out, self.stages[-1].channels))
        zeros = torch.zeros(1, self.width)
        return DecoderState(
            lstm=tuple((zeros, zeros) for _ in self.lstms),
            window_7D=torch.zeros(KERNEL, self.width),
            pasts=tuple(pasts),
        )

    @staticmethod
    def _empty_past(conv: _PackedConv, channels: int) -> Tensor:
        return torch.zeros((conv.past, channels) if conv.rows_are_time else (channels, conv.past))

    def advance(self, x_1D: Tensor | None, state: DecoderState) -> DecoderState:
        """Take one more input row into the GLSTM and the window; None stands for the silence after the last frame."""
        if x_1D is None:
            y_1D, lstm = torch.zeros(1, self.width), state.lstm
        else:
            y_1D, lstm = self._glstm(x_1D, state.lstm)
        window_7D = torch.cat([state.window_7D[1:], y_1D])
        return DecoderState(lstm=lstm, window_7D=window_7D, pasts=state.pasts)

    def _glstm(
        self, x_1D: Tensor, lstm: tuple[tuple[Tensor, Tensor], ...]
    ) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
        new = []
        for (weight, bias), (scale, shift), (hidden, cell) in zip(self.lstms, self.norms, lstm, strict=True):
            gates = torch.addmm(bias, torch.cat([x_1D, hidden], dim=1), weight)
            take, forget, candidate, give = gates.chunk(4, dim=1)
            cell = forget.sigmoid() * cell + take.sigmoid() * candidate.tanh()
            hidden = give.sigmoid() * cell.tanh()
            new.append((hidden, cell))
            x_1D = F.layer_norm(hidden, (self.width,), scale, shift)
        return x_1D, tuple(new)

    def render(self, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Sound of the frame in the middle of the window: [1440], and the next state."""
        x = torch.addmm(self.in_bias, state.window_7D.reshape(1, -1), self.in_weight)
        pasts = list(state.pasts)
        new_pasts: list[Tensor] = []
        for stage in self.stages:
            x = stage(x, pasts, new_pasts)
        x, past = self.conv_out(self.snake_out(x), pasts[-1])
        state = DecoderState(lstm=state.lstm, window_7D=state.window_7D, pasts=(*new_pasts, past))
        return x.reshape(-1).tanh_(), state


class CodecStream:
    """Streaming decoding: codes in, sound out three frames later, the rest at :meth:`flush`.

    Memory does not grow with the length of the stream. The sound of all pushes and the flush together equals
    ``Codec.decode`` of all rows, bit for bit (CPU), however the rows were cut.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._frames: Any = codec.frame_decoder()  # both forms have the same calls, each with states of its own
        self._state = self._frames.initial_state()
        self._taken = 0
        self._codebooks: int | None = None

    @property
    def pending_frames(self) -> int:
        """Frames taken whose sound waits for the look-ahead (0 to 3)."""
        return min(self._taken, LOOKAHEAD_FRAMES)

    @property
    def state_bytes(self) -> int:
        """Memory of the stream's state."""
        return self._state.bytes()

    @torch.inference_mode()
    def push(self, codes: Tensor | np.ndarray) -> Tensor:
        """Take rows [n, K]; returns the sound that is now complete, [1440 m] float32, m = 0 at first.

        Raises:
            RequestError: as ``Codec.decode``, or another number of codebooks than before.
        """
        codes_NK = self._codec.checked_codes(codes)
        if self._codebooks not in (None, codes_NK.shape[1]):
            raise RequestError(f"{codes_NK.shape[1]} codebooks after {self._codebooks}; one stream keeps to one number")
        self._codebooks = codes_NK.shape[1]
        return self._sounds(list(self._frames.rows(codes_NK).split(1)) if len(codes_NK) else [])

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """Sound of the frames still waiting, as if silence followed; afterwards the stream begins anew."""
        # A stream of one or two frames waits for the whole look-ahead as well.
        sound = self._sounds([None] * (LOOKAHEAD_FRAMES if self._taken else 0))
        self._state, self._taken, self._codebooks = self._frames.initial_state(), 0, None
        return sound

    def fork(self) -> CodecStream:
        """An independent stream that goes on from here (for speculation and rollback)."""
        other = CodecStream(self._codec)
        other._state, other._taken, other._codebooks = self._state, self._taken, self._codebooks
        return other

    def _sounds(self, rows: Sequence[Tensor | None]) -> Tensor:
        pieces = []
        for row in rows:
            self._state = self._frames.advance(row, self._state)
            self._taken += 1
            if self._taken > LOOKAHEAD_FRAMES:
                piece, self._state = self._frames.render(self._state)
                pieces.append(piece)
        return torch.cat(pieces) if pieces else torch.zeros(0)
