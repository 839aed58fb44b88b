"""What things cost, in relative FLOPs; the units that balancing compares."""

from __future__ import annotations


def language_cost(length: int, hidden: int = 160) -> float:
    """Cost of one packed sequence of ``length`` rows: linear layers plus causal attention's square.

    Source: per row about 12 H^2 multiply-adds against L/2 x 2 H for attention; only the ratio matters.
    """
    return length * (1.0 + length / (12.0 * hidden))
