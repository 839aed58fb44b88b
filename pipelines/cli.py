"""The command ``omni-ray``: parse, run one handler, print one result, and turn every failure into one sentence.

Standard output carries the result alone (text, or one JSON document with ``--json``); whatever else is said while the
work runs goes to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TextIO

from omni_ray.types.errors import OmniError
from pipelines.cli_outcome import Outcome
from pipelines.cli_parser import build_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words after ``omni-ray``; default: the process's own.
    Returns:
        The exit code. Wrong usage leaves through ``SystemExit(2)``, as argparse does it.
    """
    args = build_parser().parse_args(arguments)
    try:
        with result_stream() as results:
            outcome = run_handler(args.handler, args)
            print_outcome(outcome, as_json=getattr(args, "json", False), results=results)
    except KeyboardInterrupt:
        print(f"omni-ray {args.command}: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output has gone (for instance `| head`); nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as problem:
        if args.debug:
            traceback.print_exc()
        print(f"omni-ray {args.command}: {sentence(problem, debug=args.debug)}", file=sys.stderr)
        return 1
    return 0 if outcome.ok else 1


def run_handler(handler: str, args: object) -> Outcome:
    """Import ``module:function`` and call it, so that ``--help`` imports nothing of the work."""
    module, _, function = handler.partition(":")
    outcome: Outcome = getattr(import_module(module), function)(args)
    return outcome


def print_outcome(outcome: Outcome, *, as_json: bool, results: TextIO) -> None:
    """Write a command's result: the document with ``--json``, else the text."""
    if as_json:
        print(json.dumps(outcome.document, ensure_ascii=False, default=str), file=results, flush=True)
    elif outcome.text:
        print(outcome.text, file=results, flush=True)


@contextlib.contextmanager
def result_stream() -> Iterator[TextIO]:
    """Give the real standard output, and send what anybody else prints meanwhile to standard error.

    Libraries written in C, and Ray's echo of its workers, write to descriptor 1 directly, so the descriptor itself is
    turned as well.
    """
    real = sys.stdout
    real.flush()
    try:
        turned = real.fileno() == 1
    except (OSError, ValueError):
        turned = False  # somebody captures Python's stream; leave the descriptors alone
    if not turned:
        with contextlib.redirect_stdout(sys.stderr):
            yield real
        return
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as results, contextlib.redirect_stdout(sys.stderr):
            yield results
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def sentence(problem: BaseException, *, debug: bool = False) -> str:
    """One line for the user: our own errors as they stand, others with their type."""
    # An error raised in a Ray worker arrives wrapped, with the worker's traceback as its text.
    problem = getattr(problem, "cause", None) or problem
    text = " ".join(str(problem).split())
    if isinstance(problem, OmniError):  # a list in it, for instance of bad samples, keeps its lines
        return "\n  ".join(" ".join(part.split()) for part in str(problem).split("\n  "))
    if isinstance(problem, OSError) and problem.filename is not None:
        return f"{problem.filename}: {problem.strerror}"
    hint = "" if debug else " (--debug shows where)"
    return f"{type(problem).__name__}: {text or 'no further text'}{hint}"


if __name__ == "__main__":
    sys.exit(main())
