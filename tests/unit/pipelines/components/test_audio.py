"""Pretraining of the tiny audio encoder, and the weights that are shipped."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import omni_ray
from omni_ray.config.model import AudioConfig, model_preset
from omni_ray.data.tiny_world.speech import HELD_OUT_VOICES, TRAIN_VOICES
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.models.fbank import Fbank
from omni_ray.types.errors import ConfigError
from pipelines.components.audio import (
    AudioRecipe,
    ctc_loss,
    draw,
    evaluate_audio,
    greedy_words,
    likeliest,
    pretrain,
)
from pipelines.components.audio_batches import Augmentation, SpeechBatcher
from pipelines.components.audio_material import Clip, digest, vocabulary

SHIPPED = Path(omni_ray.__path__[0]) / "assets" / "audio"
NOTHING = Augmentation(
    tempo=(1.0, 1.0),
    warp=0.0,
    lead_frames=0,
    gain_db=(0.0, 0.0),
    tilt_db=0.0,
    snr_db=(200.0, 200.0),
    babble=0.0,
    narrow_band=0.0,
    freq_mask=0.0,
    time_mask=0.0,
)


def tone(hertz: float, seconds: float) -> Tensor:
    """A tone with a few overtones: a word that anyone can tell apart."""
    t_S = torch.arange(int(16000 * seconds)) / 16000
    return sum((0.1 / k * torch.sin(2 * torch.pi * hertz * k * t_S) for k in (1, 2, 3)), torch.zeros(len(t_S)))


def tone_clips() -> list[Clip]:
    words = {"one": 200.0, "two": 500.0, "three": 1200.0}
    clips = [
        Clip(wave_S=tone(hertz, 0.4), words=(word,), kind=kind, source=kind, id=f"{kind}/{word}")
        for word, hertz in words.items()
        for kind in ("human", "word")
    ]
    both = torch.cat([tone(words["two"], 0.4), torch.zeros(1600), tone(words["one"], 0.4)])
    return [*clips, Clip(wave_S=both, words=("two", "one"), kind="sentence", source="tone", id="sentence")]


def test_units_fit_the_tiny_head_and_begin_with_the_blank() -> None:
    units = vocabulary()
    assert units[0] == "<blank>"
    assert len(set(units)) == len(units) <= model_preset("tiny").audio.ctc_vocab_size
    assert {"seven", "purple", "left", "which", "opposite"} <= set(units)


def test_without_augmentation_a_batch_is_the_recordings() -> None:
    fbank = Fbank()
    batch = SpeechBatcher(tone_clips(), fbank, NOTHING, seed=0).draw(human=2, words=2, sentences=1)
    assert [clip.kind for clip in batch.clips] == ["human", "human", "word", "word", "sentence"]
    for frames_TM, clip in zip(batch.features, batch.clips, strict=True):
        plain_TM = fbank(clip.wave_S)
        assert frames_TM.shape == plain_TM.shape
        loud_TM = plain_TM > plain_TM.max() - 12
        torch.testing.assert_close(frames_TM[loud_TM], plain_TM[loud_TM], rtol=0, atol=0.02)


def test_augmentation_is_random_reproducible_and_finite() -> None:
    def features(seed: int) -> list[Tensor]:
        batcher = SpeechBatcher(tone_clips(), Fbank(), Augmentation(), seed)
        return [frames_TM for _ in range(3) for frames_TM in batcher.draw(3, 3, 2).features]

    first, again, other = features(1), features(1), features(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(bool(torch.isfinite(frames_TM).all()) for frames_TM in first)


def test_synthetic_words_stand_in_for_people() -> None:
    clips = [clip for clip in tone_clips() if clip.kind != "human"]
    batch = SpeechBatcher(clips, Fbank(), NOTHING, seed=0).draw(human=3, words=2, sentences=1)
    assert [clip.kind for clip in batch.clips] == ["word"] * 5 + ["sentence"]


def test_narrow_band_silences_what_lies_above_four_kilohertz() -> None:
    clips = [Clip(wave_S=torch.randn(8000), words=("one",), kind=k, source=k, id=k) for k in ("human", "word")]
    always = replace(NOTHING, narrow_band=1.0)
    human_TM, word_TM = SpeechBatcher(clips, Fbank(), always, seed=0).draw(1, 1, 0).features
    assert float(human_TM[:, 70:].mean()) > 10
    assert float(word_TM[:, 70:].max()) < -5
    assert float(word_TM[:, :50].mean()) > 10


def test_greedy_joins_repeats_and_drops_blanks() -> None:
    units = vocabulary()
    rows = [0, units.index("red"), units.index("red"), 0, units.index("red"), units.index("six"), 0]
    logits_NV = torch.nn.functional.one_hot(torch.tensor(rows), 64).float()
    assert greedy_words(logits_NV) == ("red", "red", "six")


def test_likeliest_weighs_all_alignments() -> None:
    units = vocabulary()
    logits_NV = torch.full((3, 64), -20.0)
    logits_NV[:, 0] = 0.0
    logits_NV[1, units.index("four")] = -1.0
    logits_NV[2, units.index("five")] = -0.5
    assert greedy_words(logits_NV) == ()
    assert likeliest(logits_NV.log_softmax(-1), ("four", "five", "six")) == "five"


def test_training_learns_three_tones_and_repeats_itself() -> None:
    recipe = AudioRecipe(steps=60, human=3, words=3, sentences=2, cmvn_batches=2, augmentation=NOTHING)
    clips = tone_clips()
    encoder = pretrain(clips, recipe, model_preset("tiny").audio, seed=0)
    figures = evaluate_audio(encoder, {"tones": clips[:6], "pairs": clips[6:]})
    assert figures["tones_free"] == {"value": 1.0, "n": 6, "chance": 0.0}
    assert figures["pairs_free"]["value"] == 1.0
    short = AudioRecipe(steps=2, human=2, words=1, sentences=1, cmvn_batches=1)
    one, two = (pretrain(clips, short, model_preset("tiny").audio, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@torch.no_grad()
def test_ctc_loss_is_the_mean_over_clips() -> None:
    torch.manual_seed(0)
    encoder = AudioEncoder(model_preset("tiny").audio).eval()
    recipe = AudioRecipe(human=2, words=1, sentences=1, augmentation=NOTHING)
    batch = draw(SpeechBatcher(tone_clips(), encoder.fbank, NOTHING, seed=0), recipe)
    units = vocabulary()
    expected = 0.0
    for frames_TM, clip in zip(batch.features, batch.clips, strict=True):
        log_probs_NV = encoder.ctc_logits([frames_TM])[0].log_softmax(-1)
        target = torch.tensor([[units.index(word) for word in clip.words]])
        expected += float(
            torch.nn.functional.ctc_loss(
                log_probs_NV[:, None], target, torch.tensor([len(log_probs_NV)]), torch.tensor([target.shape[1]]),
                reduction="sum",
            )
        )  # fmt: skip
    assert float(ctc_loss(encoder, batch, units)) == pytest.approx(expected / 4, rel=1e-5)


def test_a_head_with_too_few_units_is_refused() -> None:
    small = AudioConfig.model_validate({**model_preset("tiny").audio.model_dump(), "ctc_vocab_size": 8})
    with pytest.raises(ConfigError) as caught:
        pretrain(tone_clips(), AudioRecipe(), small, seed=0)
    assert str(caught.value) == f"ctc_vocab_size is 8, yet {len(vocabulary())} units are spoken; raise it"


def test_the_digest_feels_names_and_samples() -> None:
    clips = tone_clips()
    louder = [Clip(wave_S=clip.wave_S * 1.01, words=clip.words, kind="word", source="x", id=clip.id) for clip in clips]
    assert digest(clips) == digest(clips) != digest(louder)
    assert digest(clips) != digest(clips[::-1])


def test_the_shipped_encoder_heard_no_held_out_voice() -> None:
    card = json.loads((SHIPPED / "card.json").read_text())
    heard, unheard = set(card["training_data"]["voices"]), {voice.name for voice in HELD_OUT_VOICES}
    assert not heard & unheard
    assert {voice.name for voice in TRAIN_VOICES} <= heard
    assert set(card["held_out"]["voices"]) == unheard
    assert card["held_out"]["people"] == ["yweweler"]
    assert not set(card["training_data"]["people"]) & set(card["held_out"]["people"])
    assert card["ctc_units"] == list(vocabulary())
    assert card["config"] == model_preset("tiny").audio.model_dump(mode="json")


def test_the_shipped_encoder_loads_and_hears_the_assistant() -> None:
    from omni_ray.data.tiny_world.clips import ClipBook
    from omni_ray.data.tiny_world.speech import ASSISTANT_VOICE

    encoder = AudioEncoder.from_pretrained(SHIPPED)
    assert encoder.config == model_preset("tiny").audio
    book = ClipBook()
    clips = [
        Clip(
            wave_S=torch.from_numpy(book.wave(ASSISTANT_VOICE, word)),
            words=(word,),
            kind="word",
            source="heart",
            id=word,
        )
        for word in ("three", "seven", "purple", "left")
    ]
    assert evaluate_audio(encoder, {"own": clips})["own_free"]["value"] >= 0.75


def test_the_shipped_card_is_of_the_recipe_in_this_source() -> None:
    card = json.loads((SHIPPED / "card.json").read_text())
    assert card["recipe"] == json.loads(json.dumps(asdict(AudioRecipe())))
    assert card["command"].endswith(f"--steps {AudioRecipe().steps} --seed {card['seed']}")
