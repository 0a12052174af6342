"""An accelerator where there is none: its tensors say that they are on another device, and compute on the CPU.

As with a real one, an operation on tensors of two devices fails, so a forgotten ``.to(device)`` is found. Its device is
called ``meta``: PyTorch's autograd knows no other without having it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ACCELERATOR = torch.device("meta")
CPU = torch.device("cpu")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
"""Operations whose tensors may be on two devices."""


class Away(torch.Tensor):
    """A tensor on the accelerator; what it holds is in ``inner``."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Away":
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=ACCELERATOR, **place)
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor):
        pass

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"Away({self.inner})"


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of tensors here and away. Raises RuntimeError when they cannot meet."""
    device = kwargs.get("device")
    found = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    away = any(isinstance(value, Away) for value in found)
    if away and function not in MOVES:
        indices = tree_leaves(args[1]) if function._schema.name.startswith("aten::index") else []
        free = set(map(id, indices))
        here = [value for value in found if not isinstance(value, Away) and value.ndim and id(value) not in free]
        if here:
            raise RuntimeError(f"{function} of tensors on two devices")
    on_the_cpu = tree_map(inner, kwargs) | ({} if device is None else {"device": CPU})
    result = function(*tree_map(inner, args), **on_the_cpu)
    if function._schema.name.endswith("_") and isinstance(args[0], torch.Tensor):
        return args[0]  # what was changed in place
    if torch.device(device).type == ACCELERATOR.type if device is not None else away:
        return tree_map(lambda value: Away(value) if isinstance(value, torch.Tensor) else value, result)
    return result


def inner(value: Any) -> Any:
    """The same on the CPU."""
    return value.inner if isinstance(value, Away) else value


class Computes(TorchDispatchMode):
    """Takes what is made there from nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


class Makes(TorchFunctionMode):
    """Takes what is made there from plain numbers, which PyTorch does without an operation."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function is torch.tensor and device is not None and torch.device(device).type == ACCELERATOR.type:
            return function(*args, **kwargs | {"device": CPU}).to(device)
        if function is torch.Tensor.new_tensor and isinstance(args[0], Away):
            return torch.tensor(args[1], dtype=args[0].dtype).to(ACCELERATOR)
        return function(*args, **kwargs)


@contextmanager
def accelerator() -> Iterator[None]:
    """Within it there is one."""
    with Computes(), Makes():
        yield
