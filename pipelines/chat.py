"""Talk to a checkpoint in this process: one question, or a conversation at the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.types.errors import DataError, MediaError, OmniError, RequestError

if TYPE_CHECKING:
    from omni_ray.config.model import OmniConfig
    from omni_ray.inference.omni_model import OmniModel
    from omni_ray.inference.prompt import Answer

KINDS = ("image", "video", "audio")
"""Media of a turn, in the order in which the model reads them; the words come last."""
HELP = "/image PATH, /video PATH, /audio PATH go with your next line; /new forgets; /quit or end of input leaves"


def chat(
    checkpoint: Path,
    *,
    text: str | None = None,
    image: Path | None = None,
    audio: Path | None = None,
    video: Path | None = None,
    speak: Path | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Ask one question.

    Args:
        checkpoint: Folder of a whole checkpoint.  text, image, audio, video: The question, in any combination.
        speak: Answer aloud as well, into this wav (24 kHz, 16 bit).
        max_tokens: Most rows of the answer.  temperature: 0 takes the likeliest; above, draws by ``seed``.
    Returns:
        The words of the answer.
    Raises:
        RequestError: nothing was asked.  MediaError: a file is missing or cannot be read.
        CheckpointError: not a whole checkpoint.  DataError: ``speak`` cannot be written, or the answer has no sound.
    """
    given = {"image": image, "video": video, "audio": audio}
    message, media = read_turn(text, {kind: path for kind, path in given.items() if path is not None})
    check_media(message, media, networks_of(checkpoint))
    model = _load(checkpoint)
    answer = model.generate(
        [message],
        media=media,
        voice=speak is not None,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    if speak is not None:
        write_speech(answer, speak)
    return str(answer.text)


def converse(
    checkpoint: Path,
    *,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = print,
    speak: Path | None = None,
    max_tokens: int = 64,
) -> None:
    """A conversation at the terminal, until the end of input; what was said before stays in mind.

    Args:
        read: Prompts and reads a line.  write: Shows a line.
        speak: Answer aloud, each answer over the last, in this wav.
    """
    networks = networks_of(checkpoint)
    model = _load(checkpoint)
    talk = _Talk(networks)
    write(HELP)
    while True:
        try:
            line = read("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        try:
            if not talk.take(line):
                continue
            answer = model.generate(talk.messages, media=talk.media, voice=speak is not None, max_tokens=max_tokens)
            talk.heard(answer.text)
            write(f"model: {answer.text}")
            if speak is not None:
                write_speech(answer, speak)
        except OmniError as error:
            talk.forget_turn()
            write(str(error))


class _Talk:
    """The turns so far, and media that wait for the next line."""

    def __init__(self, networks: OmniConfig) -> None:
        self._networks = networks
        self.messages: list[Mapping[str, Any]] = []
        self.media: dict[str, bytes] = {}
        self._waiting: dict[str, Path] = {}

    def take(self, line: str) -> bool:
        """Read a line; True when it completes a turn."""
        command, _, rest = line.partition(" ")
        if command == "/new":
            self.messages, self.media, self._waiting = [], {}, {}
            return False
        if command.startswith("/"):
            if command[1:] not in KINDS or not rest.strip():
                raise RequestError(f"there is no command {line!r}; {HELP}")
            path = Path(rest.strip()).expanduser()
            read_media(path)
            self._waiting[command[1:]] = path
            return False
        if not line and not self._waiting:
            return False
        waiting, self._waiting = self._waiting, {}
        message, media = read_turn(line or None, waiting, prefix=f"turn{len(self.messages)}/")
        check_media(message, media, self._networks)
        self.messages.append(message)
        self.media |= media
        return True

    def heard(self, words: str) -> None:
        """Keep the model's turn."""
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": words}]})

    def forget_turn(self) -> None:
        """Take back a turn that got no answer."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()


def read_turn(
    text: str | None, files: Mapping[str, Path], prefix: str = ""
) -> tuple[Mapping[str, Any], dict[str, bytes]]:
    """A user's message and its media bytes by name.

    Raises:
        RequestError: neither words nor files.  MediaError: a file cannot be read.
    """
    content: list[dict[str, str]] = []
    media: dict[str, bytes] = {}
    for kind in KINDS:
        if kind in files:
            name = f"{prefix}{files[kind].name}"
            media[name] = read_media(files[kind])
            content.append({"type": kind, "media": name})
    if text:
        content.append({"type": "text", "text": text})
    if not content:
        raise RequestError("nothing was asked; give --text, --image, --audio or --video")
    return {"role": "user", "content": content}, media


def read_media(path: Path) -> bytes:
    """Bytes of a file that the user named.

    Raises:
        MediaError: it is missing, empty or cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MediaError(f"{path} cannot be read ({error.strerror}); name a picture, sound or film") from error
    if not raw:
        raise MediaError(f"{path} is empty; name a picture, sound or film")
    return raw


def check_media(message: Mapping[str, Any], media: Mapping[str, bytes], networks: OmniConfig) -> None:
    """Read the headers of a turn's media, so that a bad file is refused before a network is loaded.

    Raises:
        MediaError: names the file.
    """
    from omni_ray.data.audio import count_samples
    from omni_ray.data.image import decode_image
    from omni_ray.data.video import plan_video

    for part in message["content"]:
        name = part.get("media", "")
        if part["type"] == "image":
            decode_image(media[name], name)
        elif part["type"] == "video":
            plan_video(media[name], name, networks.vision)
        elif part["type"] == "audio":
            count_samples(media[name], name, networks.audio.sample_rate_hz)


def networks_of(checkpoint: Path) -> OmniConfig:
    """Sizes of a checkpoint's networks.

    Raises:
        CheckpointError: not a whole checkpoint.
    """
    from omni_ray.checkpoint.store import check_whole
    from omni_ray.config.load import load_recipe

    check_whole(checkpoint)
    return load_recipe(str(checkpoint / "recipe.yaml")).networks


def write_speech(answer: Answer, path: Path) -> None:
    """Write the sound of an answer.

    Raises:
        DataError: the answer has no sound, or the file cannot be written.
    """
    if answer.wave_S is None or not answer.wave_S.size:
        raise DataError(f"the model said nothing, so {path} was not written; ask for more tokens or train it longer")
    try:
        path.write_bytes(wav_bytes(answer.wave_S, answer.sample_rate_hz))
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); name a file in a folder of yours") from error


def wav_bytes(wave_S: NDArray[np.float32], sample_rate_hz: int) -> bytes:
    """16-bit mono wav."""
    import soundfile

    out = io.BytesIO()
    pcm = np.clip(np.round(wave_S * 32767.0), -32768, 32767).astype(np.int16)
    soundfile.write(out, pcm, sample_rate_hz, format="WAV", subtype="PCM_16")
    return out.getvalue()


def _load(checkpoint: Path) -> OmniModel:
    from omni_ray.inference.omni_model import load_model

    return load_model(checkpoint)
