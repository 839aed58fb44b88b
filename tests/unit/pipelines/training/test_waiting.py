"""A wait that is bounded: who holds everyone up is told by pool, rank and phase."""

from __future__ import annotations

import sys
import threading

import pytest

from pipelines.training.waiting import StuckError, Submitted, bounded_get, bounded_get_ready


class Gate:
    """Answers at once, or not until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def pass_on(self, value: int) -> int:
        return value

    def hold(self) -> int:
        self.opened.wait()
        return 0


@pytest.mark.ray
def test_the_call_that_hangs_is_named_and_not_those_behind_it(ray_cluster: None) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    remote = ray.remote(Gate).options(num_cpus=0.1)
    vision, language = remote.remote(), remote.remote()
    try:
        first = vision.pass_on.remote(1)
        held = vision.hold.remote()
        behind = language.pass_on.remote(held)
        calls = [
            Submitted("vision", 1, "encode", 0, (first,)),
            Submitted("vision", 1, "encode", 3, (held,)),
            Submitted("language", 0, "language", 3, (behind,), (held,)),
        ]
        assert bounded_get([first], calls, 30.0, step=7) == [1]
        text = r"step 7: nothing ended within 1 s .*still running: pool vision, rank 1, phase encode, micro-batch 3$"
        with pytest.raises(StuckError, match=text) as found:
            bounded_get([behind], calls, 1.0, step=7)
        assert found.value.ranks == (("vision", 1),)
        with pytest.raises(StuckError, match=text):
            bounded_get_ready([behind], calls, 1.0, step=7)
    finally:
        ray.kill(vision)
        ray.kill(language)
