"""A second device made of host memory, ``away``: to see without a GPU that every tensor stands where it should.

It has the rules of an accelerator: tensors of two devices do not meet in one operation, ``numpy()`` is refused, copies
are asked for by name.  It computes with the host's kernels.  Registering it is for the life of the process, so tests
use it in a process of their own.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

NAME = "away"
MAY_MIX = {
    "aten::_to_copy",
    "aten::copy_",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}
"""Operations that an accelerator, too, takes with host tensors: copies, and indexing by host numbers."""
crossings: Counter[str] = Counter()
"""Copies between host and device, by direction."""


class AwayTensor(torch.Tensor):
    """A tensor that says it is on the second device."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> AwayTensor:
        """Wrap host memory."""
        out: AwayTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        out.inner = inner
        return out

    def __init__(self, inner: torch.Tensor) -> None: ...

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """The values; given others, their memory goes with them, as it does on an accelerator."""
        return self.detach()

    @data.setter
    def data(self, value: AwayTensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation with a tensor of this device."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    name = func._schema.name
    here = [tensor for tensor in tensors if not isinstance(tensor, AwayTensor) and tensor.dim()]
    if here and len(here) < len(tensors) and name not in MAY_MIX:
        raise RuntimeError(f"{func} got tensors on {NAME} and on the host; expected all of them on one device")
    asked = kwargs.get("device")
    away = torch.device(asked).type == NAME if asked is not None else _stays(name, args, tensors)
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if name in ("aten::_to_copy", "aten::copy_"):
        source = args[1] if name == "aten::copy_" else args[0]
        if isinstance(source, AwayTensor) != away:
            crossings["to away" if away else "to host"] += 1
    back = {id(_inner(tensor)): tensor for tensor in tensors}
    # A wrapper made inside inference mode has no version and cannot be viewed.
    with _no_inference(), torch.no_grad():
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        return tree_map(lambda leaf: _wrapped(leaf, back, away), out)


def _no_inference() -> contextlib.AbstractContextManager[Any]:
    inside = torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inside else contextlib.nullcontext()


def _stays(name: str, args: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether the result is on the device, where no argument says so: an in-place copy stays where its target is."""
    decides = args[:1] if name in ("aten::copy_", "aten::index_put_", "aten::_index_put_impl_") else tensors
    return any(isinstance(tensor, AwayTensor) for tensor in decides)


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, AwayTensor) else leaf


def _wrapped(leaf: Any, back: dict[int, torch.Tensor], away: bool) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if id(leaf) in back:  # an in-place operation gives its argument back
        return back[id(leaf)]
    return AwayTensor(leaf) if away else leaf


def register() -> torch.library.Library:
    """Make the device known to torch; keep what is returned as long as it is used."""
    from torch.utils import backend_registration as torch_side

    class Module(torch_side._DummyBackendModule):
        """What recomputation asks of a device's module."""

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_side._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
        library = torch.library.Library("_", "IMPL")
        fallback: Callable[..., Any] = lambda op, *args, **kwargs: _run(op, args, kwargs)  # noqa: E731
        library.fallback(fallback, "PrivateUse1")
    return library
