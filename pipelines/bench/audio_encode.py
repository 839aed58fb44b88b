"""Audio encoder: packed utterances over utterances padded to the longest of their group, same network and weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_ray.config.model import SizeName, model_preset
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.models.fsmn import FsmnLayer
from omni_ray.types.errors import OmniError
from pipelines.bench.vision_encode import timed
from pipelines.bench.writer import BenchReport, alternate, environment, measured

ITEMS, GROUP = 32, 8
MEDIAN_S, SIGMA, LONGEST_S = 4.0, 0.8, 30.0
SIZES: tuple[SizeName, ...] = ("small", "tiny")
"""The named figure is of ``small``; ``tiny`` is reported beside it."""

# B utterances of a group, S samples, T fbank frames, N rows of 80 ms, P projection size


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """Both sides from waveform to language rows, on the same utterances, alternating, one thread.

    Args:
        quick: 3 runs in place of 7 (the same utterances and sizes).  seed: Draws other utterances and weights.
    """
    repeats = 3 if quick else 7
    torch.set_num_threads(1)
    waves = draw_waves(seed)
    figures = []
    for size in SIZES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = AudioEncoder(model_preset(size).audio).eval()

        def packed(encoder: AudioEncoder = encoder) -> object:
            return encoder(waves)

        def groups(encoder: AudioEncoder = encoder) -> object:
            return padded_encode(encoder, waves)

        with torch.no_grad():
            encoder.set_cmvn(torch.full((encoder.config.num_mels,), 15.0), torch.full((encoder.config.num_mels,), 3.0))
            rows_RD, lengths = encoder(waves)
            check_equal(rows_RD, lengths, padded_encode(encoder, waves))
            seconds = alternate({"packed": timed(packed), "padded": timed(groups)}, repeats)
        ratios = [b / a for a, b in zip(seconds["packed"], seconds["padded"], strict=True)]
        name = "packed_speedup" if size == SIZES[0] else f"packed_speedup_{size}"
        spoken = sum(map(len, waves)) / encoder.config.sample_rate_hz
        what = f"{size}, {ITEMS} utterances, {spoken:.0f} s in all; padded in sorted groups of {GROUP}"
        goal = 1.5 if size == SIZES[0] else None
        figures.append(measured(name, ratios, unit="ratio", better="higher", goal=goal, against=what))
        factor = [s / spoken for s in seconds["packed"]]
        figures.append(
            measured(f"packed_rtf_{size}", factor, unit="ratio", better="lower", against="compute over audio seconds")
        )
    lengths = sorted(map(len, waves))
    padded = sum(GROUP * lengths[i + GROUP - 1] for i in range(0, ITEMS, GROUP))
    figures.append(
        measured("padded_over_real", [padded / sum(lengths)], unit="ratio", better="lower", against="waste of samples")
    )
    return BenchReport(bench="audio-encode", figures=tuple(figures), environment=environment(seed=seed, quick=quick))


def draw_waves(seed: int) -> list[Tensor]:
    """Noise of log-normal length: median 4 s, sigma 0.8, at most 30 s and at least one frame."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(ITEMS, generator=generator, dtype=torch.float64)
    seconds = (MEDIAN_S * (SIGMA * spread).exp()).clamp(0.025, LONGEST_S)
    return [0.1 * torch.randn(int(16000 * s), generator=generator) for s in seconds.tolist()]


def padded_encode(encoder: AudioEncoder, waves: Sequence[Tensor]) -> list[Tensor]:
    """The same network over rectangles: utterances sorted by length, groups of eight, padded to the longest, masked.

    Returns:
        Language rows of every utterance, in the order given.
    """
    out: list[Tensor] = [torch.empty(0)] * len(waves)
    order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
    for start in range(0, len(order), GROUP):
        members = order[start : start + GROUP]
        rows_BND = padded_rows(encoder, [waves[i] for i in members])
        for b, i in enumerate(members):
            out[i] = rows_BND[b, : encoder.config.num_rows(len(waves[i]))]
    return out


def padded_rows(encoder: AudioEncoder, waves: Sequence[Tensor]) -> Tensor:
    """Language rows [B, N, D] of one group; rows beyond an utterance's end are rubbish and never seen by real ones."""
    config, part = encoder.config, encoder.encoder
    longest = max(map(len, waves))
    wave_BS = torch.stack([F.pad(wave, (0, longest - len(wave))) for wave in waves])
    frames_BTM = part.normalise(encoder.fbank(wave_BS))
    frames_B = torch.tensor([config.num_frames(len(wave)) for wave in waves])
    rows_B = torch.tensor([config.num_rows(len(wave)) for wave in waves])
    # Splice: the frame of every place of every window; beyond the ends the first and the last frame repeat.
    window = torch.arange(-config.splice_left, config.splice_right + 1)
    place_NW = torch.arange(int(rows_B.max())).unsqueeze(1) * config.stride + window
    place_BNW = torch.minimum(place_NW.clamp_min(0), frames_B[:, None, None] - 1)
    index = place_BNW.flatten(1).unsqueeze(-1).expand(-1, -1, config.num_mels)
    spliced_BNC = frames_BTM.gather(1, index).view(len(waves), len(place_NW), -1)
    real_BN1 = (torch.arange(len(place_NW)) < rows_B.unsqueeze(1)).unsqueeze(-1)
    x_BNP = part.pre_ffn(spliced_BNC)
    for layer in part.layers:
        assert isinstance(layer, FsmnLayer)
        x_BNP = padded_layer(layer, x_BNP, real_BN1)
    for linear in part.post_ffn:
        x_BNP = F.relu6(linear(x_BNP))
    rows_BND: Tensor = encoder.projector(x_BNP)
    return rows_BND


def padded_layer(layer: FsmnLayer, x_BNP: Tensor, real_BN1: Tensor) -> Tensor:
    """One FSMN layer over a rectangle: padded rows count as zero in the memory."""
    normed_BNP = layer.norm1(x_BNP) * real_BN1
    seen_BPN = F.pad(normed_BNP.transpose(1, 2), (layer.left_order, layer.right_order))
    memory_BPN = F.conv1d(seen_BPN, layer.memory.weight, groups=seen_BPN.shape[1])
    m_BNP = x_BNP + memory_BPN.transpose(1, 2)
    out: Tensor = m_BNP + layer.linear2(F.relu6(layer.linear1(layer.norm2(m_BNP))))
    return out


def check_equal(packed_RD: Tensor, lengths: Sequence[int], padded: Sequence[Tensor]) -> None:
    """Refuse to time two sides that do not compute the same.

    Raises:
        OmniError: a real row differs by more than rounding.
    """
    for i, (one, other) in enumerate(zip(packed_RD.split(list(lengths)), padded, strict=True)):
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
            worst = float((one - other).abs().max())
            raise OmniError(f"utterance {i}: packed and padded rows differ by {worst:g}; one of the two sides is wrong")
