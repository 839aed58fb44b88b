"""Media of a request: data URIs only, recognised by their bytes, sized before they are decoded."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import soundfile

from omni_ray.config.serving import Limits
from omni_ray.data.image import encode_png
from omni_ray.data.video import encode_mp4
from pipelines.serving.answers import Spoken, Transcripts, sound_bytes
from pipelines.serving.chat_turn import StopFilter
from pipelines.serving.conversation import read_conversation
from pipelines.serving.errors import ApiError
from pipelines.serving.media import audio_bytes, image_bytes, read_base64, sound_form, video_bytes
from pipelines.serving.protocol import check_request

LIMITS = Limits(max_image_pixels=10_000, max_audio_s=2, max_video_frames=8)
WHERE = "messages[0].content[1]"


def uri(raw: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def sound(form: str, seconds: float = 0.5, channels: int = 1, rate_hz: int = 16000) -> bytes:
    wave = np.sin(np.arange(int(seconds * rate_hz)) * 0.1).astype(np.float32)[:, None].repeat(channels, 1) * 0.3
    out = io.BytesIO()
    soundfile.write(out, wave, rate_hz, format=form.upper())
    return out.getvalue()


def png(side: int) -> bytes:
    return encode_png(np.zeros((side, side, 3), np.uint8))


def bomb(side: int) -> bytes:
    """A png whose header promises side x side pixels and whose data hold none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def film(frames: int, side: int = 64) -> bytes:
    return encode_mp4(np.zeros((frames, side, side, 3), np.uint8), fps=8)


def refusal(call: object, *arguments: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert (caught.value.status, caught.value.param) == (400, WHERE)
    assert str(caught.value).startswith(WHERE)
    return caught.value


def test_media_within_the_limits_pass_unchanged() -> None:
    assert image_bytes(uri(png(100)), WHERE, LIMITS) == png(100)
    assert image_bytes(uri(png(9)).replace("data:", "DATA:", 1), WHERE, LIMITS) == png(9)
    for form in ("wav", "flac", "ogg", "mp3"):
        raw = sound(form)
        assert sound_form(raw) == form
        assert audio_bytes(base64.b64encode(raw).decode(), form, WHERE, LIMITS) == raw
    assert video_bytes(uri(film(8), "video/mp4"), WHERE, LIMITS) == film(8)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/a.png", "is a https address; this server fetches nothing"),
        ("http://169.254.169.254/latest", "is a http address; this server fetches nothing"),
        ("file:///etc/passwd", "is a file address; this server fetches nothing"),
        ("FILE:///etc/passwd", "is a file address; this server fetches nothing"),
        ("/etc/passwd", "is no data URI; this server fetches nothing"),
        ("", "is no data URI"),
        ("data:image/png,abc", "is not a base64 data URI"),
        ("data:image/png;base64", "is not a base64 data URI"),
        ("data:text/html;base64,aGk=", "holds text/html, where image/... is due"),
        ("data:image/png;base64,a b=", "is not base64"),
        ("data:image/png;base64,", "is empty"),
        (uri(b"not a picture"), "is not a picture that can be read"),
        (uri(png(101)), "has 101 x 101 pixels, more than 10000; scale it down"),
        (uri(bomb(60_000)), "is too large a picture"),
    ],
)
def test_pictures_that_are_refused(url: str, words: str) -> None:
    assert words in str(refusal(image_bytes, url, WHERE, LIMITS))


def test_sounds_that_are_refused() -> None:
    def words(raw: bytes, form: str) -> str:
        return str(refusal(audio_bytes, base64.b64encode(raw).decode(), form, WHERE, LIMITS))

    assert "says wav, yet its bytes are flac" in words(sound("flac"), "wav")
    assert "says mp3, yet its bytes are none of wav, mp3, flac, ogg" in words(b"#EXTM3U\nfile:///etc/passwd\n", "mp3")
    assert "lasts 2.5 s, more than 2 s; cut it" in words(sound("wav", 2.5), "wav")
    assert "cannot be decoded as sound" in words(b"RIFF\x00\x00\x00\x00WAVEfmt ", "wav")
    assert "holds no samples" in words(sound("wav", 0), "wav")


def test_a_play_list_behind_an_id3_tag_is_no_mp3() -> None:
    tag = b"ID3\x04\x00\x00\x00\x00\x00\x05hello"
    assert sound_form(tag + b"#EXTM3U\nfile:///etc/passwd\n") is None
    assert sound_form(tag + b"\x00" * 7 + sound("mp3")) == "mp3"
    assert sound_form(b"ID3") is None


def test_a_small_file_of_many_channels_is_refused_before_it_unfolds() -> None:
    out = io.BytesIO()
    soundfile.write(out, np.zeros((20 * 192_000, 8), np.int16), 192_000, format="FLAC")
    raw = out.getvalue()
    assert len(raw) < 100_000
    error = refusal(audio_bytes, base64.b64encode(raw).decode(), "flac", WHERE, LIMITS)
    assert "holds 3840000 samples in each of 8 channels" in str(error)


def test_films_that_are_refused() -> None:
    def words(raw: bytes) -> str:
        return str(refusal(video_bytes, uri(raw, "video/mp4"), WHERE, LIMITS))

    assert "has 9 frames, more than 8" in words(film(9))
    assert "frames of 128 x 128 pixels; scale it down" in words(film(2, 128))
    assert "is not a film that can be read" in words(b"#EXTM3U\nfile:///etc/passwd\n")
    assert "cannot be read as video" in words(film(4)[:60])


@pytest.mark.parametrize("text", ["a", "====", "aGk=\n", "aGk=!", "\u00e4"], ids=repr)
def test_garbage_is_no_base64(text: str) -> None:
    assert "is not base64" in str(refusal(read_base64, text, WHERE))


def conversation(*messages: dict[str, object], transcripts: Transcripts | None = None):  # type: ignore[no-untyped-def]
    request = check_request({"messages": list(messages)}, LIMITS)
    return read_conversation(request, LIMITS, transcripts or Transcripts())


def test_a_conversation_names_media_by_the_part_they_came_from() -> None:
    picture = {"type": "image_url", "image_url": {"url": uri(png(20))}}
    found = conversation(
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [picture, {"type": "text", "text": "which digit"}]},
    )
    assert found.media == {"messages[1].content[0]": png(20)}
    assert found.messages == (
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "media": "messages[1].content[0]"},
                {"type": "text", "text": "which digit"},
            ],
        },
    )


def test_an_earlier_spoken_answer_is_named_by_its_id() -> None:
    transcripts = Transcripts()
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "audio": {"id": transcripts.keep("red seven")}},
        {"role": "user", "content": "again"},
    ]
    found = conversation(*turns, transcripts=transcripts)
    assert found.messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "red seven"}]}
    with pytest.raises(ApiError, match=r"^messages\[1\]\.audio\.id is unknown or has expired"):
        conversation(*turns)


def test_turns_that_are_refused() -> None:
    picture = {"type": "image_url", "image_url": {"url": uri(png(20))}}
    with pytest.raises(ApiError, match=r"^messages\[0\]\.content\[0\] is image_url in a turn of role system"):
        conversation({"role": "system", "content": [picture]}, {"role": "user", "content": "hi"})
    with pytest.raises(ApiError, match=r"^messages\[0\] is the assistant's; end with a user's turn"):
        conversation({"role": "assistant", "content": "hi"})
    with pytest.raises(ApiError, match=r"^messages\[0\]\.content is empty"):
        conversation({"role": "user", "content": []})


def test_sound_of_an_answer_as_wav_and_bare() -> None:
    spoken = Spoken(wave_S=np.array([0.0, 0.5, -2.0], np.float32), sample_rate_hz=24000)
    assert np.frombuffer(sound_bytes(spoken, "pcm16"), "<i2").tolist() == [0, 16384, -32768]
    samples, rate_hz = soundfile.read(io.BytesIO(sound_bytes(spoken, "wav")), dtype="int16")
    assert (samples.tolist(), rate_hz) == ([0, 16384, -32768], 24000)


@pytest.mark.parametrize(
    ("pieces", "stops", "said"),
    [
        (["red seven blue"], ["blue", "seven"], ["red ", ""]),
        (["red"], ["blue"], ["red", ""]),
        (["a b", "lu", "e c"], ["blue"], ["a ", "", "", ""]),
        (["a b", "lack"], ["blue"], ["a ", "black", ""]),
        (["xaa", "ab"], ["aab"], ["x", "a", ""]),
        (["x bl"], ["blue"], ["x ", "bl"]),
    ],
)
def test_text_stops_before_the_first_stop_word(pieces: list[str], stops: list[str], said: list[str]) -> None:
    stop = StopFilter(stops)
    assert [*map(stop.push, pieces), stop.flush()] == said
