"""The codec's bench: what it cannot measure it names with the reason, and its judges count as they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omni_ray.types.errors import ConfigError, OmniError
from pipelines.bench import codec_stream_memory, run_bench
from pipelines.bench.codec_tts import NAME, _ratio, tts_figures


class Echo:
    """Hears the words that a clip's first samples number."""

    name = "echo"
    words = ("red", "blue", "one", "two")

    def hear(self, wave_S: np.ndarray, sample_rate_hz: int) -> tuple[str, ...]:
        return tuple(self.words[int(place)] for place in wave_S)


def clip(*places: int) -> tuple[np.ndarray, int]:
    return np.array(places, dtype=np.float32), 24000


def test_without_a_checkpoint_the_ratio_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (figure,) = tts_figures(None)
    assert figure.name == NAME
    assert figure.value is None
    assert figure.not_run.startswith("no trained checkpoint at runs/quickstart/checkpoint; run omni-ray quickstart")


def test_ratio_is_words_of_the_model_over_words_of_the_codec() -> None:
    said = [("red", "one"), ("red", "one"), ("blue", "two")]
    ceiling = [clip(0, 2), clip(0, 2), clip(1, 2)]
    spoken = [clip(0, 2), clip(), clip(0, 3)]
    figure = _ratio(NAME, 0.8, Echo(), spoken, ceiling, said, chance=0.17)
    assert figure.value == pytest.approx(3 / 5)
    assert figure.n == 6
    assert figure.reached is False
    with pytest.raises(OmniError, match="there is no ceiling to stand under"):
        _ratio(NAME, 0.8, Echo(), spoken, [clip()] * 3, said, chance=0.17)


def test_a_checkpoint_for_a_bench_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bench 'balance' measures no checkpoint; leave --checkpoint out"):
        run_bench("balance", checkpoint=tmp_path)


def test_memory_of_a_stream_needs_more_than_its_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        codec_stream_memory.main(["--seconds", "60"])
    assert "stream longer than the 120 s of warm-up" in capsys.readouterr().err
