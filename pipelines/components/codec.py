"""Train the tiny codec from nothing, measure it by independent recognisers, write its card.

    python -m pipelines.components.codec --out codec-tiny --seed 0

Stages with fixed numbers of steps: the semantic branch (CTC on spelling, then k-means), the acoustic encoder, its
quantiser from the latents, the encoder again through the quantiser, the 24 kHz decoder (against mel frames, then
against the waveform). Branch, encoder with quantiser, and decoder leave their weights in ``OUT/stages``; the same
command begun again goes on after the last of these that was finished. Speech comes from the assistant's voice and
other synthetic voices, and from people where the environment variable OMNI_RAY_REAL_DATA names a folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from omni_ray.config.model import CodecConfig, model_preset
from omni_ray.data.tiny_world.words import pairs, phrase
from omni_ray.models.codec import Codec
from pipelines.components.codec_decoder import DecoderRecipe, train_decoder
from pipelines.components.codec_figures import codec_figures
from pipelines.components.codec_latents import train_latents
from pipelines.components.codec_material import Clip, digest, held_out_clips, training_clips
from pipelines.components.codec_semantic import SemanticRecipe, train_semantic
from pipelines.components.codec_stages import Cropper, StageRecipe, code_clips
from pipelines.components.options import add_scale, scaled_steps

REAL_DATA_VARIABLE = "OMNI_RAY_REAL_DATA"
HOLD_OUT = "yweweler"
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecRecipe:
    """How the tiny codec is trained."""

    semantic: SemanticRecipe = field(default_factory=SemanticRecipe)
    """CTC and k-means."""
    latents: StageRecipe = field(default_factory=lambda: StageRecipe(steps=2400, batch=8, frames=16, lr=2e-3))
    """Acoustic encoder; its quantiser is set from data."""
    coded: StageRecipe = field(default_factory=lambda: StageRecipe(steps=1000, batch=8, frames=16, lr=1e-3))
    """Acoustic encoder, through the quantiser as it was set."""
    decoder: DecoderRecipe = field(default_factory=DecoderRecipe)
    """The 24 kHz decoder on fixed codes."""

    def scaled(self, share: float) -> CodecRecipe:
        """The same stages with a share of the steps, for a try-out."""
        if share == 1.0:
            return self
        parts = {name: _scaled(getattr(self.decoder, name), share) for name in ("frames", "wave", "polish")}
        return replace(
            self,
            semantic=_scaled(self.semantic, share),
            latents=_scaled(self.latents, share),
            coded=_scaled(self.coded, share),
            decoder=replace(self.decoder, **parts),
        )


def _scaled(stage: Any, share: float) -> Any:
    return replace(stage, steps=scaled_steps(stage.steps, share))


def train_codec(
    out: Path,
    *,
    real_data: Path | None = None,
    hold_out: str = HOLD_OUT,
    seed: int = 0,
    recipe: CodecRecipe | None = None,
    config: CodecConfig | None = None,
    clips: Sequence[Clip] | None = None,
    log: Log = lambda line: None,
) -> Codec:
    """Train from nothing (or from the last finished stage in ``out/stages``) and save fp16 weights to ``out``.

    Args:
        out: Folder to write.
        real_data: Folder with ``human-digits``; None trains on synthetic voices alone.
        hold_out: Person never heard in training.
        clips: Training speech; None for :func:`training_clips`.

    Raises:
        DataError: speech cannot be read or made.
        ConfigError: a configuration that cannot be trained.
    """
    recipe, config = recipe or CodecRecipe(), config or model_preset("tiny").codec
    if clips is None:
        clips = training_clips(real_data, seed=seed, hold_out=hold_out)
    torch.manual_seed(seed)
    codec = Codec(config)
    keeper = StageKeeper(out / "stages", codec, f"{config.model_dump_json()} {seed} {digest(clips)}", log)
    keeper.run("semantic", recipe.semantic, lambda: train_semantic(codec, clips, recipe.semantic, seed=seed, log=log))

    def latents() -> None:
        cropper = Cropper(clips, code_clips(codec, clips, acoustic=False), codec, seed=seed + 1)
        train_latents(codec, cropper, recipe.latents, recipe.coded, seed=seed + 2, log=log)

    keeper.run("latents", (recipe.latents, recipe.coded), latents)

    def decoder() -> None:
        cropper = Cropper(clips, code_clips(codec, clips, acoustic=True), codec, seed=seed + 3)
        train_decoder(codec, cropper, recipe.decoder, seed=seed + 4, log=log)

    keeper.run("decoder", recipe.decoder, decoder)
    codec.eval().save_pretrained(out, dtype=torch.float16)
    return codec


class StageKeeper:
    """Runs stages in order and keeps their weights, so that a run cut off goes on where it was."""

    def __init__(self, folder: Path, codec: Codec, inputs: str, log: Log) -> None:
        self.folder, self.codec, self.inputs, self.log = folder, codec, inputs, log

    def run(self, name: str, recipe: object, train: Callable[[], object]) -> None:
        """Load the stage's weights if the same data, seed and settings made them; else train and keep them."""
        self.inputs = hashlib.sha256(f"{self.inputs} {name} {recipe}".encode()).hexdigest()
        path = self.folder / f"{name}-{self.inputs[:12]}.safetensors"
        if path.is_file():
            self.codec.load_state_dict(load_file(path))
            self.log(f"{name}: kept from {path}")
            return
        self.codec.train()
        train()
        self.codec.eval()
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.part")
        save_file({key: value.contiguous() for key, value in self.codec.state_dict().items()}, aside)
        aside.replace(path)


LICENCES = {
    "people": "Free Spoken Digit Dataset (Jakobovski and contributors): CC BY-SA 4.0",
    "voices": "eSpeak NG (GPL-3.0 program, called to make sound), hibari-tts (Apache-2.0)",
    "weights": "Apache-2.0",
}
"""Of what the weights were made from."""


def make_card(
    clips: Sequence[Clip],
    recipe: CodecRecipe,
    config: CodecConfig,
    *,
    command: str,
    hold_out: str,
    seed: int,
    minutes: float,
    figures: dict[str, Any],
) -> dict[str, Any]:
    """What was trained, on what, how well: beside the weights as ``card.json``."""
    sources = {
        kind: sorted({clip.source for clip in clips if clip.kind == kind})
        for kind in dict.fromkeys(clip.kind for clip in clips)
    }
    return {
        "component": "four-codebook audio codec (tiny): semantic branch, acoustic encoder, quantiser, 24 kHz decoder",
        "command": command,
        "seed": seed,
        "cpu_minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "figures": figures,
        "recipe": asdict(recipe),
        "config": config.model_dump(mode="json"),
        "training_data": {
            "sha256": digest(clips),
            "clips": len(clips),
            "minutes": round(sum(len(clip.input_S) for clip in clips) / 16000 / 60, 1),
            "voices": sources,
            "ids_sha256": hashlib.sha256("\n".join(clip.id for clip in clips).encode()).hexdigest(),
        },
        "held_out": {
            "people": [hold_out] if "human" in sources else [],
            "voices": sorted({clip.source for clip in held_out_clips(None)["synthetic_pairs"]}),
            "combinations": [phrase(*pair) for pair in pairs(held_out=True)],
        },
        "licences": LICENCES,
    }


def told_command(options: argparse.Namespace, real_data: Path | None) -> str:
    """The command that repeats a run, as the card tells it."""
    words = ["OMNI_RAY_REAL_DATA=FOLDER"] if real_data else []
    words += ["python -m pipelines.components.codec --out DIR", f"--seed {options.seed}"]
    words += [f"--hold-out {options.hold_out}"] if options.hold_out != HOLD_OUT else []
    return " ".join([*words, *([f"--scale {options.scale:g}"] if options.scale != 1.0 else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; figures as one JSON document on standard output, progress on standard error."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.components.codec", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    add_scale(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold-out", default=HOLD_OUT, help="person kept for the figures (default %(default)s)")
    parser.add_argument("--open-judge", action="store_true", help="figures by the open-vocabulary judge as well (slow)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = os.environ.get(REAL_DATA_VARIABLE)
    real_data = Path(folder) if folder else None
    recipe = CodecRecipe().scaled(options.scale)
    config = model_preset("tiny").codec
    clips = training_clips(real_data, seed=options.seed, hold_out=options.hold_out)
    started, cpu = time.monotonic(), time.process_time()

    def log(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", file=sys.stderr, flush=True)

    codec = train_codec(options.out, seed=options.seed, recipe=recipe, config=config, clips=clips, log=log)
    minutes = (time.process_time() - cpu) / 60
    held_out = held_out_clips(real_data, hold_out=options.hold_out)
    # The figures are the shipped weights', fp16 rounding included.
    figures = codec_figures(
        codec.from_pretrained(options.out), held_out, open_judge=options.open_judge, codebooks=(2, 3, 4)
    )
    card = make_card(
        clips,
        recipe,
        config,
        command=told_command(options, real_data),
        hold_out=options.hold_out,
        seed=options.seed,
        minutes=minutes,
        figures=figures,
    )
    (options.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
