"""Weights that follow how far each subset is from a reference model (networks.md section 6, PPL-gap sampling).

Every E steps: ``g_d = max(0, log PPL_d - rho_d)``, ``w_d <- EMA(w_d0 exp(eta g_d))``, clipped to a range around
``w_d0``. Here ``f_d = w_d / w_d0``, one number a subset, is what is kept; shares are normalised inside each blend, so
the modalities' shares stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import yaml

from omni_ray.config.mixture import GapConfig
from omni_ray.types.errors import DataError


def next_factors(
    factors: Mapping[str, float],
    log_perplexity: Mapping[str, float],
    reference: Mapping[str, float],
    config: GapConfig,
) -> dict[str, float]:
    """Factors after a measurement.

    Args:
        factors: By subset; absent = 1.  log_perplexity: Mean log-perplexity of every subset's validation samples.
        reference: The same of the reference model; absent = 0.  config: eta, decay and the range.
    Raises:
        DataError: a measured value is not finite.
    """
    after = {}
    for name, value in log_perplexity.items():
        if not math.isfinite(value):
            raise DataError(f"the log-perplexity of subset {name!r} is {value}; the model has diverged")
        gap = max(0.0, value - reference.get(name, 0.0))
        # exp of a gap that is above ln(high) is clipped in any case; the limit keeps it finite.
        wanted = math.exp(min(config.eta * gap, 50.0))
        moved = config.decay * factors.get(name, 1.0) + (1.0 - config.decay) * wanted
        after[name] = min(max(moved, config.low), config.high)
    return after


def read_reference(config: GapConfig, subsets: tuple[str, ...]) -> dict[str, float]:
    """Reference log-perplexities from the recipe's file; 0 everywhere where it names none.

    Raises:
        DataError: the file cannot be read, lacks a subset, or holds something else than numbers.
    """
    if config.reference is None:
        return dict.fromkeys(subsets, 0.0)
    path = Path(config.reference)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))  # JSON is YAML, too
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"gap.reference {path} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, Mapping):
        raise DataError(f"gap.reference {path} is no mapping of subsets to log-perplexities")
    missing = sorted(set(subsets) - set(content))
    if missing:
        raise DataError(f"gap.reference {path} has no value for {', '.join(missing)}; add their log-perplexities")
    wrong = [name for name in subsets if not isinstance(content[name], int | float)]
    if wrong:
        raise DataError(f"gap.reference {path}: {wrong[0]} is {content[wrong[0]]!r}; a number is needed")
    return {name: float(content[name]) for name in subsets}
