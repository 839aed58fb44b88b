"""A run that is asked while it trains answers as the checkpoint of that moment, and ends with the same bits."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from mini_world import STAGES, differing, mini_recipe, weights

from omni_ray.data.audio import encode_flac
from omni_ray.data.image import encode_png
from omni_ray.inference.omni_model import load_model
from omni_ray.types.errors import ResourceError
from pipelines.training.loop import train

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Raised by ray.serve's own settings classes when they are imported.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

RNG = np.random.default_rng(5)
PICTURE = encode_png(RNG.integers(0, 255, (56, 56, 3), dtype=np.uint8))
SOUND = encode_flac((RNG.standard_normal(16000) * 0.1).astype(np.float32), 16000)
WORDS = "what digit is it"
ASKED_BEFORE = (1, 3)
"""Steps; checkpoints are written after every one."""
SHARES: dict[str, Any] = {
    "language": {"actors": 2, "shard": "zero3"},
    "vision": {"actors": 2, "shard": "hsdp", "recompute": "full"},
}
"""Pools whose ranks let go of each other's weights, and take them in again to answer."""


def patient_view() -> Any:
    """A live view that waits, before chosen steps, until somebody asks."""
    from pipelines.serving.live.view import LiveView

    class Patient(LiveView):
        step = -1
        expecting = threading.Semaphore(0)

        def between(self, settle: Callable[[], None]) -> None:
            self.step += 1
            if self.step in ASKED_BEFORE:
                self.expecting.release()
                end = time.monotonic() + 60
                assert self._stages is not None
                while not self._stages.door.knocking and time.monotonic() < end:
                    time.sleep(0.005)
                assert self._stages.door.knocking
            super().between(settle)

    return Patient(0)


def question() -> dict[str, Any]:
    picture = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    sound = {"data": base64.b64encode(SOUND).decode(), "format": "flac"}
    parts = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "input_audio", "input_audio": sound},
        {"type": "text", "text": WORDS},
    ]
    return {
        "model": "omni-ray",
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": 40,
        "modalities": ["text", "audio"],
        "audio": {"voice": "default", "format": "wav"},
    }


def ask(view: Any, answers: list[Any]) -> None:
    with httpx.Client(base_url=view.url, timeout=120, trust_env=False) as client:
        for _ in ASKED_BEFORE:
            view.expecting.acquire()
            reply = client.post("/v1/chat/completions", json=question())
            answers.append(reply.json() if reply.status_code == 200 else reply.text)


def test_a_look_sees_the_weights_of_the_moment_and_changes_none(base: Path, ray_cluster: None, tmp_path: Path) -> None:
    from pipelines.serving.live.actor import LiveActor

    stages = {"stages": [STAGES[2]], "checkpoint": {"every_steps": 1, "keep": 9}}
    recipe = mini_recipe(base, **stages)
    quiet = train(recipe, tmp_path / "quiet", quiet=True)
    answers: list[Any] = []
    view = patient_view()
    asking = threading.Thread(target=ask, args=(view, answers))
    asking.start()
    seen = train(
        mini_recipe(base, pools=SHARES, **stages), tmp_path / "seen", quiet=True, actor=LiveActor, onlooker=view
    )
    asking.join(60)
    assert quiet.checkpoint is not None
    assert seen.checkpoint is not None
    assert differing(weights(quiet.checkpoint), weights(seen.checkpoint)) == []
    assert len(answers) == view.pauses == len(ASKED_BEFORE)
    for step, answer in zip(ASKED_BEFORE, answers, strict=True):
        model = load_model(tmp_path / "quiet" / "checkpoints" / f"step-{step:07d}")
        messages = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "media": "p"},
                    {"type": "audio", "media": "s"},
                    {"type": "text", "text": WORDS},
                ],
            }
        ]
        wanted = model.generate(messages, media={"p": PICTURE, "s": SOUND}, voice=True, max_tokens=40)
        message = answer["choices"][0]["message"]
        assert message["audio"]["transcript"] == wanted.text.strip()
        assert wanted.wave_S is not None
        pcm = np.frombuffer(base64.b64decode(message["audio"]["data"])[44:], "<i2")
        assert len(pcm) == len(wanted.wave_S)
        assert np.abs(pcm / 32767 - wanted.wave_S.clip(-1, 1)).max() < 2e-4
    with pytest.raises(httpx.ConnectError):
        httpx.get(view.url + "/healthz", trust_env=False)


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    from pipelines.serving.live.view import LiveView

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="port"):
            LiveView(taken.getsockname()[1])
