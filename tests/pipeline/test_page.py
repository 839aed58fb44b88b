"""The page in a real Chromium: a spoken question from the fake microphone, a frame from the fake camera, an answer."""

from __future__ import annotations

import asyncio
import os
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import NAME, Browser
from live import pcm, room, voiced
from local_server import Server, running

from omni_ray.config.load import load_recipe, save_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NAME is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
    # Raised by ray.serve's own settings classes when the gateway imports them.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]
SHOTS = os.environ.get("OMNI_RAY_SCREENSHOTS")
"""Folder for screenshots, if anybody wants them."""


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page") / tiny_checkpoint.name
    shutil.copytree(tiny_checkpoint, folder)
    recipe = load_recipe(str(folder / "recipe.yaml"))
    serving = recipe.serving.model_dump() | {"turn": recipe.serving.turn.model_dump() | {"detector": "energy"}}
    save_recipe(
        recipe.model_copy(update={"serving": type(recipe.serving).model_validate(serving)}), folder / "recipe.yaml"
    )
    with running(folder) as server:
        yield server


@pytest.fixture
def microphone(tmp_path: Path) -> Path:
    """A second of room, a question of a second and a half, and silence."""
    path = tmp_path / "microphone.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48000)
        sound = [room(1.5, 48000), 2 * voiced(1.5, 48000), room(20.0, 48000)]
        file.writeframes(pcm(np.concatenate(sound)))
    return path


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    """A red picture that moves, as Chromium's fake camera reads it."""
    path = tmp_path / "camera.y4m"
    frames = []
    for number in range(30):
        luma = np.full((240, 320), 60, np.uint8)
        luma[80:160, 10 * number : 10 * number + 60] = 180
        chroma = np.full((2, 120, 160), 128, np.uint8)
        chroma[1, 40:80, 5 * number : 5 * number + 30] = 200
        frames.append(b"FRAME\n" + luma.tobytes() + chroma.tobytes())
    path.write_bytes(b"YUV4MPEG2 W320 H240 F10:1 Ip A1:1 C420jpeg\n" + b"".join(frames))
    return path


def test_a_spoken_question_is_answered_in_words_and_sound(server: Server, microphone: Path, camera: Path) -> None:
    async def main() -> dict[str, Any]:
        browser = Browser(microphone, camera)
        try:
            await browser.open(server.url)
            await browser.run("document.getElementById('camera').checked = true")
            await browser.run("document.getElementById('talk').click()")
            await browser.until("document.querySelector('.turn.mine') !== null")
            await browser.until("(document.querySelector('.turn.theirs p')?.textContent.length ?? 0) > 20")
            await browser.until("live.sources.length > 0 && document.getElementById('latency').dataset.ms > 0")
            await browser.until("/answering|listening/.test(document.getElementById('state').textContent)")
            if SHOTS:
                await browser.screenshot(Path(SHOTS) / "live.png")
            await browser.resize(390, 780)
            wide = await browser.run("document.documentElement.scrollWidth")
            if SHOTS:
                await browser.screenshot(Path(SHOTS) / "live-phone.png")
            (session,) = server.gateway.sessions
            seen = {
                "wide": wide,
                "error": await browser.run("document.getElementById('error').textContent"),
                "camera": session.turns.camera.sparse or session.turns.camera.dense,
                "images": [b.image for item in session.dialogue.conversation.items[:1] for b in item.blocks],
                "frames": await browser.run("document.getElementById('view').videoWidth"),
            }
            await browser.run("document.getElementById('talk').click()")
            return seen
        finally:
            await browser.close()

    seen = asyncio.run(main())
    assert seen["error"] == ""
    assert seen["wide"] <= 390
    assert seen["frames"] == 320
    assert any(seen["images"]), "no frame of the camera stands in the turn"
    assert server.wait_empty() == dict.fromkeys(server.held(), 0)


def test_push_to_talk_and_typed_words_join_the_conversation(server: Server, microphone: Path) -> None:
    async def main() -> int:
        browser = Browser(microphone)
        try:
            await browser.open(server.url)
            await browser.run("document.getElementById('handsfree').checked = false")
            await browser.run("document.getElementById('talk').click()")
            await browser.until("document.getElementById('state').textContent === 'hold the button to speak'")
            await browser.run("hold(true)")
            await asyncio.sleep(1.2)
            await browser.run("hold(false)")
            await browser.until("document.querySelectorAll('.turn.theirs').length === 1 && live.sources.length > 0")
            await browser.run("hold(true)")  # a barge-in
            await browser.until("live.sources.length === 0")
            await asyncio.sleep(0.4)
            await browser.run("hold(false)")
            await browser.until("document.querySelectorAll('.turn.theirs').length === 2 && live.sources.length > 0")
            await browser.run("hold(true)")
            await browser.until("live.sources.length === 0 && !live.answering")
            await browser.run("document.getElementById('text').value = 'which digit'; $('ask').requestSubmit()")
            await browser.until("document.querySelectorAll('.turn.theirs').length === 3")
            assert await browser.run("document.getElementById('error').textContent") == ""
            return int(await browser.run("document.querySelectorAll('.turn.cut').length"))
        finally:
            await browser.close()

    assert asyncio.run(main()) >= 1
