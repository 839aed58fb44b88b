"""Live conversations while replicas are killed and clients break off, stall or rave."""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]
FIXED = {"sessions", "hangs", "leaks", "foreign_damage", "memory_growth", "negative_control"}


def test_a_short_storm_over_stages_of_one_replica(ray_cluster: None) -> None:
    """Every kill leaves a stage empty: its sessions are told in time, the others hear every byte, it comes back."""
    from pipelines.bench.chaos import storm

    limits = {"ping_s": 2.0, "half_open_s": 8.0, "slow_reader_s": 5.0}
    figures = storm(8, 2, 3, replicas=1, limits=limits, redeploys=False)
    found = {figure.name: figure for figure in figures}
    assert set(found) >= FIXED
    missed = [name for name, figure in found.items() if figure.reached is False]
    assert missed == [], {name: (found[name].value, found[name].against) for name in missed}
    assert found["kills"].value == 2


@pytest.mark.full
def test_the_quick_bench_reaches_its_goals(ray_cluster: None) -> None:
    from pipelines.bench.chaos import run

    figures = {figure.name: figure for figure in run(quick=True, seed=1).figures}
    missed = [name for name, figure in figures.items() if figure.reached is False]
    assert missed == [], {name: (figures[name].value, figures[name].against) for name in missed}
    assert figures["redeploy_dropped"].n > 0
