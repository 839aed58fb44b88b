"""Random training batches of speech: each clip another voice, room, pace and loudness; whole batches at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_ray.models.fbank import LOG_FLOOR, Fbank, mel_of_hz
from pipelines.components.audio_material import Clip

# B clips, S samples, T fbank frames, M mel bins
NEPERS_PER_DB = 0.2302585
"""A power ratio in dB to the natural logarithm that fbank uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """How far a training clip may be from its recording; ranges are uniform."""

    tempo: tuple[float, float] = (0.75, 1.2)
    """Length."""
    warp: float = 0.1
    """Frequency axis scaled by 1 +- this: pitch and the length of the vocal tract."""
    lead_frames: int = 24
    """At most this many frames of silence before, and after, the clip."""
    gain_db: tuple[float, float] = (-20.0, 4.0)
    """Loudness."""
    tilt_db: float = 6.0
    """Smooth random response of room and microphone, up to this at its knots."""
    snr_db: tuple[float, float] = (18.0, 60.0)
    """Stationary noise below the clip's mean power."""
    babble: float = 0.1
    """Share of clips with another clip of the batch in the background, 8 to 25 dB below."""
    narrow_band: float = 0.35
    """Share of synthetic clips cut at about 4 kHz, as people's recordings are."""
    freq_mask: float = 0.1
    """Widest of two masked bands, share of the bins."""
    time_mask: float = 0.06
    """Widest of two masked spans, share of the frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechBatch:
    """Features and targets of one step."""

    features: tuple[Tensor, ...]
    """Log-mel frames [T, M] of every clip."""
    clips: tuple[Clip, ...]
    """What they were made of."""


class SpeechBatcher:
    """Draws batches with a fixed number of clips of each kind, all of them augmented."""

    def __init__(self, clips: Sequence[Clip], fbank: Fbank, augmentation: Augmentation, seed: int) -> None:
        self._by_kind = {kind: [clip for clip in clips if clip.kind == kind] for kind in ("human", "word", "sentence")}
        self._fbank = fbank
        self._to = augmentation
        self._generator = torch.Generator().manual_seed(seed)
        self._known: dict[str, Tensor] = {}

    def draw(self, human: int, words: int, sentences: int) -> SpeechBatch:
        """A batch; where there are no people, synthetic words take their place."""
        if not self._by_kind["human"]:
            human, words = 0, human + words
        # Short and long clips apart, so that little of a padded batch is padding.
        short = [*self._pick("human", human), *self._pick("word", words)]
        groups = [group for group in (short, self._pick("sentence", sentences)) if group]
        features = [frames_TM for group in groups for frames_TM in self._augmented(group)]
        return SpeechBatch(features=tuple(features), clips=tuple(clip for group in groups for clip in group))

    def _pick(self, kind: str, count: int) -> list[Clip]:
        pool = self._by_kind[kind]
        return [pool[i] for i in torch.randint(0, max(1, len(pool)), (count,), generator=self._generator)]

    def _augmented(self, clips: Sequence[Clip]) -> list[Tensor]:
        features_BTM, lengths_B = self._change_tempo(*self._features(clips))
        features_BTM = self._colour(self._warp(features_BTM))
        features_BTM = self._cut_band(features_BTM, [clip.kind != "human" for clip in clips])
        features_BTM = self._mask(self._add_noise(features_BTM, lengths_B), lengths_B)
        return [row_TM[:length] for row_TM, length in zip(features_BTM, lengths_B.tolist(), strict=True)]

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self._generator)

    def _features(self, clips: Sequence[Clip]) -> tuple[Tensor, Tensor]:
        """Padded frames with digital silence around each clip, and the number of frames of each."""
        pads_B2 = self._uniform(0, self._to.lead_frames + 1, len(clips), 2).int().tolist()
        features = [
            F.pad(self._plain(clip), (0, 0, *pads), value=math.log(LOG_FLOOR))
            for clip, pads in zip(clips, pads_B2, strict=True)
        ]
        lengths_B = torch.tensor([len(frames_TM) for frames_TM in features])
        return torch.nn.utils.rnn.pad_sequence(features, batch_first=True), lengths_B

    def _plain(self, clip: Clip) -> Tensor:
        if clip.id not in self._known:
            self._known[clip.id] = self._fbank(clip.wave_S)
        return self._known[clip.id]

    def _change_tempo(self, features_BTM: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        factor_B = self._uniform(*self._to.tempo, len(lengths_B))
        new_B = (lengths_B * factor_B).round().long().clamp_min(8)
        at_BT = torch.arange(int(new_B.max()))[None] / new_B[:, None] * lengths_B[:, None]
        at_BT = torch.minimum(at_BT, (lengths_B - 1)[:, None].float())
        return _interpolate(features_BTM, at_BT), new_B

    def _warp(self, features_BTM: Tensor) -> Tensor:
        batch, _, mels = features_BTM.shape
        factor_B = self._uniform(1 - self._to.warp, 1 + self._to.warp, batch)
        low, high = float(mel_of_hz(self._fbank.low_hz)), float(mel_of_hz(self._fbank.high_hz))
        step = (high - low) / (mels + 1)
        centre_hz_M = 700 * (((low + step * torch.arange(1, mels + 1)) / 1127).exp() - 1)
        mel_BM = 1127 * torch.log1p(centre_hz_M[None] * factor_B[:, None] / 700)
        at_BM = ((mel_BM - low) / step - 1).clamp(0, mels - 1)
        return _interpolate(features_BTM.transpose(1, 2), at_BM).transpose(1, 2)

    def _colour(self, features_BTM: Tensor) -> Tensor:
        """Gain, and a smooth response through six random knots."""
        batch, _, mels = features_BTM.shape
        knots_B6 = self._uniform(-self._to.tilt_db, self._to.tilt_db, batch, 6)
        response_BM = F.interpolate(knots_B6[:, None], size=mels, mode="linear", align_corners=True)[:, 0]
        gain_B1 = self._uniform(*self._to.gain_db, batch, 1)
        return features_BTM + NEPERS_PER_DB * (response_BM + gain_B1)[:, None]

    def _cut_band(self, features_BTM: Tensor, synthetic: Sequence[bool]) -> Tensor:
        """Some synthetic clips lose what lies above 3.4 to 4.2 kHz."""
        batch, _, mels = features_BTM.shape
        edge_B = torch.from_numpy(mel_of_hz(self._uniform(3400, 4200, batch).numpy())).float()
        low, high = float(mel_of_hz(self._fbank.low_hz)), float(mel_of_hz(self._fbank.high_hz))
        bin_B = ((edge_B - low) / (high - low) * (mels + 1) - 1).round()
        cut_B = (self._uniform(0, 1, batch) < self._to.narrow_band) & torch.tensor(synthetic)
        gone_B1M = ((torch.arange(mels)[None] > bin_B[:, None]) & cut_B[:, None])[:, None]
        return torch.where(gone_B1M, torch.full((), -10.0), features_BTM)

    def _add_noise(self, features_BTM: Tensor, lengths_B: Tensor) -> Tensor:
        """Noise with a smooth random spectrum, and other clips of the batch, added as power."""
        batch, frames, mels = features_BTM.shape
        inside_BT1 = (torch.arange(frames)[None] < lengths_B[:, None])[..., None]
        level_B11 = ((features_BTM.exp() * inside_BT1).sum((1, 2), keepdim=True) / mels).clamp_min(1e-6).log()
        level_B11 = level_B11 - lengths_B[:, None, None].float().log()
        knots_B4 = self._uniform(-8.0, 8.0, batch, 4)
        shape_BM = F.interpolate(knots_B4[:, None], size=mels, mode="linear", align_corners=True)[:, 0]
        down_BM = NEPERS_PER_DB * (shape_BM - self._uniform(*self._to.snr_db, batch, 1))
        jitter_BTM = 0.6 * torch.randn(features_BTM.shape, generator=self._generator)
        noisy_BTM = torch.logaddexp(features_BTM, level_B11 + down_BM[:, None] + jitter_BTM)
        order_B = torch.randperm(batch, generator=self._generator)
        down_B11 = NEPERS_PER_DB * self._uniform(8.0, 25.0, batch, 1, 1)
        other_BTM = features_BTM[order_B] - level_B11[order_B] + level_B11 - down_B11
        chosen_B11 = self._uniform(0, 1, batch, 1, 1) < self._to.babble
        return torch.where(chosen_B11, torch.logaddexp(noisy_BTM, other_BTM), noisy_BTM)

    def _mask(self, features_BTM: Tensor, lengths_B: Tensor) -> Tensor:
        """SpecAugment over the whole batch: two bands and two spans, set to the clip's mean."""
        batch, frames, mels = features_BTM.shape
        inside_BT1 = (torch.arange(frames)[None] < lengths_B[:, None])[..., None]
        mean_B1M = (features_BTM * inside_BT1).sum(1, keepdim=True) / lengths_B[:, None, None]
        gone_BTM = torch.zeros(batch, frames, mels, dtype=torch.bool)
        for _ in range(2):
            gone_BTM |= self._spans(torch.full((batch,), mels), mels, self._to.freq_mask)[:, None]
            gone_BTM |= self._spans(lengths_B, frames, self._to.time_mask)[..., None]
        return torch.where(gone_BTM, mean_B1M, features_BTM)

    def _spans(self, sizes_B: Tensor, length: int, share: float) -> Tensor:
        """One random span of each row, [B, length] bool, at most ``share`` of its size wide."""
        width_B = self._uniform(0, share, len(sizes_B)) * sizes_B
        start_B = self._uniform(0, 1, len(sizes_B)) * (sizes_B - width_B)
        at_1L = torch.arange(length)[None]
        return (at_1L >= start_B[:, None]) & (at_1L < (start_B + width_B)[:, None])


def _interpolate(values_BTM: Tensor, at_BN: Tensor) -> Tensor:
    """Linear interpolation along dim 1 at fractional places [B, N] -> [B, N, M]."""
    below_BN = at_BN.long().clamp(0, values_BTM.shape[1] - 1)
    above_BN = (below_BN + 1).clamp_max(values_BTM.shape[1] - 1)
    share_BN1 = (at_BN - below_BN)[..., None]
    rows_B1 = torch.arange(values_BTM.shape[0])[:, None]
    return values_BTM[rows_B1, below_BN] * (1 - share_BN1) + values_BTM[rows_B1, above_BN] * share_BN1
