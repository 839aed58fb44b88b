"""One rank's share of a pool's optimizer: whole parameters, so that every sum stays that of the single process.

A rank owns the masters and moments of its own parameters alone, and steps them.  A gradient term travels in pieces, to
each owner its own, and an owner adds the pieces of all ranks in the order of the terms; then it gives its weights on.
What else is shared depends on the recipe's word: pieces may leave as soon as their term is made, so that nobody holds a
whole gradient for longer; and weights of other ranks' parameters may be let go between two steps.  Cutting inside a
parameter would balance better by a parameter's size, yet the global norm is summed parameter by parameter, and its bits
would change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from omni_ray.balance.dispatch import assign
from omni_ray.config.training import OptimizerConfig
from omni_ray.training.optimizer import PoolOptimizer
from omni_ray.training.precision import Precision, copy_with, host_copy
from omni_ray.types.errors import PlanError

MOMENT_BYTES = 8
"""AdamW's two fp32 moments of a value."""
MASTER_BYTES = 4


class ShardedOptimizer(PoolOptimizer):
    """AdamW over one rank's parameters of a network.

    Args:
        pool, module, config, precision, offload: As in :class:`PoolOptimizer`.  rank, ranks: Who of how many this is.
        keeps_weights: Weights of other ranks' parameters stay here between two steps.
    """

    def __init__(
        self,
        pool: str,
        module: nn.Module,
        config: OptimizerConfig,
        precision: Precision,
        offload: bool,
        rank: int,
        ranks: int,
        keeps_weights: bool,
    ) -> None:
        self.rank, self.ranks, self.keeps_weights = rank, ranks, keeps_weights
        named = dict(module.named_parameters())
        self.sizes = {name: parameter.numel() for name, parameter in named.items()}
        """Values of every parameter, whether its weight is here or not."""
        self.owner = dict(zip(named, assign(list(self.sizes.values()), ranks), strict=True))
        """Rank of every parameter: the same on all ranks."""
        self._last = -1
        """Number of the newest term that was added."""
        super().__init__(pool, module, config, precision, offload)

    def _own(self, masters: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: master for name, master in masters.items() if self.owner[name] == self.rank}

    def take_pieces(self) -> list[Tensor]:
        """The gradient since the last call, cut by owner: for each rank one flat fp32 vector, where masters lie.

        Parameters without a gradient count as zeros; what was taken is cleared.
        """
        home = next((master.device for master in self.masters.values()), torch.device("cpu"))
        out = []
        for rank in range(self.ranks):
            names = [name for name, owner in self.owner.items() if owner == rank and self._trains(name)]
            cut = [self._take(self.parameters[name]).to(home).reshape(-1).float() for name in names]
            out.append(torch.cat(cut) if cut else torch.zeros(0, device=home))
        return out

    def _trains(self, name: str) -> bool:
        return self.parameters[name].requires_grad

    def _take(self, parameter: Tensor) -> Tensor:
        gradient, parameter.grad = parameter.grad, None
        return torch.zeros_like(parameter) if gradient is None else gradient

    def add_pieces(self, pieces: Mapping[int, Tensor]) -> None:
        """Add this rank's pieces of terms, by number, to those added before.

        Raises:
            PlanError: a term comes after one with a higher number: the sum would have other bits.
        """
        for number in sorted(pieces):
            if number <= self._last:
                raise PlanError(f"pool {self.pool}: gradient term {number} came after term {self._last}")
            self.add_terms([pieces[number]])
            self._last = number

    def squares(self) -> list[tuple[int, float]]:
        """Close the gradient of what this rank owns.

        Returns:
            (number of the parameter, sum of squares of its gradient) of what it owns; see :func:`add_up`.
        """
        self._last = -1
        self.close_terms()
        return [
            (number, self._square(self.masters[name]))
            for number, name in enumerate(self.parameters)
            if name in self.masters and self._trains(name)
        ]

    def clear(self) -> None:
        """Forget the gradient."""
        super().clear()
        self._last = -1

    def give(self) -> dict[str, Tensor]:
        """Weights of this rank's parameters as they are computed with, in host memory."""
        return {name: host_copy(self.parameters[name]) for name in self.masters}

    @torch.no_grad()
    def take(self, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """Take in the weights of all other ranks' parameters."""
        for shard in shards:
            for name, weight in shard.items():
                if name in self.masters:
                    continue
                parameter = self.parameters[name]
                if parameter.shape == weight.shape:
                    parameter.copy_(weight)
                else:
                    parameter.data = weight.to(parameter.device, copy=True)
                    # Memory may come again at the old address; layouts made of the old weights must not be taken.
                    increment_version([parameter])

    def release(self) -> None:
        """Let go of the weights of other ranks' parameters, unless they are kept."""
        for name, parameter in self.parameters.items():
            if name not in self.masters and not self.keeps_weights:
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
        held = self.parameters if self.keeps_weights else self.masters
        return sum(self._weight_bytes(name) for name in held) + self.state_bytes()

    def state_bytes(self) -> int:
        """Bytes of this rank's masters (where they are not the weights themselves) and moments."""
        return sum(self._state_bytes(name) for name in self.masters)

    def bytes_whole(self) -> int:
        """:meth:`bytes_at_rest` if this rank had everything."""
        return sum(self._weight_bytes(name) + self._state_bytes(name) for name in self.parameters)

    def _weight_bytes(self, name: str) -> int:
        return self.sizes[name] * self.parameters[name].element_size()

    def _state_bytes(self, name: str) -> int:
        return self.sizes[name] * (MASTER_BYTES * self._apart(name) + MOMENT_BYTES)

    def _apart(self, name: str) -> bool:
        """Whether a parameter has a master of its own: it is rounded, or its master lies in host memory."""
        parameter = self.parameters[name]
        return parameter.dtype != torch.float32 or (self.offload and parameter.device.type != "cpu")


def add_up(parts: Sequence[Sequence[tuple[int, float]]]) -> float:
    """Squared norm of a pool's gradient from the squares of all owners, added in the order of the parameters."""
    total = 0.0
    for _, value in sorted(pair for part in parts for pair in part):
        total += value
    return total
