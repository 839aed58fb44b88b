"""The decoder's training: losses that vanish on equal sound, targets that line up, and a short run that learns."""

from __future__ import annotations

import pytest
import torch

from omni_ray.config.model import model_preset
from omni_ray.models.codec import Codec
from pipelines.components.codec_decoder import DecoderRecipe, FrameMel, WaveLoss, train_decoder
from pipelines.components.codec_material import Clip
from pipelines.components.codec_stages import Cropper, StageRecipe, code_clips


@pytest.fixture(scope="module")
def codec() -> Codec:
    torch.manual_seed(0)
    return Codec(model_preset("tiny").codec)


@pytest.fixture(scope="module")
def cropper(codec: Codec) -> Cropper:
    """Two tones that swell and fade, as the assistant's clips."""
    clips = []
    for number, pitch_hz in enumerate((220.0, 310.0)):
        waves = {}
        for rate in (16000, 24000):
            time_s = torch.arange(int(1.2 * rate)) / rate
            waves[rate] = 0.3 * torch.sin(2 * torch.pi * pitch_hz * time_s) * torch.sin(torch.pi * time_s / 1.2)
        clips.append(
            Clip(
                id=f"tone-{number}",
                kind="assistant",
                source="tone",
                words=("one",),
                input_S=waves[16000],
                output_S=waves[24000],
            )
        )
    return Cropper(clips, code_clips(codec.eval(), clips, acoustic=True), codec, seed=0)


def test_wave_loss_is_zero_on_equal_sound_only() -> None:
    loss = WaveLoss(24000)
    wave = torch.randn(2, 9600) * 0.1
    assert float(loss(wave, wave)) == 0.0
    assert float(loss(0.5 * wave, wave)) > 0.1
    assert float(loss(-wave, wave)) < 1e-4, "phase is not asked for"


def test_mel_targets_stand_at_the_rate_of_the_first_stage(codec: Codec, cropper: Cropper) -> None:
    mel = FrameMel(codec, cropper)
    assert mel.hop == 180
    assert mel(torch.zeros(2, 1440 * 5)).shape == (2, 40, 80)
    click = torch.zeros(1, 1440 * 4)
    click[0, 180 * 12 + 90] = 1.0
    assert int(mel(click)[0].mean(dim=1).argmax()) == 12, "a click in the middle of step 12 is heard in step 12"


@pytest.mark.slow
def test_short_training_comes_nearer_and_moves_the_decoder_alone(codec: Codec, cropper: Cropper) -> None:
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    short = DecoderRecipe(
        frames=StageRecipe(steps=50, batch=4, frames=8, lr=3e-3),
        wave=StageRecipe(steps=50, batch=2, frames=8, lr=3e-3),
        polish=StageRecipe(steps=1, batch=2, frames=8, lr=1e-4),
    )
    loss, cut = WaveLoss(24000), cropper.draw(2, 8)

    def distance() -> float:
        with torch.no_grad():
            made = torch.stack([codec.decode(codes) for codes in cut.codes_BNK])
        return float(loss(made, cut.output_BS))

    far = distance()
    codec.train()
    train_decoder(codec, cropper, short, seed=1, log=lambda line: None)
    codec.eval()
    assert distance() < 0.7 * far
    moved = {name for name, value in codec.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("decoder.") for name in moved), "codes stay what they were"
