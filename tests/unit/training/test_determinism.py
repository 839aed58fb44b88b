"""``deterministic: true``: set in every process that computes, the same bits at every run, refusals by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from in_process_pools import InProcessPools, reference_weights
from mini_world import STAGES, mini_recipe, write_components, write_world
from torch import Tensor

from omni_ray.training.prepare import StepBuilder
from omni_ray.training.process import settle_process
from omni_ray.training.reference import Reference


@pytest.fixture(autouse=True)
def settings_return(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # restored afterwards, and not replaced meanwhile
    before = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def test_pools_and_reference_compute_with_it_and_a_second_run_has_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    write_world(tmp_path / "world")
    write_components(tmp_path / "components")
    stage = STAGES[2] | {"steps": 2}

    def weights(deterministic: bool, alone: bool) -> dict[str, Tensor]:
        torch.use_deterministic_algorithms(False)
        recipe = mini_recipe(tmp_path, stages=[stage], deterministic=deterministic)
        trained = Reference(recipe) if alone else InProcessPools(recipe)
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        builder = StepBuilder(recipe, tmp_path / "world")
        for step in range(recipe.total_steps):
            trained.step(builder.build(step))
        return reference_weights(trained) if isinstance(trained, Reference) else trained.weights()

    first = weights(True, alone=False)
    for other in (weights(True, alone=False), weights(True, alone=True)):
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_it_counts_as_numbers_and_a_run_without_keeps_its_fingerprint(tmp_path: Path) -> None:
    plain, asked = (mini_recipe(tmp_path, deterministic=value) for value in (False, True))
    assert plain.numbers_fingerprint() == mini_recipe(tmp_path).numbers_fingerprint()
    assert plain.numbers_fingerprint() != asked.numbers_fingerprint()


def test_an_operation_without_a_deterministic_form_is_refused_by_name() -> None:
    settle_process(threads=1, deterministic=True)
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_without_it_a_process_is_left_as_it_was() -> None:
    torch.use_deterministic_algorithms(True)
    settle_process(threads=1, deterministic=False)
    assert torch.are_deterministic_algorithms_enabled()
