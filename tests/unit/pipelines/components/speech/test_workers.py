"""Any number of workers makes the same codec bit for bit, and so does a run that was interrupted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from speech_workers import few_crops, short_recipe, tones, train_apart, trained

from omni_ray.config.speech_training import STAGES, SpeechRecipe, SpeechStage
from omni_ray.models.codec import Codec
from omni_ray.types.errors import ConfigError, DataError, OmniError
from pipelines.components.speech.group import Alone, own_parts, summed_in_order
from pipelines.components.speech.loop import PhaseState
from pipelines.components.speech.stages import StageRun, new_codec, run_stage, speakers_clips, stage_state

RECIPE = short_recipe()
few_crops()
Told = list[tuple[str, dict[str, float]]]


class InterruptionError(Exception):
    """A worker's end, on purpose."""


def train(
    stage: SpeechStage, *, stop: tuple[str, int] | None = None, resume: Any = None, recipe: SpeechRecipe = RECIPE
) -> tuple[Codec, Told, dict[str, Any] | None]:
    """The stage from a random codec, alone; ends with a checkpoint after (phase, step) where asked to."""
    codec, told, kept = new_codec(recipe), [], []
    run = StageRun(stage=stage, recipe=recipe, codec=codec, clips=tones(), group=Alone())

    def keep(phase: str, state: PhaseState, make: Any) -> None:
        told.append((phase, state.told))
        if stop == (phase, state.step):
            kept.append(copy.deepcopy(stage_state(phase, state, make())))
            raise InterruptionError

    try:
        run_stage(run, resume, keep)
    except InterruptionError:
        return codec, told, kept[0]
    return codec, told, None


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.slow
def test_two_workers_make_the_bits_of_one(tmp_path: Path) -> None:
    both = train_apart(2, tmp_path, list(STAGES))
    for stage in STAGES:
        alone = trained(stage, Alone())
        assert_equal(both[0][stage], alone)
        assert_equal(both[1][stage], alone)


@pytest.mark.parametrize(
    ("stage", "phase", "step"),
    [
        ("semantic-pretrain", "pretrain", 2),
        ("semantic-ctc", "ctc", 1),
        ("1", "latents", 2),
        ("1", "latents", 3),
        ("1", "coded", 2),
        ("1", "wave16", 2),
        ("2", "wave", 2),
        ("2", "polish", 2),
        ("3", "speaker", 1),
    ],
)
def test_an_interrupted_stage_ends_as_the_undisturbed_one(stage: SpeechStage, phase: str, step: int) -> None:
    whole, told, _ = train(stage)
    _, before, saved = train(stage, stop=(phase, step))
    assert saved is not None
    again, after, _ = train(stage, resume=saved)
    assert_equal(whole.state_dict(), again.state_dict())
    assert before + after == told, "every step once, with the same losses"


@pytest.mark.parametrize(
    ("stage", "changed"),
    [
        ("semantic-pretrain", ("semantic.",)),
        ("semantic-ctc", ("semantic.",)),
        ("kmeans", ("semantic.centres_KD",)),
        ("1", ("acoustic.", "quantizer.", "decoder.")),
        ("2", ("decoder.",)),
        ("3", ("decoder.",)),
    ],
)
def test_a_stage_changes_its_own_weights_alone(stage: SpeechStage, changed: tuple[str, ...]) -> None:
    before, (after, _, _) = new_codec(RECIPE).state_dict(), train(stage)
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(changed) for name in moved)
    for part in changed:
        assert any(name.startswith(part) for name in moved), part


def test_the_coded_phase_goes_through_a_quantiser_that_stays() -> None:
    still = RECIPE.encoder.model_copy(update={"encoder_lr_share": 0.0})
    after, told, _ = train("1", recipe=RECIPE.model_copy(update={"encoder": still}))
    assert ["near" in values for phase, values in told if phase != "wave16"] == [False] * 3 + [True] * 3
    uncoded = still.model_copy(update={"coded": RECIPE.encoder.coded.model_copy(update={"steps": 0})})
    before, _, _ = train("1", recipe=RECIPE.model_copy(update={"encoder": uncoded}))
    kept = before.state_dict()
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, kept[name])}
    assert any(name.startswith("acoustic.") for name in moved)
    assert not any(name.startswith("quantizer.") for name in moved)


def test_discriminators_come_in_when_the_recipe_says() -> None:
    _, told, _ = train("2")
    polish = [values for phase, values in told if phase == "polish"]
    assert "discriminator/loss" not in polish[0]
    assert "discriminator/loss" in polish[1]
    assert "adversarial" not in polish[1], "they learn alone for a step first"
    assert {"adversarial", "feature", "mel", "loss"} <= set(polish[2])
    terms = sum(polish[2][name] for name in ("mel", "adversarial", "feature"))
    assert polish[2]["loss"] == pytest.approx(terms, rel=1e-5)


def test_sums_go_part_by_part() -> None:
    large = 2.0**25
    rows = torch.tensor([[large], [1.0], [-large], [1.0]])
    assert float(summed_in_order(rows, Alone())) == 1.0, "the first 1 is lost beside the large value, the last is not"


def test_workers_that_do_not_share_the_parts_are_refused() -> None:
    class Three(Alone):
        size = 3

    with pytest.raises(ConfigError, match=r"3 workers cannot share 4 parts evenly; choose --workers from \[1, 2, 4\]"):
        own_parts(4, Three())


def test_an_unknown_speaker_is_named_with_the_known_ones() -> None:
    assert {clip.source for clip in speakers_clips(tones(), ("voice-1",))} == {"voice-1"}
    with pytest.raises(DataError, match="names nobody; the data have voice-0, voice-1"):
        speakers_clips(tones(), ("nobody", "voice-1"))


def test_a_loss_that_is_not_finite_ends_the_stage() -> None:
    codec, clips = new_codec(RECIPE), tones()
    with torch.no_grad():
        codec.decoder.conv_out.bias.fill_(float("nan"))  # type: ignore[union-attr, operator]
    run = StageRun(stage="3", recipe=RECIPE, codec=codec, clips=clips, group=Alone())
    with pytest.raises(OmniError, match=r"is nan at step 0 of phase 'speaker'; lower its lr"):
        run_stage(run, None, lambda *_: None)
