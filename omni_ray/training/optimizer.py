"""One optimizer per pool, one global norm over all pools, ordered sums of gradient terms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from omni_ray.config.curriculum import LearningRate, Stage
from omni_ray.config.training import OptimizerConfig
from omni_ray.training.precision import Precision, compute_in, copy_with, host_copy
from omni_ray.types.errors import CheckpointError


def part_of(pool: str, parameter: str) -> str:
    """Which ``trainable`` word of a stage a parameter belongs to."""
    if pool == "language":
        return "audio_heads" if parameter.startswith(("audio_embeddings.", "audio_heads.")) else "language"
    return f"{pool}_projector" if parameter.startswith("projector.") else pool


def rates(lr: LearningRate, step: int, steps: int) -> dict[str, float]:
    """Learning rate of every part at ``step`` of a stage of ``steps``: linear warm-up, then a line or a cosine."""
    if step < lr.warmup_steps:
        base = lr.peak * (step + 1) / lr.warmup_steps
    else:
        share = (step - lr.warmup_steps) / max(1, steps - lr.warmup_steps)
        share = share if lr.shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * share))
        base = lr.peak + (lr.end - lr.peak) * share
    scales = {"vision": lr.vision_scale, "audio": lr.audio_scale}
    scales |= {"vision_projector": lr.projector_scale, "audio_projector": lr.projector_scale}
    return {part: base * scales.get(part, 1.0) for part in ("language", "audio_heads", *scales)}


class Group(Protocol):
    """What is used of a pool's process group."""

    rank: int
    ranks: int

    def sum_in_place(self, values: Tensor, phase: str) -> None:
        """Add over all ranks."""


class PoolOptimizer:
    """AdamW over one network, with the stage deciding what trains.

    Gradients of a step are the sum of terms in a fixed order.  On a single rank the terms are added as they come, in
    submission order; with several ranks each keeps its terms, exchanges them, and adds all of them in the same order:
    the same additions, so the same bits.

    A network that computes in bf16 trains fp32 masters: its weights are their rounded values, every gradient term is
    widened before it is added, and AdamW sees masters alone.  In fp32 a parameter is its own master.

    Args:
        pool: Name of the pool.  module: Its network, on the device that computes.  config: Of the run.
        precision: What the network computes in.
        offload: Masters, their gradients and moments lie in host memory, and AdamW runs there; on a host that computes
            itself they are there anyway.
    """

    def __init__(
        self,
        pool: str,
        module: nn.Module,
        config: OptimizerConfig,
        precision: Precision = "fp32",
        offload: bool = False,
    ) -> None:
        self.pool = pool
        self.offload = offload
        self.group: Group | None = None
        """The pool's process group, where it has one."""
        self.config = config
        self.module = module
        self.parameters = dict(module.named_parameters())
        self.masters = self._own(compute_in(module, precision, offload))
        """What is trained and saved, by parameter name."""
        self._total: Tensor | None = None
        """Sum of the flat terms added so far."""
        groups: dict[tuple[str, bool], list[Tensor]] = {}
        for name, master in self.masters.items():
            groups.setdefault((part_of(pool, name), master.ndim >= 2), []).append(master)
        self._adam = torch.optim.AdamW(
            [
                {"params": members, "part": part, "weight_decay": config.weight_decay if matrix else 0.0}
                for (part, matrix), members in groups.items()
            ],
            lr=1e-3,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def _own(self, masters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The masters that are trained here."""
        return masters

    def set_stage(self, stage: Stage) -> bool:
        """Let the stage's parts train; returns whether anything of this pool does."""
        live = False
        for name, parameter in self.parameters.items():
            trains = part_of(self.pool, name) in stage.trainable
            parameter.requires_grad_(trains)
            live = live or trains
        return live

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch."""
        loss.backward()

    def gather(self) -> None:
        """Take in weights that are let go between steps; here none are."""

    def reduce(self, group: Group) -> None:
        """Sum the gradient over all ranks of a group, in its library's order."""
        flat = self.take_term()
        group.sum_in_place(flat, "finish")
        self.put_terms([flat])

    def close_term(self) -> None:
        """Add what the backward left since the last call, as one term, to the gradient of the masters."""
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if master is not parameter and parameter.grad is not None:
                wide = parameter.grad.to(master.device).to(master.dtype)
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                parameter.grad = None

    def take_term(self) -> Tensor:
        """The gradient since the last call as one flat vector [P]; parameters without one count as zeros."""
        self.close_term()
        flat = torch.cat([_gradient(master).reshape(-1) for master in self._trainable()])
        self.clear()
        return flat

    def put_terms(self, terms: Iterable[Tensor]) -> None:
        """Set the gradient to the sum of flat terms, added in the given order; they may lie in host memory."""
        self.add_terms(terms)
        self.close_terms()

    def add_terms(self, terms: Iterable[Tensor]) -> None:
        """Add flat terms to those added before, in the given order."""
        for term in terms:
            self._total = term.clone() if self._total is None else self._total.add_(term)

    def close_terms(self) -> None:
        """Set the gradient to the sum of the terms added."""
        total, self._total = self._total, None
        if total is None:
            return
        start = 0
        for master in self._trainable():
            size = master.numel()
            master.grad = total[start : start + size].view_as(master).to(master.device)
            start += size

    def norm_squared(self) -> float:
        """Sum of squares of the gradient, accumulated in fp64 in parameter order.

        A parameter that no row of the step touched gets a gradient of zeros, on one rank or many: AdamW skips missing
        gradients but not zeros, and pool sizes must not change what it does.
        """
        self.close_term()
        total = 0.0
        for master in self._trainable():
            total += self._square(master)
        return total

    def _square(self, master: Tensor) -> float:
        master.grad = _gradient(master)
        return float(master.grad.double().square().sum())

    def apply(self, norms_squared: Sequence[float], rate_of_part: Mapping[str, float]) -> tuple[float, bool]:
        """Clip by the global norm and step; a non-finite norm skips the step, here as in every other pool.

        Args:
            norms_squared: :meth:`norm_squared` of every pool, in the fixed pool order.
            rate_of_part: Learning rates of :func:`rates`.
        Returns:
            The global norm, and whether the step was made.
        """
        total = 0.0
        for value in norms_squared:
            total += value
        norm = math.sqrt(total) if math.isfinite(total) and total >= 0 else math.nan
        made = math.isfinite(norm)
        if made:
            limit = self.config.clip_norm
            self._step(limit / norm if limit and norm > limit else 1.0, rate_of_part)
        self.clear()
        return norm, made

    def _step(self, scale: float, rate_of_part: Mapping[str, float]) -> None:
        if scale != 1.0:
            for master in self._trainable():
                if master.grad is not None:
                    master.grad.mul_(scale)
        for group in self._adam.param_groups:
            group["lr"] = rate_of_part[group["part"]]
        self._adam.step()
        self._round_weights()

    def clear(self) -> None:
        """Forget the gradient."""
        self._total = None
        for tensor in (*self.parameters.values(), *self.masters.values()):
            tensor.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradient by parameter name."""
        return {name: master.grad for name, master in self.masters.items() if master.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        """The network's state by name, masters in place of rounded weights."""
        return self.module.state_dict() | {name: master.detach() for name, master in self.masters.items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`weights`."""
        self._load(weights, strict=True)

    @torch.no_grad()
    def _load(self, weights: Mapping[str, Tensor], strict: bool) -> None:
        self.module.load_state_dict(weights, strict=strict)
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                master.copy_(weights[name])

    def trained(self, here: bool = True) -> nn.Module | None:
        """A copy of the network in host memory, as it is saved: with masters for weights.

        Args:
            here: Whether this rank needs it; without, None.
        """
        return copy_with(self.module, self.masters) if here else None

    def state_tensors(self) -> dict[str, Tensor]:
        """A copy of the optimizer state in host memory by parameter name, for safetensors."""
        out: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            for key, value in self._adam.state.get(master, {}).items():
                out[f"{name}::{key}"] = host_copy(value)
        return out

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_tensors`.

        Raises:
            CheckpointError: a tensor belongs to no parameter of this network.
        """
        self._adam.state.clear()
        for key, value in tensors.items():
            name, _, field = key.rpartition("::")
            if name not in self.parameters:
                raise CheckpointError(f"optimizer tensor {key!r} belongs to no parameter of the {self.pool} network")
            master = self.masters.get(name)
            if master is not None:
                self._adam.state[master][field] = value.to(master.device, copy=True)

    def _trainable(self) -> list[Tensor]:
        """Masters of what trains."""
        return [master for name, master in self.masters.items() if self.parameters[name].requires_grad]

    @torch.no_grad()
    def _round_weights(self) -> None:
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)


def _gradient(master: Tensor) -> Tensor:
    return master.grad if master.grad is not None else torch.zeros_like(master)
