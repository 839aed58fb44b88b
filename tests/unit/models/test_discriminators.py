"""Discriminators of the codec and the losses around them."""

from __future__ import annotations

import math

import pytest
import torch

from omni_ray.config.speech_training import DiscriminatorConfig
from omni_ray.models.discriminators import BANDS, Discriminators, Judged, PeriodDiscriminator
from omni_ray.training.adversarial import discriminator_loss, feature_loss, generator_loss

SMALL = DiscriminatorConfig(periods=(2, 3), period_channels=(4, 8), windows=(256,), band_channels=2)


def judged(score: float, *features: float) -> Judged:
    return torch.full((2, 1, 5), score), [torch.full((2, 3), value) for value in features]


def test_every_member_judges_any_length() -> None:
    torch.manual_seed(0)
    judges = Discriminators(SMALL)
    for samples in (600, 601, 1440):
        told = judges(torch.randn(2, samples))
        assert len(told) == 3
        assert all(score.shape[0] == 2 for score, _ in told)
        assert [len(features) for _, features in told] == [2, 2, 5 * len(BANDS[1:])]


def test_a_period_discriminator_mixes_only_samples_of_one_phase() -> None:
    torch.manual_seed(0)
    judge = PeriodDiscriminator(3, (4, 8))
    wave = torch.randn(1, 300)
    before, _ = judge(wave)
    wave[0, 3 * 40 + 1] += 1.0
    after, _ = judge(wave)
    changed = (before != after)[0, 0].any(dim=0)
    assert changed.tolist() == [False, True, False]


def test_loudness_is_no_evidence() -> None:
    torch.manual_seed(0)
    judges, wave = Discriminators(SMALL), torch.randn(2, 800)
    for (score, _), (louder, _) in zip(judges(wave), judges(3.0 * wave), strict=True):
        torch.testing.assert_close(score, louder, atol=1e-5, rtol=1e-4)


def test_published_size_counts() -> None:
    """The period half of DAC's discriminators: 5 x 8.2 M, as HiFi-GAN has them."""
    with torch.device("meta"):
        judges = Discriminators(DiscriminatorConfig())
    periods = sum(p.numel() for m in judges.members if isinstance(m, PeriodDiscriminator) for p in m.parameters())
    one = sum(math.prod(shape) for shape in ((32, 1, 5), (128, 32, 5), (512, 128, 5), (1024, 512, 5), (1024, 1024, 5)))
    extra = 1024 * 3 + sum(2 * width for width in (32, 128, 512, 1024, 1024, 1))
    assert periods == 5 * (one + extra)


@pytest.mark.parametrize(("kind", "right", "wrong"), [("lsgan", 0.0, 2.0), ("hinge", 0.0, 4.0)])
def test_discriminator_loss_is_least_when_it_tells_them_apart(kind: str, right: float, wrong: float) -> None:
    low = 0.0 if kind == "lsgan" else -1.0
    real, made = [judged(1.0), judged(1.0)], [judged(low), judged(low)]
    assert float(discriminator_loss(real, made, kind)) == right  # type: ignore[arg-type]
    assert float(discriminator_loss(made, real, kind)) == wrong  # type: ignore[arg-type]
    assert float(generator_loss(real, kind)) < float(generator_loss(made, kind))  # type: ignore[arg-type]


def test_feature_loss_is_relative_and_teaches_the_generator_alone() -> None:
    real, made = [judged(0.0, 2.0, 10.0)], [judged(0.0, 3.0, 10.0)]
    assert float(feature_loss(real, made)) == pytest.approx((0.5 + 0.0) / 2)
    right, wrong = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    feature_loss([(right, [right])], [(wrong, [wrong])]).backward()
    assert right.grad is None
    assert wrong.grad is not None


def test_nobody_to_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="neither periods nor windows"):
        DiscriminatorConfig(periods=(), windows=())
