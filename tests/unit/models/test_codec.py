"""The codec as users meet it: shapes, rates, round trips, streaming, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from omni_ray.config.model import CodecConfig, model_preset
from omni_ray.models import codec as codec_module
from omni_ray.models.codec import Codec
from omni_ray.models.codec_segments import HeldSound, segment_spans
from omni_ray.types.errors import CheckpointError, ConfigError, MediaError, RequestError

FRAMES = 11


@pytest.fixture(scope="module")
def codec() -> Codec:
    torch.manual_seed(0)
    made = Codec(model_preset("tiny").codec).eval()
    # Random centres, so that semantic ids differ from frame to frame.
    torch.nn.init.normal_(made.semantic.centres_KD, std=0.2)
    return made


def noise(samples: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1


def random_codes(codec: Codec, frames: int, columns: int = 4) -> torch.Tensor:
    chance = torch.Generator().manual_seed(2)
    sizes = codec.code_sizes()[:columns]
    return torch.stack([torch.randint(0, size, (frames,), generator=chance) for size in sizes], dim=1)


@pytest.mark.parametrize(
    ("samples", "rate_hz"), [(1, 16000), (959, 16000), (960, 16000), (961, 16000), (9001, 44100), (2000, 8000)]
)
def test_a_recording_gives_one_row_every_60_ms_begun(codec: Codec, samples: int, rate_hz: int) -> None:
    codes_N4 = codec.encode(noise(samples), rate_hz)
    at_16k = -(-samples * 16000 // rate_hz)
    assert codes_N4.shape == (-(-at_16k // 960), 4)
    assert codes_N4.dtype == torch.int64
    codec.checked_codes(codes_N4)


def test_equal_clips_give_equal_codes_whatever_was_coded_between(codec: Codec) -> None:
    first = codec.encode(noise(16000), 16000)
    codec.encode(noise(5000, seed=9), 16000)
    assert torch.equal(codec.encode(noise(16000).numpy(), 16000), first)
    assert not torch.equal(codec.encode(noise(16000, seed=9), 16000), first)


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_two_three_and_four_codebooks_decode(codec: Codec, columns: int) -> None:
    codes_N4 = random_codes(codec, FRAMES)
    wave_S = codec.decode(codes_N4[:, :columns])
    assert wave_S.shape == (1440 * FRAMES,)
    assert wave_S.dtype == torch.float32
    assert wave_S.abs().max() <= 1.0
    if columns < 4:
        assert not torch.allclose(wave_S, codec.decode(codes_N4))


def test_frame_by_frame_equals_the_training_network(codec: Codec) -> None:
    codes_N4 = random_codes(codec, FRAMES)
    with torch.no_grad():
        latents = codec.quantizer.read(codes_N4[None, :, 1:])
        whole_S = codec.decoder(codes_N4[None, :, 0], latents)[0, 0]
    # fp32 sums in another order; the network's gain carries the last bits up.
    torch.testing.assert_close(codec.decode(codes_N4), whole_S, atol=2e-5, rtol=0)


def test_rates_and_bits(codec: Codec) -> None:
    assert codec.frame_rate_hz == pytest.approx(16.667, abs=1e-3)
    with torch.device("meta"):
        published = Codec(model_preset("flash-omni").codec.model_copy(update={"semantic_layers": 1}))
    bits = [round(published.bits_per_second(k) / 1000, 2) for k in (2, 3, 4)]
    assert bits == [0.43, 0.65, 0.87]


def test_saved_and_loaded_codec_codes_alike(codec: Codec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    loaded = Codec.from_pretrained(tmp_path)
    again = Codec.from_pretrained(tmp_path)
    assert not loaded.training
    codes_N4 = loaded.encode(noise(8000), 16000)
    assert torch.equal(codes_N4, again.encode(noise(8000), 16000))
    assert torch.equal(loaded.decode(codes_N4), again.decode(codes_N4))


def test_codec_of_another_size_is_refused(codec: Codec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"latent_dim": 64', '"latent_dim": 32'))
    with pytest.raises(CheckpointError, match=r"has shape .* expected .* by its config.json"):
        Codec.from_pretrained(tmp_path)


def test_new_weights_are_heard_after_training_mode(codec: Codec) -> None:
    codes_N4 = random_codes(codec, 5)
    before = codec.decode(codes_N4)
    bias = dict(codec.decoder.named_parameters())["conv_out.bias"]
    codec.train()
    with torch.no_grad():
        bias += 0.05
    codec.eval()
    changed = codec.decode(codes_N4)
    codec.train()
    with torch.no_grad():
        bias -= 0.05
    codec.eval()
    assert not torch.allclose(changed, before)


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (torch.zeros(0), "audio is empty; give at least one sample"),
        (torch.zeros(2, 100), r"audio has shape \[2, 100\]; give one channel \[S\]"),
        (torch.zeros(100, dtype=torch.int16), r"audio is torch.int16; give floats in \[-1, 1\]"),
        (torch.tensor([0.0, float("nan"), 1.0]), "audio holds 1 values that are not finite .first at sample 1."),
    ],
)
def test_sound_that_cannot_be_coded(codec: Codec, wave: torch.Tensor, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        codec.encode(wave, 16000)


@pytest.mark.parametrize("rate_hz", [0, -16000, 10_000_000])
def test_impossible_rate(codec: Codec, rate_hz: int) -> None:
    with pytest.raises(MediaError, match=f"sample rate is {rate_hz} Hz"):
        codec.encode(noise(100), rate_hz)


def test_loud_and_silent_sounds_are_coded(codec: Codec) -> None:
    assert torch.equal(codec.encode(noise(4000) * 1000, 16000), codec.encode((noise(4000) * 1000).clamp(-1, 1), 16000))
    assert codec.encode(torch.zeros(4000), 16000).shape == (5, 4)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((3, 4)), "codes are torch.float64; give integers"),
        (torch.zeros(3, 5, dtype=torch.long), r"codes have shape \[3, 5\]; this codec takes \[frames, 2..4\]"),
        (torch.zeros(3, 1, dtype=torch.long), r"codes have shape \[3, 1\]"),
        (torch.zeros(4, dtype=torch.long), r"codes have shape \[4\]"),
        (torch.tensor([[0, 0, 0, 0], [0, 100, 0, 0]]), "code 100 at frame 1, codebook 1 is out of range.*0..99"),
        (torch.tensor([[64, 0, 0, 0]]), "code 64 at frame 0, codebook 0 is out of range.*0..63"),
        (torch.tensor([[0, 0, -1, 0]]), "code -1 at frame 0, codebook 2"),
    ],
)
def test_codes_that_cannot_be_decoded(codec: Codec, codes: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        codec.decode(codes)  # type: ignore[arg-type]


def test_no_frames_give_no_sound(codec: Codec) -> None:
    assert codec.decode(torch.zeros(0, 4, dtype=torch.long)).shape == (0,)


def test_long_recordings_are_cut_with_margins_and_joined_without_gap(codec: Codec) -> None:
    for frames in (1, 500, 501, 1000, 2345):
        spans = list(segment_spans(frames, codec.config))
        kept = [frame for _, keep_from, keep_to, _ in spans for frame in range(keep_from, keep_to)]
        assert kept == list(range(frames))
        assert all(end - start <= 500 and start <= kf < kt <= end for start, kf, kt, end in spans)
    assert codec.encode(noise(960 * 510), 16000).shape == (510, 4)


def test_rates_that_contradict_each_other_are_refused() -> None:
    config = CodecConfig(**{**model_preset("tiny").codec.model_dump(), "decoder_rates_24k": (8, 6, 6, 4)})
    with pytest.raises(ConfigError, match=r"give 1152 samples a frame, yet .* lasts 1440"):
        Codec(config)


@pytest.mark.parametrize("rate", [16000, 44100, 8000], ids="{}-hz".format)
def test_a_recording_in_blocks_gives_the_codes_of_the_whole(rate: int) -> None:
    torch.manual_seed(1)
    config = model_preset("tiny").codec.model_copy(update={"max_segment_s": 2.4})
    codec = Codec(config).eval()
    for seconds in (0.01, 2.3, 2.45, 7.9):
        wave_S = 0.2 * torch.randn(round(seconds * rate))
        whole = codec.encode(wave_S, rate)
        for size in (rate // 7, 3 * rate, 10 * rate):
            assert torch.equal(torch.cat(list(codec.encode_blocks(wave_S.split(size), rate))), whole)
    assert len(list(codec.encode_blocks([wave_S], rate))) > 3, "several segments"


def test_memory_of_coding_does_not_grow_with_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, held_s = Codec(model_preset("tiny").codec).eval(), []

    class Watched(HeldSound):
        def push(self, wave_S: torch.Tensor) -> None:
            super().push(wave_S)
            held_s.append(sum(piece.untyped_storage().nbytes() for piece in self._pieces) / 4 / 16000)

    def quick_tokens(wave_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames = wave_BS.shape[1] // 960
        return torch.zeros(1, frames, dtype=torch.int64), torch.zeros(1, frames, 3, dtype=torch.int64)

    monkeypatch.setattr(codec_module, "HeldSound", Watched)
    monkeypatch.setattr(codec, "tokens", quick_tokens)
    blocks = (torch.zeros(30 * 16000) for _ in range(3 * 120))
    assert sum(len(codes) for codes in codec.encode_blocks(blocks, 16000)) == 3 * 3600 * 16000 // 960
    assert max(held_s) < 100, "seconds of a recording of three hours"
