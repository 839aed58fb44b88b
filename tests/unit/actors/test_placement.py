"""What no cluster of these nodes can hold is refused with what is asked and what is there."""

from __future__ import annotations

import pytest

from actors.placement import shortage
from omni_ray.config.load import load_recipe

SMALL = {"CPU": 4.0, "node:10.0.0.1": 1.0}
CASES = {
    "sum": (["pools.vision.resources.cpu=6"], [SMALL, SMALL], "the pools ask for 9 CPU, yet the cluster has 8"),
    "label": (
        ["pools.vision.resources.custom={lens: 1}"],
        [{"CPU": 16.0}],
        "the pools ask for 1 lens, yet the cluster has 0",
    ),
    "one node": (
        ["pools.vision.resources.cpu=5"],
        [SMALL, SMALL],
        "one vision actor asks for 5 CPU on one node, yet the nodes have 4 CPU",
    ),
    "two labels, two nodes": (
        ["pools.vision.resources.custom={lens: 1, fast: 1}"],
        [SMALL | {"lens": 1.0}, SMALL | {"fast": 1.0}],
        "one vision actor asks for 1 CPU, 1 fast, 1 lens on one node, yet the nodes have 4 CPU, 1 fast; 4 CPU, 1 lens",
    ),
    "device": (
        ["placement=colocate", "pools.language.resources.cpu=2"],
        [SMALL, SMALL],
        "device 0 asks for 5 CPU on one node, yet the nodes have 4 CPU",
    ),
    "fits": (["pools.vision.actors=5"], [SMALL, SMALL], ""),
}


@pytest.mark.parametrize("case", CASES)
def test_shortage_is_named(case: str) -> None:
    overrides, nodes, text = CASES[case]
    assert shortage(load_recipe("tiny", overrides), nodes) == text
