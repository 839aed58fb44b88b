"""Every source: numbered, the same sample at the same number, a state that does not grow with rows read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from mini_world import write_world

from omni_ray.data.sources import WebDatasetSource
from omni_ray.types.seams import Source


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    root = tmp_path_factory.mktemp("sources") / "world"
    root.mkdir()
    write_world(root)
    return {"webdataset": WebDatasetSource(Path(root / "picture"), "picture")}


@pytest.mark.parametrize("kind", ["webdataset"])
def test_numbers_name_samples(sources: dict[str, Source], kind: str) -> None:
    source = sources[kind]
    assert isinstance(source, Source)
    before = json.dumps(source.state_dict())
    in_order = list(source)
    assert len(in_order) == len(source) > 10
    assert len({sample.key for sample in in_order}) == len(source)
    for index in (len(source) - 1, 0, 7):
        assert source[index] == in_order[index]
    assert json.dumps(source.state_dict()) == before
    assert source.fingerprint == pickle.loads(pickle.dumps(source)).fingerprint != ""
    with pytest.raises(IndexError):
        source[len(source)]
