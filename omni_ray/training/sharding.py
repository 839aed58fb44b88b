"""One rank's share of a pool's optimizer: whole parameters, so that every sum stays that of the single process.

At rest a rank holds the weights, masters and moments of its own parameters alone.  The others' weights are taken in
before a step's first forward and let go when its gradient is closed.  A gradient term travels in pieces, to each owner
its own, and an owner adds the pieces of all ranks in the order of the terms.  Cutting inside a parameter would balance
better by a parameter's size, yet the global norm is summed parameter by parameter, and its bits would change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from omni_ray.balance.dispatch import assign
from omni_ray.config.training import OptimizerConfig
from omni_ray.training.optimizer import PoolOptimizer
from omni_ray.training.precision import Precision, copy_with, host_copy

MOMENT_BYTES = 8
"""AdamW's two fp32 moments of a value."""
MASTER_BYTES = 4


class ShardedOptimizer(PoolOptimizer):
    """AdamW over one rank's parameters of a network.

    Args:
        pool, module, config, precision: As in :class:`PoolOptimizer`.  rank, ranks: Who of how many this is.
    """

    def __init__(
        self, pool: str, module: nn.Module, config: OptimizerConfig, precision: Precision, rank: int, ranks: int
    ) -> None:
        self.rank, self.ranks = rank, ranks
        named = dict(module.named_parameters())
        self.sizes = {name: parameter.numel() for name, parameter in named.items()}
        """Values of every parameter, whether its weight is here or not."""
        self.owner = dict(zip(named, assign(list(self.sizes.values()), ranks), strict=True))
        """Rank of every parameter: the same on all ranks."""
        super().__init__(pool, module, config, precision)

    def _own(self, masters: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: master for name, master in masters.items() if self.owner[name] == self.rank}

    def take_term(self) -> Tensor:
        """The gradient of all parameters since the last call as one flat fp32 vector [P]; clears it."""
        trainable = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trainable]
        flat = torch.cat([grad.reshape(-1).float() for grad in grads])
        self.clear()
        return flat

    def pieces(self, rows_NP: Tensor) -> list[Tensor]:
        """Rows of flat terms, cut by owner: for each rank [N, values of its parameters that train]."""
        if not rows_NP.numel():
            return [rows_NP] * self.ranks
        names = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        columns = dict(zip(names, rows_NP.split([self.sizes[name] for name in names], dim=1), strict=True))
        empty = rows_NP[:, :0]
        return [
            torch.cat([empty, *(columns[name] for name in names if self.owner[name] == rank)], dim=1)
            for rank in range(self.ranks)
        ]

    def squares(self) -> list[tuple[int, float]]:
        """(number of the parameter, sum of squares of its gradient) of what this rank owns; see :func:`add_up`."""
        self.close_term()
        out = []
        for number, name in enumerate(self.parameters):
            if name in self.masters and self.parameters[name].requires_grad:
                out.append((number, self._square(self.masters[name])))
        return out

    def give(self) -> dict[str, Tensor]:
        """Weights of this rank's parameters as they are computed with, in host memory."""
        return {name: host_copy(self.parameters[name]) for name in self.masters}

    @torch.no_grad()
    def take(self, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """Take in the weights of all other ranks' parameters."""
        for shard in shards:
            for name, weight in shard.items():
                if name not in self.masters:
                    parameter = self.parameters[name]
                    parameter.data = weight.to(parameter.device, copy=True)

    def release(self) -> None:
        """Let go of the weights of other ranks' parameters."""
        for name, parameter in self.parameters.items():
            if name not in self.masters:
                parameter.data = parameter.data.new_empty(0)

    def weights(self) -> dict[str, Tensor]:
        """Masters of this rank's parameters, and the network's buffers."""
        own = {name: master.detach() for name, master in self.masters.items()}
        return {name: value for name, value in self.module.state_dict().items() if name not in self.parameters} | own

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`weights`; other ranks' weights are as before."""
        self._load(weights, strict=False)

    def trained_with(self, shards: Sequence[Mapping[str, Tensor]]) -> nn.Module:
        """A copy of the whole network in host memory, as it is saved; ``shards``: masters of every rank."""
        return copy_with(self.module, {name: master for shard in shards for name, master in shard.items()})

    def bytes_at_rest(self) -> int:
        """Bytes of weights, masters and moments between two steps."""
        return sum(self._bytes(name) for name in self.masters)

    def bytes_whole(self) -> int:
        """The same if this rank had everything."""
        return sum(self._bytes(name) for name in self.parameters)

    def _bytes(self, name: str) -> int:
        parameter = self.parameters[name]
        rounded = parameter.dtype != torch.float32
        return self.sizes[name] * (parameter.element_size() + MASTER_BYTES * rounded + MOMENT_BYTES)


def add_up(parts: Sequence[Sequence[tuple[int, float]]]) -> float:
    """Squared norm of a pool's gradient from the squares of all owners, added in the order of the parameters."""
    total = 0.0
    for _, value in sorted(pair for part in parts for pair in part):
        total += value
    return total
