"""Voices: the assistant's one, many synthetic ones, and people."""

from __future__ import annotations

import ctypes
import functools
import io
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omni_ray.data.tiny_world.words import DIGITS
from omni_ray.types.errors import DataError

Wave = NDArray[np.float32]
"""Mono samples in -1..1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """One synthetic speaker."""

    engine: Literal["hibari", "espeak"]
    """``hibari``: neural, one voice in the package. ``espeak``: formant synthesis, many variants."""
    name: str
    """Voice of the engine, for espeak ``LANGUAGE+VARIANT``."""
    words_per_minute: int = 160
    """Pace (espeak only; the assistant has one pace)."""
    pitch: int = 50
    """Base pitch 0..99 (espeak only)."""


ASSISTANT_VOICE = Voice(engine="hibari", name="heart")
"""The assistant's one voice."""

# Variants that sound like a person and give the same bytes every time; robots and whisperers are left out.
_TRAIN_VARIANTS = (
    "Alex Andrea Andy Annie Diogo Gene Gene2 Henrique Jacky Lee Marco Mario Michael Mike Nguyen "
    "RicishayMax RicishayMax3 anika announcer antonio aunty belinda benjamin boris david ed edward edward2 "
    "f1 f2 f3 f5 grandma grandpa gustave ian iven iven2 iven3 john kaukovalta klatt klatt2 klatt4 "
    "m1 m2 m3 m4 m6 m8 marcelo max michel miguel mike2 pablo pedro rob robert sandro steph steph2 steph3 travis"
)
_HELD_OUT_VARIANTS = "Alicia Denis Hugo adam f4 iven4 linda m5 m7 norbert paul quincy shelby victor zac"
_ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-us", "en-gb-scotland")


def _voices(variants: str, first: int) -> tuple[Voice, ...]:
    """Accent, pace and pitch go round by the variant's place, so that a list is the same everywhere."""
    return tuple(
        Voice(
            engine="espeak",
            name=f"{_ACCENTS[i % len(_ACCENTS)]}+{variant}",
            words_per_minute=115 + 12 * (i * 7 % 5),
            pitch=38 + 4 * (i * 5 % 7),
        )
        for i, variant in enumerate(variants.split(), start=first)
    )


TRAIN_VOICES = _voices(_TRAIN_VARIANTS, 0)
"""Synthetic speakers heard in training."""
HELD_OUT_VOICES = _voices(_HELD_OUT_VARIANTS, 3)
"""Synthetic speakers never heard in training."""


def speak(text: str, voice: Voice = ASSISTANT_VOICE, seed: int = 0) -> tuple[Wave, int]:
    """Say a text.

    Returns:
        (mono samples in -1..1, sample rate in Hz: 24000 for hibari, 22050 for espeak); equal arguments, equal bytes.
    Raises:
        DataError: the engine's package is missing or the voice is unknown.
    """
    waves, rate = speak_all([text], voice, seed)
    return waves[0], rate


def speak_all(texts: Sequence[str], voice: Voice = ASSISTANT_VOICE, seed: int = 0) -> tuple[list[Wave], int]:
    """Say several texts with one voice; equal lists give equal bytes, and espeak starts once instead of each time."""
    if voice.engine == "hibari":
        tts = _hibari()
        return [tts(text, seed=seed) for text in texts], 24000
    return _espeak(texts, voice)


def trim(wave: Wave, rate: int, margin_s: float = 0.06) -> Wave:
    """Cut the silence before and after (below 1 % of the peak), a margin left."""
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max(initial=0.0))
    if loud.size == 0:
        return wave
    margin = round(margin_s * rate)
    return wave[max(0, int(loud[0]) - margin) : int(loud[-1]) + 1 + margin]


@functools.cache
def _hibari() -> Any:
    try:
        from hibari import Hibari
    except ImportError as error:
        raise DataError(
            "hibari-tts is not installed, yet the assistant speaks with it; pip install 'omni-ray[tiny-world]'"
        ) from error
    # "heart" is the one voice inside the wheel: no other name is ever asked for, so nothing is fetched.
    return Hibari(voice=ASSISTANT_VOICE.name, threads=1)


_ESPEAK_SYNCHRONOUS, _ESPEAK_DONT_EXIT, _ESPEAK_UTF8 = 2, 0x8000, 1
_ESPEAK_RATE, _ESPEAK_PITCH = 1, 3


def _espeak(texts: Sequence[str], voice: Voice) -> tuple[list[Wave], int]:
    # The library keeps its place in a flutter table between phrases, even over a restart. It is loaded afresh for
    # each list, so that a phrase does not depend on what was said before the list.
    import _ctypes

    try:
        import espeakng_loader
    except ImportError as error:
        raise DataError(
            "espeakng-loader is not installed, yet synthetic speakers come from it; pip install 'omni-ray[tiny-world]'"
        ) from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        rate = _espeak_start(library, str(Path(espeakng_loader.get_data_path()).parent), voice)
        waves = [_espeak_say(library, text, voice) for text in texts]
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)
    return waves, rate


def _espeak_start(library: ctypes.CDLL, data: str, voice: Voice) -> int:
    rate = int(library.espeak_Initialize(_ESPEAK_SYNCHRONOUS, 0, data.encode(), _ESPEAK_DONT_EXIT))
    if rate <= 0:
        raise DataError(f"espeak cannot start with the data in {data}; reinstall espeakng-loader")
    variant = voice.name.partition("+")[2]
    known = Path(data) / "espeak-ng-data" / "voices" / "!v" / variant  # espeak itself passes over unknown variants
    if not known.exists() or library.espeak_SetVoiceByName(voice.name.encode()):
        raise DataError(f"espeak has no voice {voice.name!r}; choose LANGUAGE+VARIANT of its data folder")
    library.espeak_SetParameter(_ESPEAK_RATE, voice.words_per_minute, 0)
    library.espeak_SetParameter(_ESPEAK_PITCH, voice.pitch, 0)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    return rate


def _espeak_say(library: ctypes.CDLL, text: str, voice: Voice) -> Wave:
    pieces: list[NDArray[np.int16]] = []

    def keep(samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    callback = prototype(keep)
    library.espeak_SetSynthCallback(callback)
    raw = text.encode()
    library.espeak_Synth(raw, ctypes.c_size_t(len(raw) + 1), 0, 1, 0, _ESPEAK_UTF8, None, None)
    library.espeak_Synchronize()
    if not pieces:
        raise DataError(f"espeak said nothing for {text!r} with voice {voice.name!r}")
    return np.concatenate(pieces).astype(np.float32) / 32768.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """One word of one person."""

    digit: int
    """What was said."""
    speaker: str
    """Who said it."""
    take: int
    """Which of the person's repetitions."""
    wave: Wave
    """Mono samples in -1..1."""
    rate: int
    """Samples per second."""

    @property
    def id(self) -> str:
        """``7_george_12``: the name of the recording."""
        return f"{self.digit}_{self.speaker}_{self.take}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HumanDigits:
    """Recordings of people, split by speaker."""

    train: tuple[Utterance, ...]
    """Speakers of training, ordered by (speaker, digit, take)."""
    held_out: tuple[Utterance, ...]
    """The held-out speaker's, same order."""


_NAME = re.compile(r"(?P<word>[a-z]+|\d)_(?P<speaker>[A-Za-z0-9-]+)_(?P<take>\d+)\.wav$")


def load_human_digits(real_data: Path | None, hold_out: str = "yweweler") -> HumanDigits:
    """Read ``human-digits/*.tar`` of the real-data folder: wavs named ``{digit or word}_{speaker}_{take}.wav``.

    Returns:
        Both splits; empty where the folder is absent.
    Raises:
        DataError: a damaged tar or wav, or no speaker of the name ``hold_out``.
    """
    folder = None if real_data is None else Path(real_data) / "human-digits"
    if folder is None or not folder.is_dir():
        return HumanDigits(train=(), held_out=())
    found = [utterance for path in sorted(folder.glob("*.tar")) for utterance in _read_tar(path)]
    found.sort(key=lambda u: (u.speaker, u.digit, u.take))
    speakers = sorted({u.speaker for u in found})
    if hold_out not in speakers:
        raise DataError(f"no speaker {hold_out!r} in {folder}; choose one of {', '.join(speakers) or 'none there'}")
    return HumanDigits(
        train=tuple(u for u in found if u.speaker != hold_out),
        held_out=tuple(u for u in found if u.speaker == hold_out),
    )


def _read_tar(path: Path) -> list[Utterance]:
    utterances = []
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                match = _NAME.search(member.name)
                stream = tar.extractfile(member) if match else None
                if match is None or stream is None:
                    continue
                word = match["word"]
                if not word.isdigit() and word not in DIGITS:
                    continue
                wave, rate = _read_wav(stream.read(), f"{path}:{member.name}")
                digit = int(word) if word.isdigit() else DIGITS.index(word)
                utterances.append(
                    Utterance(digit=digit, speaker=match["speaker"], take=int(match["take"]), wave=wave, rate=rate)
                )
    except tarfile.TarError as error:
        raise DataError(f"{path} cannot be read as a tar: {error}; restore the file") from error
    return utterances


def _read_wav(raw: bytes, name: str) -> tuple[Wave, int]:
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise DataError(f"{name} cannot be read as a wav: {error}; restore the file") from error
    return samples.mean(axis=1, dtype=np.float32), int(rate)
