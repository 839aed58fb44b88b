"""STOI against values of its authors' definition, and its bounds; PESQ says what is missing."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from omni_ray.evaluation.signals import pesq, stoi
from omni_ray.types.errors import DataError


def voiced(seconds: float = 2.0) -> np.ndarray:
    """A tone of 300 Hz that swells three times a second and is off for a part of the time; 10 kHz."""
    chance = np.random.default_rng(0)
    time = np.arange(round(seconds * 10000)) / 10000
    swell = np.sin(2 * np.pi * 300 * time) * (1 + np.sin(2 * np.pi * 3 * time)) * 0.3
    on = np.sin(2 * np.pi * 0.7 * time) > -0.5
    return (swell * on + 0.01 * chance.normal(size=len(time))).astype(np.float32)


def noisy(clean: np.ndarray, share: float) -> np.ndarray:
    return (clean + share * np.random.default_rng(1).normal(size=len(clean))).astype(np.float32)


@pytest.mark.parametrize(("share", "expected"), [(0.05, 0.310924857121), (0.3, 0.212729172883)])
def test_stoi_is_that_of_its_reference_program(share: float, expected: float) -> None:
    """``expected``: pystoi 0.4.1 on the same samples at 10 kHz, where neither resamples."""
    clean = voiced()
    assert stoi(clean, noisy(clean, share), 10000) == pytest.approx(expected, abs=1e-9)


def test_stoi_is_one_for_equal_sound_whatever_its_loudness() -> None:
    clean = voiced()
    assert stoi(clean, 0.2 * clean, 10000) == pytest.approx(1.0, abs=1e-6)
    assert stoi(clean, clean[:-77], 10000) == pytest.approx(1.0, abs=1e-6), "the longer one is cut"


@pytest.mark.parametrize("samples", [0, 200, 3000], ids="{}-samples".format)
def test_stoi_is_not_defined_on_less_than_thirty_loud_frames(samples: int) -> None:
    clean = voiced()[:samples]
    assert stoi(clean, clean, 10000) is None


def test_pesq_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any, **keys: Any) -> Any:
        if name == "pesq":
            raise ImportError(name)
        return real(name, *more, **keys)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pesq is not installed.*pip install pesq"):
        pesq(voiced(), voiced(), 10000)
