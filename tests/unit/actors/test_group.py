"""A pool's process group, between real processes: the inner bridge, point to point, a peer that is gone."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_ray.types.batch import EmbeddingBatch

LISTS = [[(0, 5), (3, 2)], [], [(1, 4), (2, 1)]]
"""Three encoder ranks; the second is empty."""


class GroupProbe:
    """One rank of a group of three, cp 2."""

    def address(self) -> str:
        from actors.group import free_address

        return free_address("127.0.0.1")

    def join(self, rank: int, address: str, timeout_s: float) -> None:
        from actors.group import PoolGroup

        torch.set_num_threads(1)
        self.rank = rank
        self.group = PoolGroup("vision", rank, 3, address, timeout_s)

    def sum(self, value: float) -> float:
        total = torch.tensor([value])
        self.group.sum_in_place(total, "finish")
        return float(total)

    def bridge(self, num_chunks: int) -> tuple[Tensor | None, Tensor]:
        """(the slice of items 2, 0 on a context rank, the gradient of this rank's rows when it is the rows' double)."""
        from actors.group import InnerBridge
        from omni_ray.bridge.redistribute import BridgeLayout

        layout = BridgeLayout.of(LISTS, num_chunks)
        bridge = InnerBridge(self.group, cp=2)
        store = bridge.forward(layout, rows_of_rank(self.rank))
        seen = None
        if store is not None:
            seen = store.read([2, 0])
            store.write_gradient([0, 1, 2, 3], 2 * store.read([0, 1, 2, 3]))
        return seen, bridge.backward(layout, store, hidden=4)

    def transport(self) -> list[tuple[tuple[int, ...], Tensor]]:
        """Rank 2 sends two batches to rank 0 and one to itself."""
        from actors.group import GroupTransport

        names = [("vision", 0), ("vision", 1), ("vision", 2)]
        carrier = GroupTransport(self.rank, names)
        batches = [
            EmbeddingBatch(
                values_ID=torch.full((n, 2), float(n)), item_ids=(n,) if n else (), lengths=(n,) if n else ()
            )
            for n in (3, 0, 2)
        ]
        if self.rank == 2:
            handles = [carrier.send(batch, ("vision", 0)) for batch in batches]
            own = carrier.receive(carrier.send(batches[0], ("vision", 2)))
            self.kept = (carrier, handles)
            return [(own.item_ids, own.values_ID)]
        from actors.group import GroupHandle

        told = [
            GroupHandle(sender=2, shape=(n, 2), dtype=torch.float32, item_ids=b.item_ids, lengths=b.lengths, starts=())
            for n, b in zip((3, 0, 2), batches, strict=True)
        ]
        arrived = [carrier.receive(handle) for handle in told]
        return [(batch.item_ids, batch.values_ID) for batch in arrived]


def rows_of_rank(rank: int) -> Tensor:
    count = sum(rows for _, rows in LISTS[rank])
    return torch.arange(count * 4, dtype=torch.float32).view(count, 4) + 100 * rank


def three_ranks(timeout_s: float) -> list[Any]:
    """Three actors that have joined one group."""
    import ray

    # The class goes to the actors by value: they do not have this folder on their path.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    remote = ray.remote(GroupProbe)
    ranks = [remote.options(num_cpus=0.1).remote() for _ in range(3)]
    address = ray.get(ranks[0].address.remote())
    ray.get([actor.join.remote(rank, address, timeout_s) for rank, actor in enumerate(ranks)])
    return ranks


@pytest.mark.ray
def test_group_of_three_processes(ray_cluster: None) -> None:
    import ray

    ranks = three_ranks(timeout_s=20.0)
    assert ray.get([actor.sum.remote(2.0**rank) for rank, actor in enumerate(ranks)]) == [7.0, 7.0, 7.0]
    items = {i: rows for rank in range(3) for (i, n), rows in _by_item(rank)}
    for num_chunks in (1, 3):
        answers = ray.get([actor.bridge.remote(num_chunks) for actor in ranks])
        halves = [seen for seen, _ in answers if seen is not None]
        assert torch.equal(torch.cat(halves, dim=1), torch.cat([items[2], items[0]]))
        for rank, (_, gradient) in enumerate(answers):
            assert torch.equal(gradient, 2 * rows_of_rank(rank))
    arrived, _, own = ray.get([ranks[0].transport.remote(), ranks[0].address.remote(), ranks[2].transport.remote()])
    assert [(ids, values.shape[0]) for ids, values in arrived] == [((3,), 3), ((), 0), ((2,), 2)]
    assert torch.equal(own[0][1], torch.full((3, 2), 3.0))
    ray.kill(ranks[1])
    with pytest.raises(ray.exceptions.RayTaskError, match="pool vision, rank 0, phase finish: the group of 3"):
        ray.get(ranks[0].sum.remote(1.0))
    for actor in (ranks[0], ranks[2]):
        ray.kill(actor)


@pytest.mark.ray
def test_a_peer_that_never_comes_is_waited_for_no_longer_than_the_time_out(ray_cluster: None) -> None:
    """All three are alive; one does not enter the collective."""
    import ray

    ranks = three_ranks(timeout_s=4.0)
    waiting = [ranks[rank].sum.remote(1.0) for rank in (0, 1)]
    for rank in (0, 1):
        text = rf"HangError: pool vision, rank {rank}, phase finish: the group of 3 did not answer within 4 s"
        with pytest.raises(ray.exceptions.RayTaskError, match=text):
            ray.get(waiting[rank], timeout=60)
    for actor in ranks:
        ray.kill(actor)


def _by_item(rank: int) -> list[tuple[tuple[int, int], Tensor]]:
    return (
        list(zip(LISTS[rank], rows_of_rank(rank).split([n for _, n in LISTS[rank]]), strict=True))
        if LISTS[rank]
        else []
    )
