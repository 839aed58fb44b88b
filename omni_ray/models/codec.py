"""The four-codebook audio codec: any recording to 4 ids every 60 ms, and back to sound at 24 kHz.

Column 0 of the codes is semantic (which sounds), columns 1..3 are acoustic (how they sound); an acoustic id is
``ia * group_codes + ib``.  Fewer acoustic columns decode to a coarser sound.
Source: LongCat-Audio-Codec report; networks.md section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from omni_ray.config.model import CodecConfig
from omni_ray.models.audio_decoder import AudioDecoder
from omni_ray.models.audio_tokenizer import AcousticEncoder, SemanticEncoder
from omni_ray.models.codec_segments import MARGIN_FRAMES, HeldSound, longest_frames, segment_at, segment_spans
from omni_ray.models.codec_stream import CodecStream, FrameDecoder, RowTables
from omni_ray.models.fbank import Fbank
from omni_ray.models.native.codec import NativeFrames
from omni_ray.models.native.library import library
from omni_ray.models.pretrained import load_weights, read_config, save_module
from omni_ray.models.quantizer import Quantizer
from omni_ray.models.resample import Resampler
from omni_ray.types.errors import ConfigError, MediaError, RequestError

MODEL_TYPE = "omni_ray_codec"
MIN_FRAMES = 8
"""Shorter sounds are coded with silence after them; the surplus codes are dropped."""


class Codec(nn.Module):
    """Encoder, quantiser and streaming decoder of one size.

    ``forward`` is for training; users call :meth:`encode`, :meth:`decode` and :meth:`stream`.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        expected_hop = config.hop * config.output_rate_hz / config.sample_rate_hz
        if config.output_hop != expected_hop:
            raise ConfigError(
                f"codec.decoder_rates_24k give {config.output_hop} samples a frame, yet a frame of {config.hop} at "
                f"{config.sample_rate_hz} Hz lasts {expected_hop:g} at {config.output_rate_hz} Hz; make them equal"
            )
        self.config = config
        self.fbank = Fbank(config.num_mels, sample_rate_hz=config.sample_rate_hz)
        self.semantic = SemanticEncoder(config)
        self.acoustic = AcousticEncoder(config)
        self.quantizer = Quantizer(config.latent_dim, config.levels, config.group_codes, config.group_dim)
        self.decoder = AudioDecoder(config, config.output_rate_hz)
        self._frames: FrameDecoder | NativeFrames | None = None

    @property
    def codebooks(self) -> int:
        """Columns of the codes: one semantic and ``levels`` acoustic."""
        return 1 + self.config.levels

    @property
    def frame_rate_hz(self) -> float:
        """Code rows a second (16.67)."""
        return self.config.sample_rate_hz / self.config.hop

    def code_sizes(self) -> tuple[int, ...]:
        """Number of codes of each column."""
        return (self.config.semantic_codes, *[self.config.group_codes**2] * self.config.levels)

    def bits_per_second(self, codebooks: int | None = None) -> float:
        """Bit-rate with this many codebooks (all by default)."""
        sizes = self.code_sizes()[: self.codebooks if codebooks is None else codebooks]
        return self.frame_rate_hz * sum(math.log2(size) for size in sizes)

    @torch.inference_mode()
    def encode(self, wave: Tensor | np.ndarray, sample_rate_hz: int) -> Tensor:
        """Code a mono recording.

        Args:
            wave: [S] samples, float in [-1, 1] (louder samples are clipped).
            sample_rate_hz: Its rate; any.
        Returns:
            [N, 4] int64 with N = ceil(S16 / 960), S16 being the samples at 16 kHz.
        Raises:
            MediaError: empty, not mono, not float, or with values that are not finite.
        """
        return torch.cat(list(self.encode_blocks([_checked_wave(wave)], sample_rate_hz)))

    @torch.inference_mode()
    def encode_blocks(self, blocks: Iterable[Tensor], sample_rate_hz: int) -> Iterator[Tensor]:
        """Code a recording that comes in blocks, in memory that does not grow with it.

        Args:
            blocks: [S] float samples in [-1, 1], one after another.
        Yields:
            [n, 4] int64; together what :meth:`encode` gives for all blocks as one, bit for bit.
        """
        hop, config, resampler = self.config.hop, self.config, Resampler(sample_rate_hz, self.config.sample_rate_hz)
        longest = longest_frames(config)
        held = HeldSound(hop)
        kept = 0
        for block_S in blocks:
            held.push(resampler.push(block_S))
            # Where a recording has one segment it is coded whole; where it has more, all but the last are known to be.
            while held.whole_frames > max(longest, kept + longest - MARGIN_FRAMES):
                start, _, keep_to, end = segment_at(kept, held.whole_frames, config)
                yield self._encode_segment(held.between(start, end), kept - start, keep_to - start)
                kept = keep_to
                held.drop_before(kept - MARGIN_FRAMES)
        held.push(resampler.flush())
        # Every clip has a zero tail up to a whole frame; a very short one gets a few frames of silence to stand in.
        frames = held.frames
        padded = max(frames, MIN_FRAMES)
        held.push(torch.zeros(padded * hop - held.samples))
        for start, keep_from, keep_to, end in segment_spans(padded, config):
            if keep_from >= kept:
                yield self._encode_segment(held.between(start, end), keep_from - start, min(keep_to, frames) - start)

    def _encode_segment(self, wave_S: Tensor, keep_from: int, keep_to: int) -> Tensor:
        semantic_1N, acoustic_1NL = self.tokens(wave_S.unsqueeze(0).to(self._device()))
        codes_N4 = torch.cat([semantic_1N.unsqueeze(-1), acoustic_1NL], dim=-1)[0]
        return codes_N4[keep_from:keep_to].cpu()

    def tokens(self, wave_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic ids [B, N] and acoustic ids [B, N, 3] of 16 kHz clips of N x 960 samples."""
        semantic_BN = self.semantic.codes(self.fbank(wave_BS))
        latents_BZN = self.acoustic(wave_BS.unsqueeze(1))
        return semantic_BN, self.quantizer(latents_BZN).codes_BTL

    @torch.inference_mode()
    def decode(self, codes: Tensor | np.ndarray) -> Tensor:
        """Sound of codes.

        Args:
            codes: [N, 4] integers as :meth:`encode` gives them; [N, 3] or [N, 2] for fewer codebooks.
        Returns:
            [1440 N] float32 at 24 kHz, on CPU. On CPU it is what :meth:`stream` gives for any chunking, bit for bit.
        Raises:
            RequestError: another shape or type, or an id out of range.
        """
        codes_NK = self.checked_codes(codes)
        if self._device().type == "cpu":
            stream = self.stream()
            return torch.cat([stream.push(codes_NK), stream.flush()])
        codes_1NK = codes_NK.unsqueeze(0).to(self._device())
        latents_1ZN = self.quantizer.read(codes_1NK[..., 1:])
        return self.decoder(codes_1NK[..., 0], latents_1ZN)[0, 0].float().cpu()

    def stream(self) -> CodecStream:
        """A new streaming decoder: push rows of codes, take sound, flush. Weights are packed once and shared."""
        return CodecStream(self)

    def frame_decoder(self) -> FrameDecoder | NativeFrames:
        """The packed decoder that all streams of this codec share, compiled where it can be."""
        if self._frames is None:
            found, rows = library(), RowTables(self.decoder, self.quantizer)
            if found is not None and NativeFrames.fits(found, self.decoder):
                self._frames = NativeFrames(found, self.decoder, rows)
            else:
                self._frames = FrameDecoder(self.decoder, rows)
        return self._frames

    def train(self, mode: bool = True) -> Self:
        """Training changes weights, so packed ones are forgotten."""
        self._frames = None
        return super().train(mode)

    def checked_codes(self, codes: Tensor | np.ndarray) -> Tensor:
        """The codes as [N, K] int64 on CPU.

        Raises:
            RequestError: not integers, not [N, 2..4], or an id outside its codebook (names the first one).
        """
        codes_NK = torch.as_tensor(codes).cpu()
        if codes_NK.is_floating_point() or codes_NK.is_complex() or codes_NK.dtype == torch.bool:
            raise RequestError(f"codes are {codes_NK.dtype}; give integers [N, {self.codebooks}]")
        if codes_NK.dim() != 2 or not 2 <= codes_NK.shape[1] <= self.codebooks:
            raise RequestError(
                f"codes have shape {list(codes_NK.shape)}; this codec takes [frames, 2..{self.codebooks}]: "
                "one semantic and at least one acoustic column"
            )
        codes_NK = codes_NK.long()
        sizes_K = torch.tensor(self.code_sizes()[: codes_NK.shape[1]])
        wrong = ((codes_NK < 0) | (codes_NK >= sizes_K)).nonzero()
        if len(wrong):
            row, column = (int(value) for value in wrong[0])
            raise RequestError(
                f"code {int(codes_NK[row, column])} at frame {row}, codebook {column} is out of range; "
                f"that codebook of this codec has 0..{int(sizes_K[column]) - 1}"
            )
        return codes_NK

    def save_pretrained(self, folder: Path | str, dtype: torch.dtype = torch.float16) -> None:
        """Write ``config.json`` and ``model.safetensors``, floats as ``dtype``."""
        save_module(self, self.config, Path(folder), model_type=MODEL_TYPE, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """A codec in evaluation mode from a folder of :meth:`save_pretrained`.

        Raises:
            CheckpointError: not such a folder, damaged, or of another size.
        """
        config = read_config(Path(folder), CodecConfig, model_type=MODEL_TYPE)
        with torch.device("meta"):
            codec = cls(config)
        return load_weights(codec, Path(folder), what="a codec of the size in its config.json").eval()

    def _device(self) -> torch.device:
        return self.semantic.mean_C.device


def _checked_wave(wave: Tensor | np.ndarray) -> Tensor:
    wave_S = torch.as_tensor(wave).detach().cpu()
    if wave_S.dim() != 1:
        raise MediaError(f"audio has shape {list(wave_S.shape)}; give one channel [S] (average the channels first)")
    if not wave_S.numel():
        raise MediaError("audio is empty; give at least one sample")
    if not wave_S.is_floating_point():
        raise MediaError(f"audio is {wave_S.dtype}; give floats in [-1, 1] (divide 16-bit integers by 32768)")
    wave_S = wave_S.float()
    bad = (~wave_S.isfinite()).nonzero()
    if len(bad):
        raise MediaError(f"audio holds {len(bad)} values that are not finite (first at sample {int(bad[0])}); clean it")
    return wave_S.clamp(-1.0, 1.0)
