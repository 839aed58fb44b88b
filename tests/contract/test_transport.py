"""Every transport delivers what was sent: values, ids and lengths, empty batches and bf16 included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from actors.transport import InProcessTransport, ObjectStoreTransport
from omni_ray.types.batch import EmbeddingBatch
from omni_ray.types.seams import Transport

TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "in-process": InProcessTransport,
    "object-store": ObjectStoreTransport,
}


@pytest.mark.ray
@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [(), (3,), (2, 5, 1)], ids=str)
def test_what_is_sent_arrives(ray_cluster: None, kind: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    transport = TRANSPORTS[kind]()
    assert isinstance(transport, Transport)
    values = (torch.arange(sum(lengths) * 4).view(-1, 4) * 7 % 13).to(dtype)
    sent = EmbeddingBatch(values_ID=values, item_ids=tuple(range(len(lengths))), lengths=lengths)
    arrived = transport.receive(transport.send(sent, ("language", 0)))
    assert arrived.values_ID.dtype == dtype
    assert torch.equal(arrived.values_ID, sent.values_ID)
    assert (arrived.item_ids, arrived.lengths) == (sent.item_ids, sent.lengths)
