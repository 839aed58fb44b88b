"""The count of living bytes on a sum that can be followed by hand."""

from __future__ import annotations

import torch

from pipelines.live_bytes import LiveBytes


def test_peak_is_what_lived_together() -> None:
    before = torch.zeros(100)
    with LiveBytes([before]) as bytes_:
        first = before + 1  # 400 bytes
        second = first.double()  # 800 more
        assert bytes_.live == bytes_.peak == 1200
        view = second[:10]
        del first, second
        assert bytes_.live == 800, "a view keeps its storage"
        del view
        third = before.t() * 2
    assert bytes_.live == 400
    assert bytes_.peak == 1200
    del third
