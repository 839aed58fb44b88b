"""Handler of ``components train``."""

from __future__ import annotations

import sys
import time
from argparse import Namespace

from pipelines.cli_outcome import Outcome, real_data_folder


def train(args: Namespace) -> Outcome:
    """Train the codec's stages on Ray Train; a folder of its own for each."""
    from omni_ray.config.load import load_speech_recipe

    recipe = load_speech_recipe(args.recipe, args.set)
    from pipelines.components.speech.driver import SpeechRun, stages_named, summary, train_speech

    stages, began = stages_named(args.stage), time.monotonic()
    run = SpeechRun(
        recipe=recipe,
        out=args.out.resolve(),
        stages=stages,
        workers=args.workers,
        start=args.start.resolve() if args.start else None,
        resume=args.resume,
        real_data=real_data_folder(),
    )

    def log(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line}", file=sys.stderr, flush=True)

    document = train_speech(run, log)
    return Outcome(text=summary(document, stages), document=document)
