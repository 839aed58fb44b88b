"""Options that the component commands share."""

from __future__ import annotations

import argparse

LEAST_STEPS = 20
"""Of a scaled training: a one-cycle schedule needs some."""


def add_scale(parser: argparse.ArgumentParser) -> None:
    """``--scale SHARE``: cut the steps of a try-out."""
    parser.add_argument(
        "--scale", type=step_share, default=1.0, help="share of the steps, for a try-out (default %(default)s)"
    )


def step_share(text: str) -> float:
    """A share of the steps from the command line: above 0, up to 1."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; choose a number above 0, up to 1")
    return share


def scaled_steps(steps: int, share: float) -> int:
    """So many of the steps; all of them for 1."""
    return steps if share == 1.0 else min(steps, max(LEAST_STEPS, round(steps * share)))
