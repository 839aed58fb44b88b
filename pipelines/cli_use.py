"""Handlers of ``evaluate``, ``chat`` and ``serve``."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from omni_ray.types.errors import RequestError
from pipelines.cli_outcome import Outcome, existing_file, writable_target


def _checkpoint(path: Path) -> Path:
    """The absolute folder of a whole checkpoint; also a run's folder, whose newest one is meant.

    Raises:
        CheckpointError: it is not whole.
    """
    from omni_ray.checkpoint.store import check_whole

    check_whole(path)
    return path.resolve()


def evaluate(args: Namespace) -> Outcome:
    """Held-out figures as a table or in the form of the targets."""
    checkpoint = _checkpoint(args.checkpoint)
    from pipelines.evaluation import evaluate as run_evaluation
    from pipelines.evaluation import table

    data = args.data.resolve() if args.data else None
    report = run_evaluation(checkpoint, data=data, limit=args.limit, seed=args.seed)
    return Outcome(text=table(report), document=report)


def chat(args: Namespace) -> Outcome:
    """One answer, its words on standard output and its sound in ``--speak``; or a conversation at the terminal."""
    asked = any((args.text, args.image, args.audio, args.video))
    if not asked and (args.json or not sys.stdin.isatty()):
        raise RequestError("nothing was asked; give --text, --image, --audio or --video")
    checkpoint = _checkpoint(args.checkpoint)
    image, audio = existing_file(args.image, "--image"), existing_file(args.audio, "--audio")
    video, speak = existing_file(args.video, "--video"), writable_target(args.speak, "--speak")
    from pipelines import chat as chats

    if not asked:
        chats.converse(checkpoint, speak=speak, max_tokens=args.max_tokens)
        return Outcome(text="")
    answer = chats.chat(
        checkpoint,
        text=args.text,
        image=image,
        audio=audio,
        video=video,
        speak=speak,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
    )
    return Outcome(text=answer, document={"text": answer, "speech": str(speak) if speak else None})


def serve(args: Namespace) -> Outcome:
    """Stay up until stopped."""
    checkpoint = _checkpoint(args.checkpoint)
    key_file = existing_file(args.api_key_file, "--api-key-file")
    from pipelines.serving.app import serve as run_server

    cert, key = existing_file(args.tls_cert, "--tls-cert"), existing_file(args.tls_key, "--tls-key")
    run_server(
        checkpoint,
        host=args.host,
        port=args.port,
        api_key_file=key_file,
        tls_cert=cert,
        tls_key=key,
        prefill_decode=args.prefill_decode,
    )
    return Outcome(text="")
