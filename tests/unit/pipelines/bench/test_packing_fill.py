"""Log-normal lengths fill their sequences under both kinds of packing."""

from __future__ import annotations

import pytest

from pipelines.bench.packing_fill import KINDS, LOG_NORMAL, _log_normal


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", LOG_NORMAL)
def test_sequences_are_full(kind: str, mix: str) -> None:
    median, sigma, budget = LOG_NORMAL[mix]
    assert 0.97 <= _log_normal(median, sigma, budget, kind, seed=3) <= 1.0
