"""Spectral losses of the codec: log-mel and STFT magnitude at several resolutions.

Legend: B clips, S samples, W window, T frames, F frequency bins, M mel bins.
Source: networks.md section 3 (multi-scale mel after DAC); multi-resolution STFT after Parallel WaveGAN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni_ray.models.fbank import mel_filters

FLOOR = 1e-3
"""Magnitudes below this count as silence (about -60 dB of a loud vowel): nothing is learned from hiss."""
ROOT_GUARD = 1e-9
"""Keeps the root differentiable at zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """One window length of the loss."""

    window: int
    """Samples; the hop is a quarter of it."""
    mels: int
    """Mel bins."""


FULL_BAND = (
    Resolution(window=2048, mels=80),
    Resolution(window=1024, mels=80),
    Resolution(window=512, mels=48),
    Resolution(window=256, mels=24),
)
"""For 24 kHz."""


class SpectralLoss:
    """Mean over resolutions of: L1 of log mel + half the L1 of log magnitude + relative L1 of magnitude."""

    def __init__(self, resolutions: tuple[Resolution, ...], sample_rate_hz: int) -> None:
        self.parts: list[tuple[int, Tensor, Tensor]] = []
        for resolution in resolutions:
            window_W = torch.hann_window(resolution.window)
            filters_FM = mel_filters(resolution.mels, 0.0, sample_rate_hz / 2, sample_rate_hz, resolution.window)
            mel_FM = torch.from_numpy(filters_FM).float()
            # Low mel bins narrower than an FFT bin hold nothing: they are dropped; the others average their bins.
            mel_FM = mel_FM[:, mel_FM.sum(dim=0) > 0]
            self.parts.append((resolution.window, window_W / window_W.norm(), mel_FM / mel_FM.sum(dim=0)))

    def __call__(self, made_BS: Tensor, target_BS: Tensor) -> Tensor:
        """Scalar; both [B, S]."""
        total = made_BS.new_zeros(())
        for window, window_W, mel_FM in self.parts:
            made_BTF = self._magnitude(made_BS, window, window_W)
            with torch.no_grad():
                target_BTF = self._magnitude(target_BS, window, window_W)
            log_mel = _log(made_BTF @ mel_FM) - _log(target_BTF @ mel_FM)
            log_line = _log(made_BTF) - _log(target_BTF)
            relative = (made_BTF - target_BTF).abs().mean() / target_BTF.mean().clamp_min(FLOOR)
            total = total + log_mel.abs().mean() + 0.5 * log_line.abs().mean() + relative
        return total / len(self.parts)

    @staticmethod
    def _magnitude(wave_BS: Tensor, window: int, window_W: Tensor) -> Tensor:
        spectrum_BFT = torch.stft(wave_BS, window, window // 4, window=window_W, center=True, return_complex=True)
        power_BFT = spectrum_BFT.real.square() + spectrum_BFT.imag.square()
        return (power_BFT + ROOT_GUARD).sqrt().transpose(1, 2)


def _log(magnitude: Tensor) -> Tensor:
    return (magnitude + FLOOR).log()
