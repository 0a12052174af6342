"""Whether gradients through a model are right, found out before training on them.

A host may run layers that autograd cannot follow, cuts off, or that overwrite what it needs.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lora import Lora
from ..protocols import FlowModel

PRECISE = (torch.float32, torch.float64)
TOLERANCE, LOW_PRECISION_TOLERANCE = 0.01, 0.15
"""Largest relative difference; rounding to 16 bit blurs the finite difference."""
ADVICE = (
    "training on it would learn nothing, so it was not started. Remove nodes that speed the MODEL up (torch.compile, "
    "attention or fp8 patches, caches), start ComfyUI without --fast, or update ComfyUI"
)


def check_gradients(model: FlowModel, cond: Any, dtype: torch.dtype, title: str) -> float:
    """Compare slopes along two directions with finite differences; returns the larger relative difference.

    ``cond`` holds at least one prompt, ``dtype`` is what the network computes in. Raises RuntimeError with the
    reason. The LoRA is left as it was.
    """
    kept = [p.detach().clone() for p in model.lora.parameters()]
    try:
        shake(model.lora)
        sample = Sample(model, cond)
        gradients = Gradients.of(sample)
        complain_about_cut_layers(sample, gradients, title)
        # Faults anywhere spoil the gradient that has gone through the whole network: that of the first block.
        pairs = [slopes(sample, gradients, layers, dtype) for layers in (first_block(model.lora.names), ...)]
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as problem:
        if ADVICE in str(problem):
            raise
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise RuntimeError(f"this host cannot compute gradients of {title} ({reason}); {ADVICE}") from problem
    finally:
        put_back(model.lora, kept)
    worst = 0.0
    for slope, measured in pairs:
        difference = abs(slope - measured) / max(abs(measured), abs(slope), 1e-30)
        if not difference < (TOLERANCE if dtype in PRECISE else LOW_PRECISION_TOLERANCE):
            found = f"slope {slope:.3g}, but {measured:.3g} measured"
            raise RuntimeError(f"this host computes wrong gradients of {title} ({found}); {ADVICE}")
        worst = max(worst, difference)
    return worst


@torch.no_grad()
def shake(lora: Lora) -> None:
    """Random B, so that A matters too; the update of each layer becomes about 5 % of its input."""
    for down, up in zip(lora.down, lora.up, strict=True):
        length = 0.05 * (down.shape[0] / down.shape[1]) ** 0.5 / max(lora.scale, 1e-6)
        up.copy_(normal(tuple(up.shape)) * length)


@torch.no_grad()
def put_back(lora: Lora, values: Sequence[Tensor]) -> None:
    """Restore the parameters."""
    for parameter, value in zip(lora.parameters(), values, strict=True):
        parameter.copy_(value)


class Sample:
    """One random state, and a random projection of its velocity to a number."""

    def __init__(self, model: FlowModel, cond: Any):
        self.model, self.cond = model, cond
        self.x, self.weight = (normal((1, *model.latent_shape), seed).to(model.device) for seed in (1, 2))
        self.sigma, self.rows = torch.tensor([0.7], device=model.device), torch.zeros(1, dtype=torch.long)

    def velocity(self) -> Tensor:
        """[1, ...]"""
        return self.model.velocity(self.x, self.sigma, self.cond, self.rows)

    def project(self, velocity: Tensor) -> Tensor:
        """A number of the size of a policy loss's derivative."""
        return (velocity * self.weight).mean()


class Gradients(NamedTuple):
    """Of a sample, by autograd."""

    down: list[Tensor | None]
    up: list[Tensor | None]
    velocity: Tensor

    @staticmethod
    def of(sample: Sample) -> "Gradients":
        """One forward and backward pass."""
        lora = sample.model.lora
        with torch.enable_grad():
            velocity = sample.velocity()
            parameters = [*lora.down, *lora.up]
            found = list(torch.autograd.grad(sample.project(velocity), parameters, allow_unused=True))
        found = [None if g is None or not g.any() else g for g in found]
        return Gradients(found[: len(lora.names)], found[len(lora.names) :], velocity.detach())


@torch.no_grad()
def complain_about_cut_layers(sample: Sample, gradients: Gradients, title: str) -> None:
    """Raise RuntimeError when layers without a gradient change the velocity all the same."""
    lora = sample.model.lora
    silent = [i for i, gradient in enumerate(gradients.up) if gradient is None]
    for i in silent:
        lora.up[i].zero_()
    change = (sample.velocity() - gradients.velocity).abs().max() if silent else torch.zeros(())
    if change > 1e-4 * gradients.velocity.abs().max():
        names = ", ".join(lora.names[i] for i in silent[:3])
        raise RuntimeError(f"this host gives {len(silent)} layers of {title} no gradient ({names}, ...); {ADVICE}")


def first_block(names: Sequence[str]) -> list[int]:
    """The layers of the block that comes first, e.g. of ``joint_blocks.0``."""

    def natural(name: str) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    first = ".".join(min(names, key=natural).split(".")[:2]) + "."
    return [i for i, name in enumerate(names) if f"{name}.".startswith(first)]


def slopes(sample: Sample, gradients: Gradients, layers: Any, dtype: torch.dtype) -> tuple[float, float]:
    """The slope by autograd, and by a central finite difference, when each of ``layers`` moves along its gradient.

    All move by the same length; ``...`` means all layers.
    """
    lora = sample.model.lora
    chosen = range(len(lora.names)) if layers is ... else layers
    moved = [(lora.down[i], gradients.down[i]) for i in chosen] + [(lora.up[i], gradients.up[i]) for i in chosen]
    directions = [(p, g / g.norm(), float(g.double().norm())) for p, g in moved if g is not None]
    slope = sum(length for _, _, length in directions)
    if slope != slope or slope == 0:
        raise RuntimeError(f"the gradient is {slope}")
    velocity = gradients.velocity.double()
    spread = float(velocity.square().mean().sqrt()) / velocity.numel() ** 0.5
    step = (0.1 if dtype in PRECISE else 0.5) * spread / slope

    @torch.no_grad()
    def at(distance: float) -> float:
        for parameter, direction, _ in directions:
            parameter.add_(direction, alpha=distance)
        value = float(sample.project(sample.velocity()).double())
        for parameter, direction, _ in directions:
            parameter.add_(direction, alpha=-distance)
        return value

    return slope, (at(step) - at(-step)) / (2 * step)


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random numbers that leave the global generator alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
