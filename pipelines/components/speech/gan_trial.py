"""Does the adversarial stage help? The same decoder trained on with and without discriminators, judged side by side.

    python -m pipelines.components.speech.gan_trial --out runs/gan-trial --steps 400

Both sides start from the same weights (default: the shipped codec), see the same crops in the same order and take the
same number of steps; only the discriminators differ. The judges hear held-out phrases alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from omni_ray.config.load import load_speech_recipe
from omni_ray.config.speech_training import SpeechRecipe
from omni_ray.models.codec import Codec
from pipelines.codec_files import shipped_codec
from pipelines.components.codec_figures import RATIO_SETS, codec_figures
from pipelines.components.codec_material import Clip, held_out_clips, training_clips
from pipelines.components.speech.group import Alone
from pipelines.components.speech.loop import PhaseState
from pipelines.components.speech.stages import StageRun, run_stage

EVERY = 50
"""Steps between lines of the log."""
CODEBOOKS = 4
FIGURES: tuple[tuple[str, bool], ...] = (
    ("words, pocketsphinx grammar", True),
    ("words, whisper tiny.en", True),
    ("stoi", True),
    ("pesq", True),
    ("mel distance", False),
)
"""Judge, and whether more is better."""
NEEDED = 2
"""Figures on which the adversarial side must be better for the stage to be called a help."""


def trained(recipe: SpeechRecipe, start: Path, clips: Sequence[Clip], log: Callable[[str], None]) -> Codec:
    """The codec of ``start`` after the recipe's stage 2."""
    codec = Codec.from_pretrained(start)
    began = time.monotonic()

    def keep(phase: str, state: PhaseState, make: object) -> None:
        if state.step % EVERY == 0:
            told = ", ".join(f"{name} {value:.3f}" for name, value in state.told.items())
            log(f"{time.monotonic() - began:5.0f} s  {phase} {state.step}: {told}")

    run_stage(StageRun(stage="2", recipe=recipe, codec=codec, clips=clips, group=Alone()), None, keep)
    return codec


def judged(codec: Codec, clips: dict[str, list[Clip]], *, open_judge: bool) -> dict[str, float | None]:
    """Every judge's figure over all clips; None where a judge is not installed."""
    found = codec_figures(codec, clips, open_judge=open_judge, codebooks=(CODEBOOKS,), signals=True)
    sets = [found[name] for name in clips]
    total = sum(part["clips"] for part in sets)

    def mean(key: str) -> float | None:
        values = [part[key].get(str(CODEBOOKS)) for part in sets]
        if any(value is None for value in values):
            return None
        return round(sum(value * part["clips"] for value, part in zip(values, sets, strict=True)) / total, 4)

    def words(judge: str) -> float | None:
        if any(judge not in part for part in sets):
            return None
        heard = sum(part[judge][f"codebooks_{CODEBOOKS}"]["heard"] for part in sets)
        return round(heard / sum(part[judge]["original"]["words"] for part in sets), 4)

    return {
        "words, pocketsphinx grammar": words("pocketsphinx grammar"),
        "words, whisper tiny.en": words("whisper tiny.en"),
        "stoi": mean("stoi_by_codebooks"),
        "pesq": mean("pesq_by_codebooks"),
        "mel distance": mean("mel_distance_by_codebooks"),
    }


def verdict(without: dict[str, float | None], against: dict[str, float | None]) -> tuple[int, int, str]:
    """Figures on which the adversarial side is better, worse, and the sentence of the report."""
    better = worse = 0
    for name, more in FIGURES:
        one, other = without[name], against[name]
        if one is None or other is None or one == other:
            continue
        better, worse = (better + 1, worse) if (other > one) == more else (better, worse + 1)
    helps = better >= NEEDED
    told = f"with discriminators {better} figures are better and {worse} worse than without: the adversarial stage "
    return better, worse, told + ("helps" if helps else "does not help") + " at this size and length"


def table(sides: dict[str, dict[str, float | None]]) -> str:
    """Judges in rows, sides in columns."""
    lines = ["  ".join([f"{'judge':28}", *(f"{name:>22}" for name in sides)])]
    for name, more in FIGURES:
        cells = ["-" if side[name] is None else f"{side[name]:.4f}" for side in sides.values()]
        lines.append(
            "  ".join([f"{name + (' (more is better)' if more else ' (less)'):28}", *(f"{c:>22}" for c in cells)])
        )
    return "\n".join(lines)


def recipes(preset: str, steps: int, lr: float, seed: int) -> dict[str, SpeechRecipe]:
    """Stage 2 as one polish, without and with discriminators."""
    common = ["decoder.mel.steps=0", "decoder.wave.steps=0", f"decoder.polish.steps={steps}"]
    common += [f"decoder.polish.lr={lr}", f"seed={seed}"]
    return {
        "without": load_speech_recipe(preset, [*common, "decoder.polish.adversarial.start=null"]),
        "with discriminators": load_speech_recipe(preset, [*common, "decoder.polish.adversarial.start=0"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; table and verdict on standard output, progress on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.components.speech.gan_trial", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of both codecs and the report")
    parser.add_argument("--start", type=Path, help="folder of a codec to train on (default: the shipped one)")
    parser.add_argument("--recipe", default="codec-tiny", help="preset or YAML file")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--open-judge", action="store_true", help="ask the open-vocabulary recogniser too (minutes)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    real = os.environ.get("OMNI_RAY_REAL_DATA")
    start = options.start or shipped_codec()
    clips = training_clips(Path(real) if real else None, seed=options.seed)
    held_out = {name: found for name, found in held_out_clips(None).items() if name in RATIO_SETS}
    sides = {"before": judged(Codec.from_pretrained(start), held_out, open_judge=options.open_judge)}
    for name, recipe in recipes(options.recipe, options.steps, options.lr, options.seed).items():
        codec = trained(recipe, start, clips, lambda line: print(line, file=sys.stderr, flush=True))
        codec.save_pretrained(options.out / name.replace(" ", "-"), dtype=torch.float32)
        sides[name] = judged(codec, held_out, open_judge=options.open_judge)
    better, worse, told = verdict(sides["without"], sides["with discriminators"])
    document: dict[str, Any] = {"figures": sides, "better": better, "worse": worse, "verdict": told}
    document |= {"steps": options.steps, "lr": options.lr, "seed": options.seed}
    (options.out / "report.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{table(sides)}\n{told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
