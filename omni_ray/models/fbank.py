"""Log-mel front end of the audio encoder and of the codec's semantic branch (networks.md section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy
import torch
from torch import Tensor, nn

from omni_ray.models.layers import ROW_TILE
from omni_ray.types.errors import ConfigError, MediaError

# B streams, S samples, T fbank frames, R frames of all streams, F frequency bins, M mel bins, W window samples
WINDOW_S = 0.025
SHIFT_S = 0.010
PRE_EMPHASIS = 0.97
WINDOW_POWER = 0.85
INT16_SCALE = 32768.0
BLOCK_FRAMES = 256
"""Frames transformed at a time; a multiple of 16, and their spectra stay in the cache."""
LOG_FLOOR = float(numpy.finfo(numpy.float32).eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class FbankState:
    """What the front end keeps of a running stream."""

    tail_BS: Tensor
    """Samples from the start of the next frame on; at most one window less one sample."""


def mel_of_hz(frequency_hz: numpy.ndarray | float) -> numpy.ndarray:
    """Mel scale 1127 ln(1 + f / 700)."""
    return 1127.0 * numpy.log1p(numpy.asarray(frequency_hz, dtype=numpy.float64) / 700.0)


def mel_filters(num_mels: int, low_hz: float, high_hz: float, sample_rate_hz: int, fft_size: int) -> numpy.ndarray:
    """Triangular filters of unit height, corners equally spaced in mel and linear in mel; float64 [F, M]."""
    corners = numpy.linspace(mel_of_hz(low_hz), mel_of_hz(high_hz), num_mels + 2)
    left_M, centre_M, right_M = corners[:-2], corners[1:-1], corners[2:]
    bins_F1 = mel_of_hz(numpy.arange(fft_size // 2 + 1) * (sample_rate_hz / fft_size))[:, None]
    rising_FM = (bins_F1 - left_M) / (centre_M - left_M)
    falling_FM = (right_M - bins_F1) / (right_M - centre_M)
    return numpy.maximum(0.0, numpy.minimum(rising_FM, falling_FM))


@lru_cache(maxsize=16)
def _tables(
    num_mels: int, low_hz: float, high_hz: float, sample_rate_hz: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Window [W] and filters [F, M] in fp32; kept out of the module so that no dtype or meta move can spoil them.

    The window carries the int16 range: a power of two, so that no bit depends on where it is multiplied.
    """
    window = round(WINDOW_S * sample_rate_hz)
    hann_W = INT16_SCALE * numpy.hanning(window) ** WINDOW_POWER
    filters_FM = mel_filters(num_mels, low_hz, high_hz, sample_rate_hz, fft_size_of(window))
    return (
        torch.from_numpy(hann_W).to(device=device, dtype=torch.float32),
        torch.from_numpy(filters_FM).to(device=device, dtype=torch.float32),
    )


def fft_size_of(window: int) -> int:
    """Smallest power of two that holds the window (512 at 16 kHz)."""
    return 1 << (window - 1).bit_length()


class Fbank(nn.Module):
    """Log-mel energies of 25 ms frames every 10 ms, no edge padding: T = floor((S - 400) / 160) + 1 at 16 kHz.

    Per frame: int16 range, pre-emphasis 0.97 inside the frame (the first sample uses itself), symmetric Hann window to
    the power 0.85, 512-point power spectrum, mel filters, log(max(., float32 eps)). No mean removal, no dither.
    Holds neither parameters nor buffers, and always computes in float32.
    Source: LongCat-Flash-Omni report (80 bins) and the published demo's front end.
    """

    def __init__(
        self, num_mels: int = 80, low_hz: float = 40.0, high_hz: float = 7800.0, sample_rate_hz: int = 16000
    ) -> None:
        """Raises ConfigError for limits outside 0 <= low < high <= half the sample rate."""
        super().__init__()
        if not 0 <= low_hz < high_hz <= sample_rate_hz / 2:
            raise ConfigError(
                f"mel limits are {low_hz:g} to {high_hz:g} Hz at {sample_rate_hz} Hz; "
                f"choose 0 <= low < high <= {sample_rate_hz / 2:g}"
            )
        self.num_mels = num_mels
        self.low_hz = low_hz
        self.high_hz = high_hz
        self.sample_rate_hz = sample_rate_hz
        self.window = round(WINDOW_S * sample_rate_hz)
        self.shift = round(SHIFT_S * sample_rate_hz)

    def num_frames(self, samples: int) -> int:
        """Frames that fit into this many samples, possibly 0."""
        return max(0, (samples - self.window) // self.shift + 1)

    def forward(self, wave: Tensor) -> Tensor:
        """Features of whole signals.

        Args:
            wave: [S] or [B, S], float in [-1, 1].

        Returns:
            [T, M] or [B, T, M], float32.

        Raises:
            MediaError: the signal is shorter than one frame.
        """
        samples = wave.shape[-1]
        self._check_length(samples, "audio")
        features_BTM, _ = self.stream(wave.reshape(-1, samples))
        return features_BTM.reshape(*wave.shape[:-1], *features_BTM.shape[1:])

    def initial_state(self, batch_size: int = 1, device: torch.device | str | None = None) -> FbankState:
        """The state of streams that have not begun."""
        return FbankState(tail_BS=torch.zeros(batch_size, 0, device=device))

    def stream(self, chunk_BS: Tensor, state: FbankState | None = None) -> tuple[Tensor, FbankState]:
        """Features of the frames that this chunk completes; equal to :meth:`forward` bit for bit for any chunking.

        Args:
            chunk_BS: The next samples of every stream, any number, float in [-1, 1].
            state: What the previous call returned; None begins new streams.

        Returns:
            [B, T, M] float32 (T may be 0), and the next state.
        """
        chunk_BS = chunk_BS.to(torch.float32)
        samples_BS = chunk_BS if state is None else torch.cat([state.tail_BS, chunk_BS], dim=-1)
        batch, frames = samples_BS.shape[0], self.num_frames(samples_BS.shape[-1])
        tail_BS = samples_BS[:, frames * self.shift :].clone()
        if not frames:
            return samples_BS.new_zeros(batch, 0, self.num_mels), FbankState(tail_BS=tail_BS)
        features_RM = self._log_mel(list(samples_BS))
        return features_RM.view(batch, frames, self.num_mels), FbankState(tail_BS=tail_BS)

    def many(self, waves: Sequence[Tensor]) -> list[Tensor]:
        """Features [T, M] of several signals [S] of any lengths, their frames side by side in one batch.

        Raises:
            MediaError: a signal is shorter than one frame.
        """
        if len(waves) < 2:
            return [self(wave_S) for wave_S in waves]
        for i, wave_S in enumerate(waves):
            self._check_length(wave_S.shape[-1], f"recording {i}")
        counts = [self.num_frames(wave_S.shape[-1]) for wave_S in waves]
        return list(self._log_mel([wave_S.to(torch.float32) for wave_S in waves]).split(counts))

    def _check_length(self, samples: int, what: str) -> None:
        if samples < self.window:
            raise MediaError(
                f"{what} has {samples} samples, yet one frame needs {self.window} "
                f"({WINDOW_S * 1000:.0f} ms at {self.sample_rate_hz} Hz); give a longer recording"
            )

    @torch.no_grad()
    def _log_mel(self, signals: Sequence[Tensor]) -> Tensor:
        """Log-mel rows [R, M] of signals [S], joined.

        Frames of all signals pass through one block of memory, so nothing of their size is written in between. Blocks
        are filled up to multiples of 16 rows, so a row's bits do not depend on what shares its block.
        """
        device = signals[0].device
        window_W, filters_FM = _tables(self.num_mels, self.low_hz, self.high_hz, self.sample_rate_hz, device)
        total = sum(self.num_frames(signal_S.shape[-1]) for signal_S in signals)
        features_RM = torch.empty(total, self.num_mels, device=device)
        block_RW = torch.zeros(min(BLOCK_FRAMES, total + -total % ROW_TILE), fft_size_of(self.window), device=device)
        done = filled = 0
        for signal_S in signals:
            frames_TW = self._emphasised(signal_S).unfold(-1, self.window, self.shift)
            while len(frames_TW):
                room = len(block_RW) - filled
                piece_TW, frames_TW = frames_TW[:room], frames_TW[room:]
                torch.mul(piece_TW, window_W, out=block_RW[filled : filled + len(piece_TW), : self.window])
                filled += len(piece_TW)
                if filled == len(block_RW) or done + filled == total:
                    energies_RM = _mel_energies(block_RW[: filled + -filled % ROW_TILE], filters_FM)
                    torch.clamp(energies_RM[:filled], min=LOG_FLOOR, out=features_RM[done : done + filled])
                    done, filled = done + filled, 0
        return features_RM.log_()

    def _emphasised(self, signal_S: Tensor) -> Tensor:
        """x_s - 0.97 x_{s-1} over the whole signal.

        By definition the first sample of each frame uses itself in place of its predecessor; the window is zero there,
        so it makes no difference. Product and difference are two operations: fused, their rounding would depend on
        where a sample stands.
        """
        emphasised_S = torch.empty_like(signal_S)
        emphasised_S[:1] = 0
        torch.mul(signal_S[:-1], PRE_EMPHASIS, out=emphasised_S[1:])
        torch.sub(signal_S[1:], emphasised_S[1:], out=emphasised_S[1:])
        return emphasised_S


def _mel_energies(block_RW: Tensor, filters_FM: Tensor) -> Tensor:
    """Windowed frames, filled up with zeros to the transform's size, to mel energies [R, M]."""
    squares_RF2 = torch.view_as_real(torch.fft.rfft(block_RW))
    squares_RF2.mul_(squares_RF2)
    return (squares_RF2[..., 0] + squares_RF2[..., 1]) @ filters_FM


def spec_augment(
    features_TM: Tensor,
    generator: torch.Generator,
    *,
    freq_masks: int = 2,
    freq_share: float = 0.10,
    time_masks: int = 2,
    time_share: float = 0.05,
) -> Tensor:
    """A copy with random bands of bins and spans of frames set to the utterance's mean of each bin.

    Args:
        features_TM: Log-mel features of one utterance.
        generator: Where the chance comes from; every width is uniform from 0 to its share of the axis.
        freq_masks: Number of bands.  freq_share: Widest band as a share of M.
        time_masks: Number of spans.  time_share: Widest span as a share of T.

    Returns:
        [T, M], same dtype.

    Source: networks.md section 2, SpecAugment with 2 frequency (10 %) and 2 time (5 %) masks.
    """
    frames, mels = features_TM.shape
    masked_TM = features_TM.clone()
    mean_M = features_TM.mean(dim=0)
    for _ in range(freq_masks):
        start, end = _random_span(mels, freq_share, generator)
        masked_TM[:, start:end] = mean_M[start:end]
    for _ in range(time_masks):
        start, end = _random_span(frames, time_share, generator)
        masked_TM[start:end] = mean_M
    return masked_TM


def _random_span(size: int, share: float, generator: torch.Generator) -> tuple[int, int]:
    width = int(torch.randint(0, int(size * share) + 1, (), generator=generator))
    start = int(torch.randint(0, size - width + 1, (), generator=generator))
    return start, start + width
