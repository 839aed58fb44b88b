"""The codec's 24 kHz decoder, trained with codes fixed: first against mel frames, then against the waveform.

Legend: B clips, S samples, T frames of 7.5 ms, F frequency bins, M mel bins, C channels.

A 60 ms code frame must become 1,440 samples, and a spectral loss at the far end of the upsampler says little about the
formants inside that frame.  So the front (tables, GLSTM, the symmetric convolution, the first eight-fold stage) first
learns to hold the log-mel spectrum of every 7.5 ms, read out by one linear layer, at a few hundredths of the cost; the
later stages then only turn a spectrum into sound.  The read-out stays as an auxiliary loss and is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_ray.models.codec import Codec
from omni_ray.models.codec_blocks import KERNEL
from omni_ray.models.fbank import mel_filters
from pipelines.components.codec_stages import Cropper, Cut, StageRecipe, front_end, optimise, read_latents

MEL_BINS = 80
MEL_TOP_HZ = 8000.0
FFT, WINDOW = 1024, 720
FRAME_FLOOR, WAVE_FLOOR = 1e-5, 1e-6
"""Powers below these are silence."""
LINE_SHARE = 0.15
"""Weight of single frequency lines beside mel bins: pitch without asking for its phase."""
FRAME_SHARE = 0.3
"""Weight of the mel-frame read-out while the waveform is trained."""
RESOLUTIONS = ((1200, 300, 64), (600, 150, 40), (256, 64, 20))
"""(window, hop, mel bins) of the waveform loss."""


class FrameMel:
    """Log-mel targets, one every first-stage step (180 samples = 7.5 ms), normalised over the training clips."""

    def __init__(self, codec: Codec, cropper: Cropper) -> None:
        self.hop = codec.config.output_hop // codec.config.decoder_rates_24k[0]
        self.window_W = torch.hann_window(WINDOW)
        filters_FM = torch.from_numpy(mel_filters(MEL_BINS, 0.0, MEL_TOP_HZ, codec.config.output_rate_hz, FFT)).float()
        self.filters_FM = filters_FM / filters_FM.sum(dim=0).clamp_min(1e-9)
        rows_RM = torch.cat([self._log_mel(wave_S.unsqueeze(0))[0] for wave_S in cropper.outputs[:200]])
        self.mean_M, self.std_M = rows_RM.mean(dim=0), rows_RM.std(dim=0)

    def __call__(self, wave_BS: Tensor) -> Tensor:
        """[B, S] -> [B, S / hop, MEL_BINS]."""
        return (self._log_mel(wave_BS) - self.mean_M) / self.std_M

    def _log_mel(self, wave_BS: Tensor) -> Tensor:
        side = (FFT - self.hop) // 2
        padded = F.pad(wave_BS, (side, side))
        spectrum = torch.stft(
            padded, FFT, self.hop, win_length=WINDOW, window=self.window_W, center=False, return_complex=True
        )
        return (power(spectrum) @ self.filters_FM + FRAME_FLOOR).log()


class WaveLoss:
    """Mean over resolutions of half the L1 of log mel power, plus a share of the L1 of log line power."""

    def __init__(self, sample_rate_hz: int) -> None:
        self.parts: list[tuple[int, int, int, Tensor, Tensor]] = []
        for window, hop, bins in RESOLUTIONS:
            fft = 1 << (window - 1).bit_length()
            filters_FM = torch.from_numpy(mel_filters(bins, 0.0, MEL_TOP_HZ, sample_rate_hz, fft)).float()
            filters_FM = filters_FM[:, filters_FM.sum(dim=0) > 0]
            window_W = torch.hann_window(window)
            self.parts.append((window, hop, fft, window_W / window_W.norm(), filters_FM / filters_FM.sum(dim=0)))

    def __call__(self, made_BS: Tensor, target_BS: Tensor) -> Tensor:
        """Scalar; both [B, S]."""
        total = made_BS.new_zeros(())
        for window, hop, fft, window_W, filters_FM in self.parts:
            made, target = (
                power(torch.stft(w, fft, hop, win_length=window, window=window_W, center=True, return_complex=True))
                for w in (made_BS, target_BS)
            )
            total = (
                total + 0.5 * _distance(made @ filters_FM, target @ filters_FM) + LINE_SHARE * _distance(made, target)
            )
        return total / len(self.parts)


def power(spectrum_BFT: Tensor) -> Tensor:
    """Complex [B, F, T] -> power [B, T, F]."""
    return (spectrum_BFT.real.square() + spectrum_BFT.imag.square()).transpose(1, 2)


def _distance(made: Tensor, target: Tensor) -> Tensor:
    return ((made + WAVE_FLOOR).log() - (target + WAVE_FLOOR).log()).abs().mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderRecipe:
    """The stages of the decoder."""

    frames: StageRecipe = field(default_factory=lambda: StageRecipe(steps=1400, batch=16, frames=16, lr=3e-3))
    """Front and first upsampling stage against mel frames."""
    wave: StageRecipe = field(default_factory=lambda: StageRecipe(steps=2200, batch=4, frames=12, lr=3e-3))
    """The whole decoder against the waveform, the read-out of the front beside it."""
    polish: StageRecipe = field(default_factory=lambda: StageRecipe(steps=1400, batch=4, frames=12, lr=2e-3))
    """A second, gentler cycle on the waveform alone."""


def train_decoder(
    codec: Codec, cropper: Cropper, recipe: DecoderRecipe, *, seed: int, log: Callable[[str], None]
) -> None:
    """Train the 24 kHz decoder on known codes; encoder, quantiser and semantic branch do not change."""
    decoder = codec.decoder
    stages: list[Any] = list(decoder.stages)
    mel, loss = FrameMel(codec, cropper), WaveLoss(codec.config.output_rate_hz)
    readout = nn.Conv1d(codec.config.decoder_dim // 2, MEL_BINS, 1)
    chance = torch.Generator().manual_seed(seed)

    def front(cut: Cut) -> tuple[Tensor, Tensor]:
        """First-stage rows [B, C, T], and how far their read-out is from the clip's mel frames."""
        x_BCT = stages[0](front_end(codec, cut.codes_BNK[..., 0], read_latents(codec, cut.codes_BNK, chance)))
        return x_BCT, (readout(x_BCT).transpose(1, 2) - mel(cut.output_BS)).abs().mean()

    def waveform(part: StageRecipe, frame_share: float) -> Tensor:
        cut = cropper.draw(part.batch, part.frames)
        x_BCT, far = front(cut)
        for stage in stages[1:]:
            x_BCT = stage(x_BCT)
        made_B1S = torch.tanh(decoder.conv_out(F.pad(decoder.snake_out(x_BCT), (KERNEL - 1, 0))))
        return loss(made_B1S[:, 0], cut.output_BS) + frame_share * far

    heads = _weights([decoder.semantic, decoder.glstm, decoder.conv_in, stages[0], readout])
    draw = recipe.frames
    optimise("frames", heads, draw, lambda step: front(cropper.draw(draw.batch, draw.frames))[1], log)
    whole = _weights([decoder, readout])
    optimise("wave", whole, recipe.wave, lambda step: waveform(recipe.wave, FRAME_SHARE), log)
    optimise("polish", _weights([decoder]), recipe.polish, lambda step: waveform(recipe.polish, 0.0), log)


def _weights(parts: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [weight for part in parts for weight in part.parameters()]
