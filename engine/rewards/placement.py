"""Where the weights of a reward model are while it computes, and where they rest."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated

import torch
from torch import nn

from ..knobs import Choice

Placement = Annotated[
    str,
    Choice(("swap", "resident", "cpu"), "swap: on the GPU only while scoring; resident: stays there; cpu: never"),
]
Manager = Callable[[nn.Module, str], AbstractContextManager[torch.device]]
"""(model, placement) -> a context in which it is where it shall compute; it yields that device."""
MANAGERS: list[Manager] = []
"""A host that manages the memory of its accelerator appends its own way; the last one is used."""


@contextmanager
def placed(model: nn.Module, near: torch.device, placement: str) -> Iterator[torch.device]:
    """Have the weights where they compute for a while; ``near``: where the images are. Yields that device."""
    if MANAGERS and placement != "cpu":
        with MANAGERS[-1](model, placement) as device:
            yield device
        return
    device = computing_device(near, placement)
    move(model, device)
    try:
        yield device
    finally:
        if placement == "swap":
            move(model, torch.device("cpu"))


@torch.inference_mode(False)
def move(model: nn.Module, device: torch.device) -> None:
    """To ``device``. Weights moved in inference mode, where hosts run nodes, could not be moved outside of it."""
    model.to(device)


def computing_device(near: torch.device, placement: str) -> torch.device:
    """The images' accelerator, or the current CUDA device; the CPU when there is none or it was asked for."""
    if placement == "cpu" or near.type not in ("cpu", "meta"):
        return torch.device("cpu") if placement == "cpu" else near
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
