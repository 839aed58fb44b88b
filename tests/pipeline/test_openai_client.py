"""The official client, unchanged, against the surface in one process: chat, streams, audio, live conversations."""

from __future__ import annotations

import asyncio
import base64
import io
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from live import pcm, room, voiced
from local_server import Server, running

from omni_ray.config.load import load_recipe, save_recipe

openai = pytest.importorskip("openai", reason="the openai package is not installed")

pytestmark = [
    pytest.mark.slow,
    # Raised by ray.serve's own settings classes when the gateway imports them.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]
SHORT = {"type": "realtime", "max_output_tokens": 14}
ASKED: Any = [{"role": "user", "content": "which digit is it"}]


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Energy detector: the same turns on every machine; two live conversations at most."""
    import shutil

    folder = tmp_path_factory.mktemp("live") / tiny_checkpoint.name
    shutil.copytree(tiny_checkpoint, folder)
    recipe = load_recipe(str(folder / "recipe.yaml"))
    serving = recipe.serving.model_dump() | {
        "turn": recipe.serving.turn.model_dump() | {"detector": "energy"},
        "limits": recipe.serving.limits.model_dump() | {"max_sessions": 2, "idle_s": 2.0, "max_tokens": 120},
    }
    save_recipe(
        recipe.model_copy(update={"serving": type(recipe.serving).model_validate(serving)}), folder / "recipe.yaml"
    )
    with running(folder) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    assert server.wait_empty() == dict.fromkeys(server.held(), 0)


@pytest.fixture
def live(server: Server) -> Any:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def recording(seconds: float = 1.0) -> io.BytesIO:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(24000)
        file.writeframes(pcm(voiced(seconds)))
    out.seek(0)
    out.name = "question.wav"
    return out


def test_a_streamed_answer_is_the_whole_one(client: Any) -> None:
    wanted = {"model": "any", "messages": ASKED, "max_tokens": 12, "seed": 3, "temperature": 1.0}
    whole = client.chat.completions.create(**wanted, logprobs=True, top_logprobs=2)
    parts = list(client.chat.completions.create(**wanted, stream=True, stream_options={"include_usage": True}))
    said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert said.strip() == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage
    assert all(part.usage is None for part in parts[:-1])
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    found = whole.choices[0].logprobs.content
    assert 1 <= len(found) <= whole.usage.completion_tokens
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 2 for one in found)
    assert all(one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob for one in found)


def test_a_stop_word_is_never_streamed_in_part(client: Any) -> None:
    whole = client.chat.completions.create(model="any", messages=ASKED, max_tokens=24).choices[0].message.content
    middle = len(whole) // 2
    stop = whole[middle : middle + 5]
    parts = client.chat.completions.create(model="any", messages=ASKED, max_tokens=24, stop=[stop], stream=True)
    found = [part.choices[0] for part in parts]
    said = "".join(choice.delta.content or "" for choice in found)
    assert said.strip() == whole[: whole.index(stop)].strip()
    assert found[-1].finish_reason == "stop"


def test_a_streamed_spoken_answer_is_the_whole_one(client: Any) -> None:
    wanted: Any = {"model": "any", "messages": ASKED, "max_tokens": 12, "modalities": ["text", "audio"]}
    voice: Any = {"voice": "alloy", "format": "pcm16"}
    whole = client.chat.completions.create(**wanted, audio=voice).choices[0].message.audio
    sound, words = b"", ""
    for part in client.chat.completions.create(**wanted, audio=voice, stream=True):
        audio = part.choices[0].delta.audio
        if audio is not None:
            sound += base64.b64decode(audio.data or "")
            words += audio.transcript or ""
    assert sound == base64.b64decode(whole.data)
    assert words.strip() == whole.transcript
    with pytest.raises(openai.BadRequestError, match="comes as pcm16"):
        client.chat.completions.create(**wanted, audio={"voice": "alloy", "format": "wav"}, stream=True)


def test_a_client_that_goes_ends_its_answer(client: Any, server: Server) -> None:
    stream = client.chat.completions.create(model="any", messages=ASKED, max_tokens=120, stream=True)
    next(iter(stream))
    stream.close()
    assert server.wait_empty() == dict.fromkeys(server.held(), 0)


def test_speech_and_transcriptions(client: Any) -> None:
    for form, rate in (("wav", 24000), ("mp3", 24000), ("opus", 24000)):
        raw = client.audio.speech.create(model="any", voice="alloy", input="two", response_format=form).content
        assert soundfile.info(io.BytesIO(raw)).samplerate == rate
    with client.audio.speech.with_streaming_response.create(
        model="any", voice="alloy", input="two", response_format="pcm"
    ) as stream:
        assert sum(map(len, stream.iter_bytes())) % 2880 == 0
    written = client.audio.transcriptions.create(model="any", file=recording())
    assert written.usage.type == "tokens"
    verbose = client.audio.transcriptions.create(model="any", file=recording(), response_format="verbose_json")
    assert (verbose.text, verbose.duration) == (written.text, 1.0)
    events = list(client.audio.transcriptions.create(model="any", file=recording(), stream=True))
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == written.text
    with pytest.raises(openai.BadRequestError, match="none of wav, mp3, flac, ogg"):
        client.audio.transcriptions.create(model="any", file=io.BytesIO(b"RIFFxxxx"))
    with pytest.raises(openai.BadRequestError):
        client.audio.speech.create(model="any", voice="alloy", input="x" * 5000)


def test_a_live_conversation(client: Any, live: Any, server: Server) -> None:
    """Two spoken turns, an interruption, a truncation, and a reconnection with the history as items."""

    async def main() -> list[str]:
        kinds: list[str] = []
        async with live.realtime.connect(model="any") as connection:
            assert (await connection.recv()).type == "session.created"
            await connection.session.update(session=SHORT)  # type: ignore[arg-type]
            await _say(connection, room(0.4), voiced(1.2), room(0.8))
            item = None
            async for event in connection:
                kinds.append(event.type)
                if event.type == "response.output_item.added":
                    item = event.item.id
                if event.type == "response.done":
                    assert event.response.usage.output_tokens == 14
                    break
            await connection.conversation.item.truncate(item_id=item or "", content_index=0, audio_end_ms=200)
            await connection.response.cancel()
            await connection.conversation.item.retrieve(item_id=item or "")
            async for event in connection:
                kinds.append(event.type)
                if event.type == "conversation.item.retrieved":
                    break
        async with live.realtime.connect(model="any") as connection:
            told: Any = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "seven"}]}
            await connection.conversation.item.create(item=told)
            await connection.response.create(response={"output_modalities": ["text"], "max_output_tokens": 4})
            async for event in connection:
                kinds.append(event.type)
                if event.type == "response.done":
                    break
        return kinds

    kinds = asyncio.run(main())
    assert "error" not in kinds
    assert "conversation.item.truncated" in kinds
    assert kinds.count("response.done") == 2


def test_the_conversation_beyond_the_limit_is_refused_with_a_reason(client: Any, live: Any, server: Server) -> None:
    async def main() -> tuple[str, int]:
        async with live.realtime.connect(model="a") as one, live.realtime.connect(model="b") as two:
            await one.recv()
            await two.recv()
            async with live.realtime.connect(model="c") as three:
                error = await three.recv()
                with pytest.raises(Exception, match="1013") as closed:
                    await three.recv()
                return error.error.code, closed.value.rcvd.code

    assert asyncio.run(main()) == ("session_limit_exceeded", 1013)
    assert (
        b'omni_ray_sessions_refused_total{reason="session_limit_exceeded"} 1.0'
        in httpx.get(f"{server.url}/metrics").content
    )


def test_frames_that_are_no_text_and_silence(server: Server) -> None:
    """A binary frame is an error event; a client that sends nothing is closed after its idle time."""
    import websockets

    async def main() -> tuple[str, int, float]:
        url = server.url.replace("http", "ws") + "/v1/realtime"
        async with websockets.connect(url, subprotocols=["realtime"]) as socket:  # type: ignore[list-item]
            assert socket.subprotocol == "realtime"
            await socket.recv()
            await socket.send(b"\x00\x01")
            error = await socket.recv()
            loop = asyncio.get_running_loop()
            began = loop.time()
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None
            return str(error), closed.value.rcvd.code, loop.time() - began

    error, code, waited_s = asyncio.run(main())
    assert '"code":"invalid_json"' in error
    assert code == 1000
    assert waited_s >= 1.5


def test_a_client_that_vanishes_leaves_nothing(server: Server) -> None:
    import websockets

    async def main() -> None:
        url = server.url.replace("http", "ws") + "/v1/realtime"
        for seconds in (0.0, 0.4, 1.2, 2.2):
            socket = await websockets.connect(url)
            raw = pcm(np.concatenate([room(0.3), voiced(1.4), room(0.7)]))[: int(48000 * seconds) or 2]
            await socket.recv()
            for start in range(0, len(raw), 4800):
                audio = base64.b64encode(raw[start : start + 4800]).decode()
                await socket.send(f'{{"type":"input_audio_buffer.append","audio":"{audio}"}}')
            socket.transport.abort()

    asyncio.run(main())
    assert server.wait_empty() == dict.fromkeys(server.held(), 0)


def test_the_document_describes_the_surface(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert set(document["paths"]) == {
        "/healthz",
        "/readyz",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/chat/completions",
        "/v1/audio/speech",
        "/v1/audio/transcriptions",
    }
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in body["required"]
    assert "$ref" not in str(body)


async def _say(connection: Any, *waves: np.ndarray) -> None:
    raw = pcm(np.concatenate(waves))
    for start in range(0, len(raw), 4800):
        await connection.input_audio_buffer.append(audio=base64.b64encode(raw[start : start + 4800]).decode())
        await asyncio.sleep(0.002)
