"""Exploration: where noise is injected, the starting noise, and the GRPO groups of one prompt.

All of it is tables over chains and steps. G group size. The last step is never noisy: its noise would stay in
the image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from .data import Plan
from .knobs import Choice, Knob, flag
from .randomness import Key, Purpose, normal, rng

Window = Callable[[Key, int], range]
"""(key of the group, num_steps) -> the steps that get noise."""

GroupSize = Annotated[int, Knob(2, 128, "images compared with each other")]


def all_steps(key: Key, num_steps: int) -> range:
    """Every step but the last (Flow-GRPO)."""
    return range(num_steps - 1)


def fixed_window(size: int, first: int = 0) -> Window:
    """The same ``size`` steps in every iteration (MixGRPO-Flash*: the first ones)."""

    def window(key: Key, num_steps: int) -> range:
        fitting(first + size, num_steps)
        return range(first, first + size)

    return window


def sliding_window(size: int, first: int, end: int, every: int, roll_back: bool) -> Window:
    """MixGRPO (arXiv 2507.21802): one step later each ``every`` iterations, inside steps ``first`` to ``end`` - 1.

    At the end it starts over (``roll_back``, the authors' code) or stays (the paper).
    """

    def window(key: Key, num_steps: int) -> range:
        latest = latest_start(size, first, end, num_steps)
        moved, places = key[1] // every, latest - first + 1
        start = first + (moved % places if roll_back else min(moved, places - 1))
        return range(start, start + size)

    return window


def random_window(size: int, first: int, end: int) -> Window:
    """Flow-GRPO-Fast: each group draws its window anew, inside steps ``first`` to ``end`` - 1."""

    def window(key: Key, num_steps: int) -> range:
        latest = latest_start(size, first, end, num_steps)
        start = int(rng(Purpose.WINDOW, *key).integers(first, latest + 1))
        return range(start, start + size)

    return window


def latest_start(size: int, first: int, end: int, num_steps: int) -> int:
    """The last place of a window inside steps ``first`` to ``end`` - 1; 0 = to the end. ValueError when it has none."""
    noisy = fitting(first + size, num_steps)
    latest = min(end or noisy, noisy) - size
    if latest < first:
        raise ValueError(
            f"a window of {size} steps does not fit between steps {first} and {end}; lower window_size or raise "
            "window_end"
        )
    return latest


def fitting(end: int, num_steps: int) -> int:
    """The number of steps that can be noisy. Raises ValueError when a window that ends at ``end`` has no place."""
    if end > num_steps - 1:
        raise ValueError(
            f"a window that reaches to step {end} does not fit: of {num_steps} denoising steps {num_steps - 1} can be "
            "noisy; raise num_steps or lower window_size"
        )
    return num_steps - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """G whole chains per prompt, noisy at the steps of a window that the group shares."""

    group_size: GroupSize = 24
    shared_noise: Annotated[bool, flag("start all images of a group from the same noise (DanceGRPO, MixGRPO)")] = False
    window: Annotated[
        str,
        Choice(
            ("all", "fixed", "sliding", "random"),
            "noisy and trained steps; the others are ODE steps (sliding: MixGRPO, random: Flow-GRPO-Fast)",
        ),
    ] = "all"
    window_size: Annotated[int, Knob(1, 99, "steps in a window")] = 4
    window_first: Annotated[int, Knob(0, 98, "a window lies at or after this step")] = 0
    window_end: Annotated[int, Knob(0, 99, "a window lies before this step; 0 = anywhere")] = 0
    window_every: Annotated[int, Knob(1, 100_000, "iterations until a sliding window moves one step")] = 25
    roll_back: Annotated[bool, flag("a sliding window starts over when it came to the end; otherwise it stays")] = True
    train_fraction: Annotated[
        float, Knob(0.01, 1.0, "random part of the noisy steps of each chain that is trained (DanceGRPO: 0.6)")
    ] = 1.0

    def __call__(self, latent_shape: tuple[int, ...], rates: Tensor, key: Key) -> Plan:
        """[T] noise rates -> the plan of one prompt. Raises ValueError when the window does not fit."""
        num_steps = len(rates)
        steps = list(self.place(key, num_steps))
        table = torch.zeros(self.group_size, num_steps)
        table[:, steps] = rates[steps]
        lottery = torch.from_numpy(rng(Purpose.TRAINED_STEPS, *key).random((self.group_size, num_steps)))
        rank = lottery.where(table > 0, 2.0).argsort(1).argsort(1)
        chain = torch.arange(self.group_size)
        root = torch.zeros_like(chain) if self.shared_noise else chain
        return Plan(
            noise=starting_noise(latent_shape, root, key),
            prompt=torch.zeros_like(chain),
            root=root,
            rate=table,
            train=(rank < max(1, int(self.train_fraction * len(steps)))) & (table > 0),
            group=torch.zeros_like(chain),
            seed=chain,
            key=(key,) * self.group_size,
        )

    def place(self, key: Key, num_steps: int) -> range:
        """The noisy steps of a group."""
        size, first, end = self.window_size, self.window_first, self.window_end
        windows = {
            "all": all_steps,
            "fixed": fixed_window(size, first),
            "sliding": sliding_window(size, first, end, self.window_every, self.roll_back),
            "random": random_window(size, first, end),
        }
        return windows[self.window](key, num_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """From the ODE trunk of each seed, at each of the first steps, G chains that are noisy there alone.

    TempFlow-GRPO (arXiv 2508.04324) and G2RPO (arXiv 2510.01982). The chains of one seed and step form a group. Until
    they branch they are one state, which is computed once, in sampling and in training.
    """

    group_size: GroupSize = 12
    num_seeds: Annotated[int, Knob(1, 64, "starting noises per prompt (TempFlow-GRPO: 4)")] = 1
    branch_share: Annotated[
        float, Knob(0.01, 1.0, "part of the steps, from the first on, at which chains branch (G2RPO: 0.5)")
    ] = 1.0
    across_seeds: Annotated[bool, flag("compare the branches of one step over all starting noises of a prompt")] = False

    def __call__(self, latent_shape: tuple[int, ...], rates: Tensor, key: Key) -> Plan:
        """[T] noise rates -> the plan of one prompt: seeds x steps x children, in this order."""
        num_steps = len(rates)
        num_branches = min(max(1, int(self.branch_share * num_steps)), num_steps - 1)
        root = torch.arange(self.num_seeds).repeat_interleave(num_branches * self.group_size)
        branch = torch.arange(num_branches).repeat_interleave(self.group_size).repeat(self.num_seeds)
        table = torch.nn.functional.one_hot(branch, num_steps) * rates
        return Plan(
            noise=starting_noise(latent_shape, root, key),
            prompt=torch.zeros_like(root),
            root=root,
            rate=table,
            train=table > 0,
            group=branch if self.across_seeds else root * num_branches + branch,
            seed=torch.arange(len(root)),
            key=(key,) * len(root),
        )


def starting_noise(latent_shape: tuple[int, ...], root: Tensor, key: Key) -> Tensor:
    """[B, C, H, W]; chains of one root get the same noise."""
    starts = [normal(latent_shape, Purpose.START, *key, chain=i) for i in range(int(root.max()) + 1)]
    return torch.stack(starts)[root]
