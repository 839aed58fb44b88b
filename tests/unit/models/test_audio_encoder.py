"""The audio encoder against a slow transcription; chunked, batched and stored forms against the plain one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from omni_ray.config.model import AudioConfig, SizeName, model_preset
from omni_ray.models.audio_encoder import AudioEncoder, AudioState
from omni_ray.models.streaming import in_pieces
from omni_ray.types.errors import CheckpointError, ConfigError, MediaError

SMALL = AudioConfig(
    num_mels=12,
    splice_left=2,
    splice_right=6,
    hidden_size=24,
    projection_size=8,
    num_layers=4,
    num_lookahead_layers=2,
    left_order=3,
    right_order=1,
    ctc_vocab_size=7,
    output_size=16,
)


def random_encoder(config: AudioConfig, seed: int = 0) -> AudioEncoder:
    """Every parameter random, norms included, and a CMVN that matters."""
    generator = torch.Generator().manual_seed(seed)
    encoder = AudioEncoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1) * 0.1)
    mean = 8 + torch.randn(config.num_mels, generator=generator)
    encoder.set_cmvn(mean, 1 + torch.rand(config.num_mels, generator=generator))
    return encoder.eval()


def noise(samples: int, seed: int = 1) -> Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder() -> AudioEncoder:
    return random_encoder(SMALL)


@pytest.fixture(scope="module")
def tiny() -> AudioEncoder:
    return random_encoder(model_preset("tiny").audio)


def doubled(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers in double precision, still of the parameters' graph."""
    return {name: value.double() for name, value in module.state_dict(keep_vars=True).items()}


def slow_layer(layer: torch.nn.Module, x: list[Tensor], left: int, right: int) -> list[Tensor]:
    """One FSMN layer, row by row and tap by tap."""
    weight = doubled(layer)

    def norm(v: Tensor, name: str) -> Tensor:
        centred = v - v.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * weight[f"{name}.weight"] + weight[f"{name}.bias"]

    normed = [norm(v, "norm1") for v in x]
    out = []
    for t in range(len(x)):
        m = x[t].clone()
        for i in range(-left, right + 1):
            if 0 <= t + i < len(x):
                m = m + weight["memory.weight"][:, 0, i + left] * normed[t + i]
        inner = (weight["linear1.weight"] @ norm(m, "norm2") + weight["linear1.bias"]).clamp(0, 6)
        out.append(m + weight["linear2.weight"] @ inner + weight["linear2.bias"])
    return out


def slow_encode(encoder: AudioEncoder, wave: Tensor) -> tuple[Tensor, Tensor]:
    """networks.md section 2 in double precision: language rows and CTC logits."""
    config, part = encoder.config, encoder.encoder
    weight = doubled(encoder)
    fbank = encoder.fbank(wave).double()
    frames = (fbank - weight["encoder.cmvn_mean_M"]) / weight["encoder.cmvn_std_M"]
    x = []
    for centre in range(0, len(frames), config.stride):
        window = range(centre - config.splice_left, centre + config.splice_right + 1)
        s = torch.cat([frames[min(max(i, 0), len(frames) - 1)] for i in window])
        a = (weight["encoder.pre_ffn.linear1.weight"] @ s + weight["encoder.pre_ffn.linear1.bias"]).clamp(0, 6)
        x.append(weight["encoder.pre_ffn.linear2.weight"] @ a)
    for i, layer in enumerate(part.layers):
        looks_ahead = i >= config.num_layers - config.num_lookahead_layers
        x = slow_layer(layer, x, config.left_order, config.right_order if looks_ahead else 0)
    for i in range(config.num_post_layers):
        w, b = weight[f"encoder.post_ffn.{i}.weight"], weight[f"encoder.post_ffn.{i}.bias"]
        x = [(w @ v + b).clamp(0, 6) for v in x]
    rows = []
    for v in x:
        u = weight["projector.0.weight"] @ v + weight["projector.0.bias"]
        u = u * 0.5 * (1 + torch.erf(u / 2**0.5))
        rows.append(weight["projector.2.weight"] @ u + weight["projector.2.bias"])
    logits = [weight["encoder.ctc_head.weight"] @ v + weight["encoder.ctc_head.bias"] for v in x]
    return torch.stack(rows), torch.stack(logits)


@pytest.mark.parametrize("samples", [400, 400 + 160 * 7, 400 + 160 * 8, 9000], ids="{}-samples".format)
def test_equals_the_slow_transcription(encoder: AudioEncoder, samples: int) -> None:
    wave = noise(samples)
    with torch.no_grad():
        rows, lengths = encoder([wave])
        logits, _ = encoder.ctc_logits([encoder.features(wave)])
    expected_rows, expected_logits = slow_encode(encoder, wave)
    assert lengths == (-(-((samples - 400) // 160 + 1) // 8),) == (SMALL.num_rows(samples),)
    torch.testing.assert_close(rows.double(), expected_rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.double(), expected_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{}, {"left_order": 1, "right_order": 2}, {"num_layers": 2, "num_post_layers": 1}])
def test_gradients_equal_the_slow_transcription(change: dict[str, int]) -> None:
    encoder = random_encoder(SMALL.model_copy(update=change), seed=2)
    wave = noise(5000)
    rows, _ = encoder([wave])
    logits, _ = encoder.ctc_logits([encoder.features(wave)])
    slow_rows, slow_logits = slow_encode(encoder, wave)
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    ours = torch.autograd.grad(rows.sin().sum() + logits.sin().sum(), parameters)
    theirs = torch.autograd.grad(slow_rows.sin().sum() + slow_logits.sin().sum(), parameters)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def stream_all(encoder: AudioEncoder, wave: Tensor, sizes: list[int]) -> Tensor:
    parts, state = in_pieces(encoder, wave[None], encoder.initial_state(), sizes)
    return torch.cat([*parts, encoder.flush(state)], dim=1)[0]


CHUNKINGS = {
    "20-ms": [320],
    "60-ms": [960],
    "100-ms": [1600],
    "1-s": [16000],
    "odd": [777],
    "uneven": [1, 399, 161, 4000, 5, 1281],
    "all-at-once": [10**6],
}


@pytest.mark.parametrize("sizes", CHUNKINGS.values(), ids=CHUNKINGS.keys())
@torch.no_grad()
def test_chunked_equals_whole(tiny: AudioEncoder, sizes: list[int]) -> None:
    wave = noise(45_000)
    whole, _ = tiny([wave])
    assert torch.equal(stream_all(tiny, wave, sizes), whole)
    assert torch.equal(tiny(wave[None])[0][0], whole)


@pytest.mark.parametrize(
    "change",
    [
        {"splice_left": 3, "splice_right": 4},
        {"splice_left": 0, "splice_right": 7},
        {"splice_left": 7, "splice_right": 0},
        {"right_order": 2},
        {"right_order": 0},
        {"num_lookahead_layers": 0},
    ],
    ids=lambda change: ",".join(f"{k}={v}" for k, v in change.items()),
)
@pytest.mark.parametrize("samples", [400, 3000, 12_345])
@torch.no_grad()
def test_chunked_equals_whole_for_other_forms(change: dict[str, int], samples: int) -> None:
    encoder = random_encoder(SMALL.model_copy(update=change))
    wave = noise(samples)
    whole, _ = encoder([wave])
    for sizes in ([160], [1000], [555, 20, 3000]):
        assert torch.equal(stream_all(encoder, wave, sizes), whole)


@torch.no_grad()
def test_streams_in_step_equal_streams_alone(tiny: AudioEncoder) -> None:
    waves = torch.stack([noise(20_000, seed) for seed in (3, 4, 5)])
    parts, state = in_pieces(tiny, waves, tiny.initial_state(batch_size=3), [1600])
    together = torch.cat([*parts, tiny.flush(state)], dim=1)
    for wave, rows in zip(waves, together, strict=True):
        assert torch.equal(rows, stream_all(tiny, wave, [1600]))


@torch.no_grad()
def test_an_utterance_does_not_feel_its_batch(tiny: AudioEncoder) -> None:
    waves = [noise(samples, seed) for seed, samples in enumerate((400, 16_000, 5_000, 31_111, 1_700))]
    together, lengths = tiny(waves)
    assert lengths == tuple(tiny.config.num_rows(wave.shape[0]) for wave in waves)
    for wave, rows in zip(waves, together.split(lengths), strict=True):
        alone, _ = tiny([wave])
        assert torch.equal(rows, alone)


def test_an_empty_batch_is_a_normal_batch(tiny: AudioEncoder) -> None:
    rows, lengths = tiny([])
    assert rows.shape == (0, 160)
    assert lengths == ()


def test_gradients_of_a_batch_are_the_sum_over_utterances(encoder: AudioEncoder) -> None:
    waves = [noise(5000, 1), noise(900, 2), noise(12_000, 3)]

    def gradients(batches: list[list[Tensor]]) -> list[Tensor]:
        encoder.zero_grad()
        for batch in batches:
            encoder(batch)[0].sin().sum().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    together, apart = gradients([waves]), gradients([[wave] for wave in waves])
    assert len(together) == len(list(encoder.parameters())) - 2  # all but the CTC head
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_guessed_end_leaves_the_stream_as_it_was(tiny: AudioEncoder) -> None:
    wave = noise(30_000)
    first, state = tiny(wave[None, :12_000], tiny.initial_state())
    guess = torch.cat([first, tiny.flush(state)], dim=1)[0]
    assert torch.equal(guess, tiny([wave[:12_000]])[0])
    rest, state = tiny(wave[None, 12_000:], state)
    assert torch.equal(torch.cat([first, rest, tiny.flush(state)], dim=1)[0], tiny([wave])[0])


@torch.no_grad()
def test_lookahead_is_what_a_row_waits_for(tiny: AudioEncoder) -> None:
    assert model_preset("flash-omni").audio.lookahead_ms == 495
    assert tiny.lookahead_ms == 80 * 3 + 90 + 25 - 80
    row = 5
    needed = (80 * (row + 1) + tiny.lookahead_ms) * 16
    wave = noise(needed)
    assert tiny(wave[None, : needed - 1], tiny.initial_state())[0].shape[1] == row
    assert tiny(wave[None], tiny.initial_state())[0].shape[1] == row + 1


@torch.no_grad()
def test_state_size_does_not_grow(tiny: AudioEncoder) -> None:
    state: AudioState = tiny.initial_state()
    sizes = []
    for second in range(6):
        _, state = tiny(noise(16_000, second)[None], state)
        sizes.append(state.num_bytes)
    assert max(sizes[1:]) - min(sizes[1:]) <= 8 * 80 * 4 + 160 * 4
    layers = 4 * 96 * 4 * 6 + 3 * (2 * 96 * 4)
    assert max(sizes) <= layers + 4 * (400 + 80 * 12)


@torch.no_grad()
def test_a_stream_without_one_frame_gives_no_rows(tiny: AudioEncoder) -> None:
    rows, state = tiny(noise(399)[None], tiny.initial_state())
    assert rows.shape == (1, 0, 160)
    assert tiny.flush(state).shape == (1, 0, 160)


@pytest.mark.parametrize(
    ("size", "encoder_millions", "projector_millions"),
    [("flash-omni", 512.2, 75.5), ("small", 44.8, 2.2), ("tiny", 0.68, 0.07)],
)
def test_parameter_counts(size: SizeName, encoder_millions: float, projector_millions: float) -> None:
    with torch.device("meta"):
        model = AudioEncoder(model_preset(size).audio)
    count = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in (("encoder", model.encoder), ("projector", model.projector))
    }
    digits = 2 if size == "tiny" else 1
    assert round(count["encoder"], digits) == encoder_millions
    assert round(count["projector"], digits) == projector_millions


@torch.no_grad()
def test_saved_and_loaded_is_the_same(encoder: AudioEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "full")
    loaded = AudioEncoder.from_pretrained(tmp_path / "full")
    assert not loaded.training
    wave = noise(8000)
    assert torch.equal(loaded([wave])[0], encoder([wave])[0])
    encoder.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = AudioEncoder.from_pretrained(tmp_path / "half")
    assert half.projector[0].weight.dtype == torch.float32
    torch.testing.assert_close(half([wave])[0], encoder([wave])[0], rtol=0.03, atol=0.03)


def test_foreign_folders_are_refused(encoder: AudioEncoder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        AudioEncoder.from_pretrained(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds no config.json; name a folder written by save_pretrained"
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(CheckpointError, match=r"has shape .* expected .* by its config\.json"):
        AudioEncoder.from_pretrained(tmp_path)


def test_short_recordings_are_refused(tiny: AudioEncoder) -> None:
    with pytest.raises(MediaError) as caught:
        tiny([noise(4000), noise(399)])
    assert str(caught.value) == (
        "recording 1 has 399 samples, yet one frame needs 400 (25 ms at 16000 Hz); give a longer recording"
    )
    with pytest.raises(MediaError) as caught:
        tiny(noise(4000), tiny.initial_state())
    assert str(caught.value) == "streamed audio has shape [4000]; give [streams, samples]"


def test_impossible_settings_are_refused(encoder: AudioEncoder) -> None:
    with pytest.raises(
        ValidationError, match=r"splice_left 2 \+ 1 \+ splice_right 3 = 6 frames leave gaps at stride 8"
    ):
        AudioConfig(splice_left=2, splice_right=3)
    with pytest.raises(ValidationError, match="num_lookahead_layers is 23, yet there are 22 layers"):
        AudioConfig(num_lookahead_layers=23)
    with pytest.raises(ConfigError, match="give 12 means and 12 positive deviations"):
        encoder.set_cmvn(torch.zeros(12), torch.zeros(12))


def test_samples_that_are_not_finite_are_refused(tiny: AudioEncoder) -> None:
    bad = noise(4000)
    bad[123] = float("inf")
    with pytest.raises(MediaError) as caught:
        tiny([noise(4000), bad])
    assert str(caught.value) == "recording 1 has 1 samples that are not finite, the first at 123; decode it again"
    with pytest.raises(MediaError, match="streamed audio has 1 samples that are not finite"):
        tiny(bad[None], tiny.initial_state())
    with pytest.raises(ValidationError, match="mel_high_hz 9000 do not fit 16000 samples a second"):
        AudioConfig(mel_high_hz=9000)


def test_flash_omni_row_t_needs_sound_up_to_80_t_plus_575_ms() -> None:
    """networks.md section 2: the window of the last fbank frame that row t depends on ends at 80 t + 575 ms."""
    config = model_preset("flash-omni").audio
    for t in (0, 1, 40):
        assert 80 * (t + 1) + config.lookahead_ms == 80 * t + 575


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(400, 9000),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
)
@torch.no_grad()
def test_any_chunking_equals_whole(samples: int, sizes: list[int]) -> None:
    encoder = random_encoder(SMALL)
    wave = noise(samples, seed=samples)
    assert torch.equal(stream_all(encoder, wave, sizes), encoder([wave])[0])
