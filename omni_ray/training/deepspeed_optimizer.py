"""DeepSpeed's ZeRO under a pool's optimizer: it shares state out, reduces gradients and steps; all else stays ours.

The network is used as it is: DeepSpeed's forward hooks are taken off, and with ZeRO-3 weights are gathered once a step.
Gradients of a step stay with their rank until :meth:`DeepSpeedOptimizer.reduce`, where DeepSpeed reduces all of them in
one fixed order; its hooks would reduce in the order of each rank's graph, which depends on what a micro-batch holds.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omni_ray.config.curriculum import Stage
from omni_ray.config.training import OptimizerConfig
from omni_ray.training.optimizer import Group, PoolOptimizer, part_of
from omni_ray.training.precision import copy_with, host_copy
from omni_ray.training.sharding import MASTER_BYTES, MOMENT_BYTES
from omni_ray.types.errors import ResourceError

FIELDS = ("exp_avg", "exp_avg_sq")


class DeepSpeedOptimizer(PoolOptimizer):
    """AdamW over shares that DeepSpeed cuts and keeps.

    Between stages, and after a state was put in, there is no engine: every rank has whole weights and moments.  With
    an engine, :meth:`weights`, :meth:`state_tensors`, :meth:`trained` and :meth:`set_stage` are calls that all ranks
    must make together.

    Args:
        pool, module, config: As in :class:`PoolOptimizer`, in fp32 on the host.  level: ZeRO stage, 1 to 3.
    """

    def __init__(self, pool: str, module: nn.Module, config: OptimizerConfig, level: int) -> None:
        super().__init__(pool, module, config)
        self._adam.param_groups.clear()  # the engine has an AdamW of its own
        self.level = level
        self._engine: Any = None
        self._block: Any = None
        self._gathered: Any = None
        self._norm_squared = 0.0
        self._state: dict[str, Tensor] = {}
        """Whole optimizer state by ``parameter::field``, while there is no engine."""

    # --- stages ------------------------------------------------------------------------------------------------------

    def set_stage(self, stage: Stage) -> bool:
        """Let the stage's parts train, under an engine of their own."""
        if self._engine is not None:
            weights, state = self.weights(), self.state_tensors()
            self.load_weights(weights)
            self._state = state
        live = super().set_stage(stage)
        if live:
            self._start()
        return live

    def _start(self) -> None:
        assert self.group is not None, "backend deepspeed needs join_group first"
        deepspeed = import_deepspeed(self.group)
        members: dict[tuple[str, bool], list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                members.setdefault((part_of(self.pool, name), parameter.ndim >= 2), []).append(parameter)
        decay = self.config.weight_decay
        # Rates are zero until the first step: DeepSpeed makes a step of its own to allocate the state.
        adam = torch.optim.AdamW(
            [
                {"params": params, "part": part, "weight_decay": decay if matrix else 0.0}
                for (part, matrix), params in members.items()
            ],
            lr=0.0,
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.eps,
            fused=True,
        )
        self._engine = deepspeed.initialize(
            model=self.module, optimizer=adam, config=engine_config(self.level), dist_init_required=False
        )[0]
        if self.level == 3:
            self._zero.parameter_offload._remove_module_hooks()
        self._put_state()

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def _dissolve(self) -> None:
        """Leave the engine: plain parameters again, whose values are still to be put in."""
        self._engine.destroy()
        self._engine = self._block = self._gathered = None
        fresh: dict[int, nn.Parameter] = {}
        for module in self.module.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    shape = getattr(old, "ds_shape", old.shape)
                    new = nn.Parameter(torch.zeros(shape, dtype=old.dtype, device=old.device), old.requires_grad)
                    module._parameters[name] = fresh.setdefault(id(old), new)
        self.parameters = dict(self.module.named_parameters())
        self.masters = dict(self.parameters)

    # --- the step ----------------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Take in all weights before a step's first forward, with ZeRO-3; all ranks together."""
        if self._engine is not None and self.level == 3 and self._gathered is None:
            self._gathered = self._whole_weights()
            self._gathered.__enter__()

    def _whole_weights(self) -> Any:
        return importlib.import_module("deepspeed").zero.GatheredParameters(list(self.parameters.values()))

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch; its gradient stays with this rank."""
        if self._engine is None:
            super().backward(loss)
            return
        self._open()
        self._engine.backward(loss)

    def _open(self) -> None:
        if self._block is None:
            self._block = self._engine.coalesce_grad_reduction()
            self._block.__enter__()

    def reduce(self, group: Group) -> None:
        """Sum the step's gradients over all ranks, each share to its owner, and let go of other ranks' weights."""
        self._open()
        for parameter in self._trained():
            if parameter.grad is None:  # all ranks must reduce the same parameters
                parameter.grad = torch.zeros_like(parameter)
        self._block.__exit__(None, None, None)
        self._block = None
        if self._gathered is not None:
            self._gathered.__exit__(None, None, None)
            self._gathered = None
        total = torch.zeros(1, dtype=torch.float64)
        for part in self._shares():
            part.mul_(group.ranks)  # DeepSpeed means over the ranks, a step's loss is a sum over them
            total += part.double().square().sum()
        group.sum_in_place(total, "finish")
        self._norm_squared = float(total)

    def norm_squared(self) -> float:
        """Sum of squares of the gradient, over all shares."""
        return self._norm_squared

    def _shares(self) -> Iterator[Tensor]:
        """This rank's parts of the reduced gradient."""
        for parts in self._zero.averaged_gradients.values():
            yield from parts or ()

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self.parameters.values() if parameter.requires_grad]

    def _step(self, scale: float, rate_of_part: Mapping[str, float]) -> None:
        if scale != 1.0:
            for part in self._shares():
                part.mul_(scale)
        for group in self._zero.param_groups:
            group["lr"] = rate_of_part[group["part"]]
        self._engine.step()

    def clear(self) -> None:
        """Forget the gradient."""
        super().clear()
        if self._engine is not None:
            for key in self._zero.averaged_gradients:
                self._zero.averaged_gradients[key] = None
            # Where a step was skipped the next gradient must replace this one, and not be added to it.
            self._zero.micro_step_id = 0 if self.level == 3 else -1

    # --- state -------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The network's whole state by name."""
        if self._engine is None or self.level < 3 or self._gathered is not None:
            return {name: value.clone() for name, value in self.module.state_dict().items()}
        with self._whole_weights():
            return {name: value.clone() for name, value in self.module.state_dict().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`weights`; ends the engine, the next stage begins another."""
        if self._engine is not None:
            self._dissolve()
        super().load_weights(weights)

    def trained(self, here: bool = True) -> nn.Module | None:
        """A copy of the whole network, as it is saved; None on ranks that only take part (``here`` is False)."""
        weights = self.weights()
        return copy_with(self.module, weights) if here else None

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole optimizer state in host memory by ``parameter::field``."""
        if self._engine is None:
            return {key: value.clone() for key, value in self._state.items()}
        out = {key: value for key, value in self._state.items() if not self._trains(key)}
        adam = self._zero.optimizer
        shares = list(self._fragments())
        for field in FIELDS:
            whole = {name: torch.zeros(shape).flatten() for name, shape in self._shapes().items()}
            for name, flat, start, place, count in shares:
                whole[name][place : place + count] = adam.state[flat][field][start : start + count]
            joined = torch.cat(list(whole.values()))
            self._group().sum_in_place(joined, "state")
            parts = joined.split([value.numel() for value in whole.values()])
            shapes = self._shapes()
            out |= {f"{n}::{field}": host_copy(p.view(shapes[n])) for n, p in zip(whole, parts, strict=True)}
        steps = {id(flat): adam.state[flat]["step"] for flat in self._flats()}
        for flat, parameters in self._flats_and_parameters():
            for name in parameters:
                out[f"{name}::step"] = host_copy(torch.as_tensor(steps[id(flat)], dtype=torch.float32))
        return out

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_tensors`; without an engine, that is after :meth:`load_weights`."""
        super().load_state_tensors(tensors)  # refuses what belongs to no parameter
        self._adam.state.clear()
        self._state = {key: host_copy(value) for key, value in tensors.items()}

    def bytes_at_rest(self) -> int:
        """Bytes of weights, masters and moments between two steps."""
        held = [getattr(parameter, "ds_tensor", parameter) for parameter in self.parameters.values()]
        return sum(tensor.nbytes for tensor in held) + self.state_bytes()

    def state_bytes(self) -> int:
        """Bytes of this rank's masters and moments; DeepSpeed has masters of its own in fp32, too."""
        state = self._zero.optimizer.state
        return sum(flat.nbytes + sum(state[flat][field].nbytes for field in FIELDS) for flat in self._flats())

    def bytes_whole(self) -> int:
        """Bytes of weights and moments of a rank that has everything, in the native way."""
        shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in self.parameters.values()]
        return sum(shape.numel() for shape in shapes) * (MASTER_BYTES + MOMENT_BYTES)

    def _put_state(self) -> None:
        """Give the engine this rank's shares of the whole state; what was never trained begins with zeros."""
        adam = self._zero.optimizer
        for flat, names in self._flats_and_parameters():
            step = self._state.get(f"{names[0]}::step", torch.zeros(()))
            adam.state[flat] = {"step": step.clone().float()} | {field: torch.zeros_like(flat) for field in FIELDS}
        for name, flat, start, place, count in self._fragments():
            for field in FIELDS:
                value = self._state.get(f"{name}::{field}")
                if value is not None:
                    adam.state[flat][field][start : start + count] = value.flatten()[place : place + count]

    def _trains(self, key: str) -> bool:
        return self.parameters[key.rpartition("::")[0]].requires_grad

    def _group(self) -> Group:
        assert self.group is not None
        return self.group

    def _shapes(self) -> dict[str, torch.Size]:
        named = {name: p for name, p in self.parameters.items() if p.requires_grad}
        return {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in named.items()}

    def _flats(self) -> Sequence[Tensor]:
        """This rank's flat fp32 shares, one a group of parameters."""
        flats: Sequence[Tensor] = (
            self._zero.fp32_partitioned_groups_flat if self.level == 3 else self._zero.single_partition_of_fp32_groups
        )
        return flats

    def _flats_and_parameters(self) -> list[tuple[Tensor, list[str]]]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        groups = self._zero.fp16_groups if self.level == 3 else self._zero.bit16_groups
        return [(flat, [names[id(p)] for p in group]) for flat, group in zip(self._flats(), groups, strict=True)]

    def _fragments(self) -> Iterator[tuple[str, Tensor, int, int, int]]:
        """(parameter, flat share, start there, start in the parameter, values) of what this rank owns."""
        for flat, names in self._flats_and_parameters():
            for name in names:
                parameter: Any = self.parameters[name]
                if self.level == 3:
                    _, start, count = self._zero.grad_position[self._zero.get_param_id(parameter)]
                    place = count * self._group().rank
                    count = min(count, parameter.ds_numel - place)  # the last share may be padded
                    if count > 0:
                        yield name, flat, start, place, count
                elif parameter._hp_mapping is not None:
                    there, here = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
                    yield name, flat, there.start, here.start, here.numel


def engine_config(level: int) -> dict[str, Any]:
    """DeepSpeed's settings: it reduces, shares and steps; clipping (on by default), sums and rates are ours."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": level, "overlap_comm": False},
    }


def import_deepspeed(group: Group) -> Any:
    """DeepSpeed, told who this process is, with all its waits in the pool's own (bounded) process group.

    Raises:
        ResourceError: it is not installed.
    """
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "RANK": str(group.rank), "WORLD_SIZE": str(group.ranks)}
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as problem:
        raise ResourceError(
            f"pools.language.backend is deepspeed, which cannot be imported ({problem}); install it, or choose native"
        ) from problem
    # Its shared-memory collectives would have to be compiled, and wait for a lost peer without end.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
