"""Streaming FSMN audio encoder and its projector: a waveform becomes language rows of 80 ms (networks.md section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor, nn

from omni_ray.config.model import AudioConfig
from omni_ray.models.fbank import Fbank, FbankState
from omni_ray.models.fsmn import FsmnLayer, LayerState
from omni_ray.models.fused_linear import linear_relu6
from omni_ray.models.layers import ROW_TILE, row_padded
from omni_ray.models.pretrained import Pretrained
from omni_ray.models.streaming import GappedRows, item_runs
from omni_ray.types.errors import ConfigError, MediaError

MODEL_TYPE = "longcat_audio_encoder"
RUN_ROWS = 4096
"""Rows of one run without a graph on the CPU (measured: 512 is slower, the matrices are read too often)."""

# B streams, S samples, T fbank frames, M mel bins, N rows of 80 ms, R packed rows, C splice values, P projection size,
# H hidden size, D language width, V CTC units


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioState:
    """A running stream. Never changed in place: keep an older one and the stream goes on from there."""

    fbank: FbankState
    """Samples of the frame that is not complete yet."""
    frames_BTM: Tensor | None
    """Normalised frames that coming rows still need; None before the first frame."""
    layers: tuple[LayerState, ...]
    """One per FSMN layer."""

    @property
    def num_bytes(self) -> int:
        """Memory held by the stream."""
        kept = [self.fbank.tail_BS] + ([] if self.frames_BTM is None else [self.frames_BTM])
        kept += [tensor for layer in self.layers for tensor in (layer.history_BNP, layer.pending_BNP)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


class PreFFN(nn.Module):
    """x = W_b relu6(W_a s + b_a): splice to projection size, the second matrix without bias."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.splice_frames * config.num_mels, config.hidden_size)
        self.linear2 = nn.Linear(config.hidden_size, config.projection_size, bias=False)

    def forward(self, spliced_RC: Tensor) -> Tensor:
        """[R, C] -> [R, P]."""
        out_RP: Tensor = self.linear2(linear_relu6(self.linear1, spliced_RC))
        return out_RP


class FsmnEncoder(nn.Module):
    """Normalised fbank frames to hidden rows at 12.5 Hz; the CTC head is used in pretraining only."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("cmvn_mean_M", torch.zeros(config.num_mels))
        self.register_buffer("cmvn_std_M", torch.ones(config.num_mels))
        self.pre_ffn = PreFFN(config)
        plain = config.num_layers - config.num_lookahead_layers
        self.layers = nn.ModuleList(
            FsmnLayer(config, 0 if i < plain else config.right_order) for i in range(config.num_layers)
        )
        sizes = [config.projection_size] + [config.hidden_size] * config.num_post_layers
        self.post_ffn = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.ctc_head = nn.Linear(config.hidden_size, config.ctc_vocab_size)

    cmvn_mean_M: Tensor
    cmvn_std_M: Tensor

    def normalise(self, fbank: Tensor) -> Tensor:
        """Global mean and variance normalisation, [..., M], in the weights' dtype."""
        return ((fbank - self.cmvn_mean_M) / self.cmvn_std_M).to(self.ctc_head.weight.dtype)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        """Whole utterances.

        Args:
            features: Normalised frames [T, M] of every utterance, T at least 1.

        Returns:
            Hidden rows [R, H] in utterance order, and the rows of each: ceil(T / stride).
        """
        config = self.config
        spliced = [self._splice(self._with_left(frames_TM[None]), final=True)[0][0] for frames_TM in features]
        lengths = tuple(piece_NC.shape[0] for piece_NC in spliced)
        # Spare rows of zeros, an utterance of their own: a row's bits then do not depend on who shares its batch.
        spare = -sum(lengths) % ROW_TILE
        spliced.append(self.ctc_head.weight.new_zeros(spare, config.splice_frames * config.num_mels))
        x_RP = self.pre_ffn(torch.cat(spliced))
        rows = GappedRows((*lengths, spare), config.left_order, config.right_order, x_RP.device)
        for layer in self.layers:
            x_RP = layer(x_RP, rows)
        return self._post(x_RP)[: len(x_RP) - spare], lengths

    def stream(
        self, frames_BTM: Tensor, pending_BTM: Tensor | None, layers: Sequence[LayerState], final: bool
    ) -> tuple[Tensor, Tensor | None, tuple[LayerState, ...]]:
        """The next normalised frames of running streams.

        Args:
            frames_BTM: New frames, any number.
            pending_BTM: Frames kept from before; None before the first frame.
            layers: State of every layer.
            final: The streams end here.

        Returns:
            Hidden rows [B, N, H], frames to keep, and the layers' new states.
        """
        began = pending_BTM is not None or frames_BTM.shape[1] > 0
        known_BTM = self._with_left(frames_BTM) if pending_BTM is None else torch.cat([pending_BTM, frames_BTM], dim=1)
        spliced_BNC, kept_BTM = self._splice(known_BTM, final)
        batch, count = spliced_BNC.shape[:2]
        x_BNP = row_padded(self.pre_ffn, spliced_BNC.flatten(0, 1)).unflatten(0, (batch, count))
        states = []
        for layer, state in zip(self.layers, layers, strict=True):
            assert isinstance(layer, FsmnLayer)
            x_BNP, after = layer.stream(x_BNP, state, final)
            states.append(after)
        hidden_RH = row_padded(self._post, x_BNP.flatten(0, 1))
        return hidden_RH.unflatten(0, (batch, x_BNP.shape[1])), kept_BTM if began else None, tuple(states)

    def _with_left(self, frames_BTM: Tensor) -> Tensor:
        """Repeat the first frame (if there is one) for the left context of the first row."""
        first_B1M = frames_BTM[:, :1]
        return torch.cat([first_B1M.expand(-1, self.config.splice_left * first_B1M.shape[1], -1), frames_BTM], dim=1)

    def _splice(self, known_BTM: Tensor, final: bool) -> tuple[Tensor, Tensor]:
        """Join windows of frames every ``stride``; known frames begin at the next row's left context.

        Returns:
            Spliced rows [B, N, C] and the frames to keep. ``final`` repeats the last frame as right context.
        """
        window, stride = self.config.splice_frames, self.config.stride
        batch, known, mels = known_BTM.shape
        if final:
            count = max(0, -((self.config.splice_left - known) // stride))
            missing = (count - 1) * stride + window - known if count else 0
            known_BTM = torch.cat([known_BTM, known_BTM[:, -1:].expand(-1, max(0, missing), -1)], dim=1)
        else:
            count = max(0, (known - window) // stride + 1)
        if not count:
            return known_BTM.new_zeros(batch, 0, window * mels), known_BTM.clone()
        spliced_BNMW = known_BTM.unfold(1, window, stride)[:, :count]
        return spliced_BNMW.transpose(2, 3).flatten(2), known_BTM[:, count * stride :].clone()

    def _post(self, x_RP: Tensor) -> Tensor:
        for linear in self.post_ffn:
            assert isinstance(linear, nn.Linear)
            x_RP = linear_relu6(linear, x_RP)
        return x_RP


class AudioEncoder(Pretrained):
    """Waveform to language rows at 12.5 Hz: fbank, FSMN ``encoder``, and ``projector`` (Linear, GELU, Linear).

    Streaming equals whole bit for bit in fp32 on CPU for any chunking, and an utterance's rows do not feel who shares
    its batch (widths in multiples of 8: with 10 columns a product's bits depend on where a row stands).
    Dropout draws from torch's global generator; put the encoder in eval mode where bits must repeat.
    Source: LongCat-Flash-Omni report, streaming audio encoder; front end and sizes from the published demo code.
    """

    MODEL_TYPE = MODEL_TYPE
    CONFIG = AudioConfig
    KIND = "an audio encoder"

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.fbank = Fbank(config.num_mels, config.mel_low_hz, config.mel_high_hz, config.sample_rate_hz)
        self.encoder = FsmnEncoder(config)
        width = config.output_size
        self.projector = nn.Sequential(nn.Linear(config.hidden_size, width), nn.GELU(), nn.Linear(width, width))

    @property
    def lookahead_ms(self) -> int:
        """Algorithmic look-ahead of a row beyond its nominal end (495 at flash-omni)."""
        return self.config.lookahead_ms

    @overload
    def forward(self, audio: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]: ...

    @overload
    def forward(self, audio: Tensor, state: AudioState | None = None) -> tuple[Tensor, AudioState]: ...

    def forward(
        self, audio: Tensor | Sequence[Tensor], state: AudioState | None = None
    ) -> tuple[Tensor, tuple[int, ...]] | tuple[Tensor, AudioState]:
        """Encode whole recordings, or the next piece of running streams.

        Args:
            audio: A sequence of waves [S] of any lengths; or one tensor [B, S] of streams in step. Floats in [-1, 1]
                at ``config.sample_rate_hz``.
            state: For a tensor: what the previous call returned (any number of new samples may follow).
                None: the tensor holds whole signals, begun and ended here.

        Returns:
            For a sequence: rows [R, D] in order, and the rows of each wave.
            For a tensor: the rows that are now certain [B, N, D], and the next state; :meth:`flush` ends a stream.

        Raises:
            MediaError: a whole recording is shorter than one frame, or a tensor has another shape.
        """
        if not isinstance(audio, Tensor):
            return self._whole(audio)
        if audio.dim() != 2:
            raise MediaError(f"streamed audio has shape {list(audio.shape)}; give [streams, samples]")
        if state is not None:
            return self._stream(audio, state, final=False)
        self._check_length(audio.shape[1], "audio")
        return self._stream(audio, self.initial_state(audio.shape[0]), final=True)

    def features(self, wave_S: Tensor) -> Tensor:
        """Log-mel frames [T, M] of one recording, float32, not normalised."""
        frames_TM: Tensor = self.fbank(wave_S)
        return frames_TM

    def project(self, hidden_RH: Tensor) -> Tensor:
        """Hidden rows [R, H] to language rows [R, D]."""
        return row_padded(self.projector, hidden_RH)

    def ctc_logits(self, features: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        """Pretraining: log-mel frames [T, M] of every utterance to CTC logits [R, V] and the rows of each."""
        hidden_RH, lengths = self.encoder([self.encoder.normalise(frames_TM) for frames_TM in features])
        return row_padded(self.encoder.ctc_head, hidden_RH), lengths

    def set_cmvn(self, mean_M: Tensor, std_M: Tensor) -> None:
        """Set the global normalisation.

        Raises:
            ConfigError: other sizes than ``num_mels``, or a deviation that is not positive.
        """
        want = (self.config.num_mels,)
        if tuple(mean_M.shape) != want or tuple(std_M.shape) != want or not bool((std_M > 0).all()):
            raise ConfigError(
                f"cmvn has shapes {list(mean_M.shape)} and {list(std_M.shape)} with least deviation "
                f"{float(std_M.min()):g}; give {want[0]} means and {want[0]} positive deviations"
            )
        self.encoder.cmvn_mean_M.copy_(mean_M)
        self.encoder.cmvn_std_M.copy_(std_M)

    def initial_state(self, batch_size: int = 1) -> AudioState:
        """Streams that have not begun."""
        weight = self.encoder.ctc_head.weight
        layers = [layer for layer in self.encoder.layers if isinstance(layer, FsmnLayer)]
        return AudioState(
            fbank=self.fbank.initial_state(batch_size, weight.device),
            frames_BTM=None,
            layers=tuple(layer.initial_state(batch_size) for layer in layers),
        )

    def flush(self, state: AudioState) -> Tensor:
        """The rows that remain if the streams end here [B, N, D]; ``state`` stays usable, so an end may be a guess."""
        nothing_BS = state.fbank.tail_BS[:, :0]
        rows_BND, _ = self._stream(nothing_BS, state, final=True)
        return rows_BND

    def _whole(self, waves: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        for i, wave_S in enumerate(waves):
            self._check_length(wave_S.shape[-1], f"recording {i}")
            _check_finite(wave_S, f"recording {i}")
        device = self.encoder.ctc_head.weight.device
        whole = torch.is_grad_enabled() or device.type != "cpu"
        rows = [self.config.num_rows(wave_S.shape[-1]) for wave_S in waves]
        pieces = []
        for run in [slice(None)] if whole or not waves else item_runs(rows, RUN_ROWS):
            features = self.fbank.many([wave_S.to(device) for wave_S in waves[run]])
            hidden_RH, _ = self.encoder([self.encoder.normalise(frames_TM) for frames_TM in features])
            pieces.append(self.project(hidden_RH))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces), tuple(rows)

    def _stream(self, chunk_BS: Tensor, state: AudioState, final: bool) -> tuple[Tensor, AudioState]:
        _check_finite(chunk_BS, "streamed audio")
        fbank_BTM, fbank = self.fbank.stream(chunk_BS.to(state.fbank.tail_BS.device), state.fbank)
        hidden_BNH, kept_BTM, layers = self.encoder.stream(
            self.encoder.normalise(fbank_BTM), state.frames_BTM, state.layers, final
        )
        rows_RD = self.project(hidden_BNH.flatten(0, 1))
        after = AudioState(fbank=fbank, frames_BTM=kept_BTM, layers=layers)
        return rows_RD.unflatten(0, hidden_BNH.shape[:2]), after

    def _check_length(self, samples: int, what: str) -> None:
        if samples < self.fbank.window:
            raise MediaError(
                f"{what} has {samples} samples, yet one frame needs {self.fbank.window} "
                f"(25 ms at {self.config.sample_rate_hz} Hz); give a longer recording"
            )


def _check_finite(wave: Tensor, what: str) -> None:
    if not bool(wave.sum(dtype=torch.float64).isfinite()):
        bad = (~wave.isfinite()).flatten().nonzero()
        if len(bad):
            raise MediaError(
                f"{what} has {len(bad)} samples that are not finite, the first at {int(bad[0])}; decode it again"
            )
