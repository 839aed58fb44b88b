"""The served endpoint: a real local cluster, real deployments, a real picture and a real recording over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image
from tiny_checkpoint import write_tiny_checkpoint

from omni_ray.data.video import encode_mp4
from omni_ray.types.errors import CheckpointError, ConfigError, ResourceError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Raised by ray.serve's own settings classes when they are imported.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

MOST_IN_FLIGHT = 3
KEY = "a-key-of-enough-characters"
QUESTION = {"type": "text", "text": "which digit is it"}


@pytest.fixture(scope="session")
def served_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    limits = {"max_concurrent": MOST_IN_FLIGHT, "max_body_mib": 2.0, "max_image_pixels": 1_000_000}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("served"), serving={"limits": limits})


@pytest.fixture(scope="session")
def url(ray_cluster: None, served_checkpoint: Path) -> Iterator[str]:
    """One server for all tests of the session, without an API key."""
    from pipelines.serving.app import serve

    with serve(served_checkpoint, port=0, block=False) as served:
        yield served.url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        yield client


def picture(side: int = 64) -> dict[str, Any]:
    """A photograph-like jpeg: a bright square on a dark ground."""
    pixels = np.full((side, side, 3), 30, np.uint8)
    pixels[side // 4 : side // 2, side // 4 : side // 2] = (220, 40, 40)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="JPEG")
    return {"type": "image_url", "image_url": {"url": _uri(out.getvalue(), "image/jpeg")}}


def recording(seconds: float = 0.8, form: str = "wav") -> dict[str, Any]:
    """A tone that rises, 16 bit at 22.05 kHz."""
    time_s = np.arange(int(seconds * 22050)) / 22050
    out = io.BytesIO()
    soundfile.write(out, 0.4 * np.sin(2 * np.pi * (200 + 300 * time_s) * time_s), 22050, format=form.upper())
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(out.getvalue()).decode(), "format": form}}


def film() -> dict[str, Any]:
    """Twelve frames of a square that moves right."""
    frames = np.zeros((12, 64, 64, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[20:40, 4 * number : 4 * number + 16] = 255
    return {"type": "video_url", "video_url": {"url": _uri(encode_mp4(frames, fps=6), "video/mp4")}}


def _uri(raw: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def asked(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 8, **fields}


def answer(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refusal(client: httpx.Client, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


def test_health_models_and_readiness(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    stages = {"vision": True, "audio": True, "language": True, "speech": True}
    assert client.get("/readyz").json() == {"status": "ready", "stages": stages}
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "omni-ray-tiny"
    assert client.get("/v1/models/omni-ray-tiny").json() == card
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert client.get("/nothing/here").json()["error"]["message"] == "there is no such address here"


@pytest.mark.parametrize("media", ["none", "picture", "recording", "film", "all"])
def test_answers_equal_those_of_the_single_process_model(
    client: httpx.Client, served_checkpoint: Path, media: str
) -> None:
    """The deployments hold the same workers: what they answer is what the model in one process answers."""
    from omni_ray.inference.omni_model import load_model

    parts = {"picture": [picture()], "recording": [recording()], "film": [film()], "none": []}
    chosen = parts["picture"] + parts["recording"] + parts["film"] if media == "all" else parts[media]
    body = answer(client, asked(*chosen, QUESTION))
    expected = load_model(served_checkpoint).generate(
        [{"role": "user", "content": [*map(_as_sample_part, chosen), QUESTION]}], max_tokens=8
    )
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == ("stop" if expected.finished else "length")
    usage = body["usage"]
    assert usage["completion_tokens"] == len(expected.ids_R5)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    details = usage["prompt_tokens_details"]
    assert (details["image_tokens"] > 0, details["audio_tokens"] > 0) == (
        media in ("picture", "film", "all"),
        media in ("recording", "all"),
    )


def _as_sample_part(part: dict[str, Any]) -> dict[str, Any]:
    kind = {"image_url": "image", "input_audio": "audio", "video_url": "video"}[part["type"]]
    payload = part[part["type"]].get("data") or part[part["type"]]["url"].partition(",")[2]
    return {"type": kind, "media": base64.b64decode(payload)}


def test_an_answer_in_speech_is_a_wav_and_may_be_named_later(client: httpx.Client, served_checkpoint: Path) -> None:
    from omni_ray.inference.omni_model import load_model

    spoken = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}, "max_tokens": 12}
    body = answer(client, asked(recording(), QUESTION, **spoken))
    message = body["choices"][0]["message"]
    assert message["content"] is None
    samples, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(message["audio"]["data"])))
    expected = load_model(served_checkpoint).generate(
        [{"role": "user", "content": [_as_sample_part(recording()), QUESTION]}], voice=True, max_tokens=12
    )
    assert expected.wave_S is not None
    assert rate_hz == 24000
    assert np.abs(samples - np.clip(expected.wave_S, -1, 1)).max() <= 2 / 32767
    assert message["audio"]["transcript"] == expected.text
    assert body["usage"]["completion_tokens_details"]["audio_tokens"] > 0

    bare = answer(client, asked(recording(), QUESTION, **spoken | {"audio": {"format": "pcm16"}}))
    assert len(base64.b64decode(bare["choices"][0]["message"]["audio"]["data"])) == 2 * len(samples)

    earlier = {"role": "assistant", "audio": {"id": message["audio"]["id"]}}
    turns = [{"role": "user", "content": "say it"}, earlier, {"role": "user", "content": "again"}]
    assert answer(client, {"messages": turns, "max_tokens": 2})["usage"]["completion_tokens"] <= 2
    turns[1] = {"role": "assistant", "audio": {"id": "audio_0"}}
    assert refusal(client, {"messages": turns})["param"] == "messages[1].audio.id"


def test_draws_follow_the_seed(client: httpx.Client) -> None:
    def said(**fields: Any) -> str:
        return str(answer(client, asked(QUESTION, temperature=1.5, **fields))["choices"][0]["message"]["content"])

    assert said(seed=1) == said(seed=1)
    assert len({said(seed=seed) for seed in range(4)} | {said() for _ in range(2)}) > 1


def test_a_stop_word_ends_the_text(client: httpx.Client) -> None:
    whole = answer(client, asked(QUESTION, max_tokens=16))["choices"][0]["message"]["content"]
    word = next(c for c in whole[1:] if c not in whole[:1])
    body = answer(client, asked(QUESTION, max_tokens=16, stop=word))
    assert body["choices"][0]["message"]["content"] == whole[: whole.index(word)].rstrip()
    assert body["choices"][0]["finish_reason"] == "stop"


async def _push_to_talk(url: str) -> list[Any]:
    """Events of one spoken question, from the official client."""
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    from live import pcm, room, voiced

    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    async with client.realtime.connect(model="any") as connection:
        events = [await connection.recv()]
        audio = {"input": {"turn_detection": None}}
        await connection.session.update(session={"type": "realtime", "max_output_tokens": 14, "audio": audio})
        raw = pcm(np.concatenate([voiced(2.3), room(0.2)]))
        for start in range(0, len(raw), 4800):
            sound = base64.b64encode(raw[start : start + 4800]).decode()
            await connection.input_audio_buffer.append(audio=sound)
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        async for event in connection:
            events.append(event)
            if event.type in ("response.done", "error"):
                break
    return events


def test_a_live_conversation_over_the_deployments(url: str) -> None:
    """Sound in, answer out, through Serve's proxy and the stages' own replicas; all is freed afterwards."""
    from live import check_ga
    from ray import serve as ray_serve

    events = asyncio.run(_push_to_talk(url))
    for event in events:
        check_ga(event.to_dict())
    kinds = [event.type for event in events]
    assert kinds[-1] == "response.done"
    assert events[-1].response.usage.output_tokens == 14
    assert events[-1].response.usage.input_token_details.cached_tokens > 20, "packets were prefilled before the commit"
    sound = b"".join(base64.b64decode(event.delta) for event in events if event.type == "response.output_audio.delta")
    assert len(sound) == 2 * 1440 * 13
    for name in ("audio", "language", "speech"):
        handle = ray_serve.get_deployment_handle(name, "omni-ray")
        end = time.monotonic() + 10
        while handle.held.remote().result() and time.monotonic() < end:
            time.sleep(0.05)
        assert handle.held.remote().result() == 0


def test_media_that_cannot_be_read_name_their_part(client: httpx.Client) -> None:
    def param(*parts: Any) -> tuple[str, str]:
        error = refusal(client, asked(*parts))
        return error["param"], error["message"]

    cut = recording(form="flac")
    cut["input_audio"]["data"] = cut["input_audio"]["data"][:400]
    assert param(QUESTION, cut)[0] == "messages[0].content[1]"
    broken = picture()
    broken["image_url"]["url"] = broken["image_url"]["url"][:-100]
    where, words = param(picture(), QUESTION, broken)
    assert where == "messages[0].content[2]"
    assert words.startswith("messages[0].content[2] cannot be decoded as a picture")
    where, words = param({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}})
    assert (where, "fetches nothing" in words) == ("messages[0].content[0]", True)
    assert "more than 1000000; scale it down" in param(picture(1001))[1]


def test_requests_that_are_refused(client: httpx.Client) -> None:
    assert refusal(client, asked(QUESTION, max_tokens=5000))["param"] == "max_tokens"
    many = asked({"type": "text", "text": "one two three " * 2000})
    assert refusal(client, many)["code"] == "context_length_exceeded"
    large = client.post("/v1/chat/completions", json=asked({"type": "text", "text": "x" * 3_000_000}))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
    pieces = client.post(
        "/v1/chat/completions",
        content=(b"x" * 500_000 for _ in range(6)),
        headers={"content-type": "application/json"},
    )
    assert (pieces.status_code, pieces.json()["error"]["code"]) == (413, "request_too_large")
    plain = client.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    other = client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert other.status_code == 403
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_one_request_too_many_is_refused_at_once(client: httpx.Client) -> None:
    """Some of a crowd are answered, the others get 429 with Retry-After; afterwards the server answers as before."""
    crowd = 8 * MOST_IN_FLIGHT
    together = threading.Barrier(crowd)

    def one(_: int) -> httpx.Response:
        together.wait()
        return httpx.post(f"{client.base_url}/v1/chat/completions", json=body, timeout=120, trust_env=False)

    body = asked(picture(), QUESTION, max_tokens=200)
    with ThreadPoolExecutor(crowd) as threads:
        replies = list(threads.map(one, range(crowd)))
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 429}
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    texts = {reply.json()["choices"][0]["message"]["content"] for reply in replies if reply.status_code == 200}
    assert len(texts) == 1, "an answer must not depend on who shares its batch"
    assert client.get("/readyz").status_code == 200


def test_the_page_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    script, style = client.get("/page/page.js"), client.get("/page/page.css")
    assert (script.status_code, style.status_code) == (200, 200)
    assert "http" not in page.text.replace("charset", "")
    assert "://" not in script.text
    assert "url(" not in style.text
    assert client.get("/page/../app.py").status_code == 404
    assert client.get("/page/%2e%2e%2fapp.py").status_code == 404


def test_what_cannot_be_served_is_one_clear_sentence(tmp_path: Path, served_checkpoint: Path) -> None:
    from pipelines.serving.app import app, serve

    with pytest.raises(CheckpointError, match=r"is not a whole checkpoint"):
        serve(tmp_path, block=False)
    with pytest.raises(ConfigError, match=r"^argument checkpoint of the application: field required; arguments are"):
        app({"chekpoint": str(served_checkpoint)})
    with pytest.raises(ConfigError, match=r"^host 0.0.0.0 is reachable by other machines"):
        serve(served_checkpoint, host="0.0.0.0", block=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"^port {port} on 127.0.0.1 cannot be used"):
            serve(served_checkpoint, port=port, block=False)


def test_replicas_and_hardware_come_from_the_recipe() -> None:
    from ray.serve import deployment

    from omni_ray.config.serving import ServePool
    from pipelines.serving.replicas import VisionReplica, options

    hardware = {"cpu": 1, "gpu": 0, "custom": {"vision_gpu": 1}}
    fixed = deployment(**options(ServePool.model_validate({"replicas": 2, "resources": hardware})))(VisionReplica)
    assert fixed.num_replicas == 2
    assert fixed.ray_actor_options == {"num_cpus": 1, "num_gpus": 0, "resources": {"vision_gpu": 1}}
    scaled = deployment(**options(ServePool(replicas=2, max_replicas=5)))(VisionReplica)
    config = scaled._deployment_config.autoscaling_config
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (2, 2, 5)


STRANGER = """
import sys
from pathlib import Path
import httpx
from pipelines.serving.app import serve

with serve(Path(sys.argv[1]), port=0, api_key_file=Path(sys.argv[2]), block=False) as served:
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        ready = client.get("/readyz", headers={"authorization": f"Bearer {sys.argv[3]}"})
        print([client.get("/healthz").status_code, client.get("/v1/models").status_code, ready.status_code])
"""


@pytest.mark.full
def test_replicas_import_this_distribution_from_a_folder_with_its_own_pipelines(
    tmp_path: Path, served_checkpoint: Path
) -> None:
    """A server started beside a user's ``pipelines.py`` holds our classes; a key guards all but /healthz."""
    work, script, key = tmp_path / "work", tmp_path / "scripts" / "driver.py", tmp_path / "key"
    work.mkdir()
    script.parent.mkdir()
    for name in ("pipelines.py", "actors.py", "omni_ray.py"):
        (work / name).write_text("raise RuntimeError('the wrong module')\n")
    script.write_text(textwrap.dedent(STRANGER))
    key.write_text(KEY + "\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(script), str(served_checkpoint), str(key), KEY],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[200, 401, 200]"
