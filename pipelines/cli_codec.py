"""Handlers of ``codec encode``, ``codec decode`` and ``codec reconstruct``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from pipelines.cli_outcome import Outcome, existing_file, writable_target


def _paths(args: Namespace) -> tuple[Path, Path, Path | None]:
    source, target = existing_file(args.source, "IN"), writable_target(args.target, "OUT")
    assert source is not None
    assert target is not None
    return source, target, args.codec.resolve() if args.codec else None


def _outcome(args: Namespace, facts: dict[str, Any]) -> Outcome:
    told = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
    )
    return Outcome(text=f"{args.target}: {told}", document={"file": str(args.target), **facts})


def encode(args: Namespace) -> Outcome:
    """Sound to codec ids."""
    source, target, codec = _paths(args)
    from pipelines.codec_files import encode_file

    return _outcome(args, encode_file(source, target, codec=codec))


def decode(args: Namespace) -> Outcome:
    """Codec ids to sound."""
    source, target, codec = _paths(args)
    from pipelines.codec_files import decode_file

    return _outcome(args, decode_file(source, target, codec=codec, codebooks=args.codebooks))


def reconstruct(args: Namespace) -> Outcome:
    """Sound to codec ids to sound."""
    source, target, codec = _paths(args)
    from pipelines.codec_files import reconstruct_file

    return _outcome(args, reconstruct_file(source, target, codec=codec, codebooks=args.codebooks))
