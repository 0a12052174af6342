"""Exploration: where noise is injected, the starting noise, and the GRPO groups of one prompt.

All of it is tables over chains and steps. G group size. The last step is never noisy: its noise would stay in
the image.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .data import Plan
from .protocols import Explore
from .randomness import Key, Purpose, normal, rng

Window = Callable[[Key, int], range]
"""(key of the group, num_steps) -> the steps that get noise."""


def all_steps(key: Key, num_steps: int) -> range:
    """Every step but the last (Flow-GRPO)."""
    return range(num_steps - 1)


def fixed_window(size: int, start: int = 0) -> Window:
    """The same ``size`` steps in every iteration (MixGRPO-Flash*: the first ones)."""

    def window(key: Key, num_steps: int) -> range:
        fitting(start + size, num_steps)
        return range(start, start + size)

    return window


def sliding_window(size: int, every: int, roll_back: bool = True) -> Window:
    """MixGRPO (arXiv 2507.21802): one step later each ``every`` iterations, from the first step on.

    At the end it starts over (``roll_back``, the authors' code) or stays (the paper).
    """

    def window(key: Key, num_steps: int) -> range:
        places, moved = fitting(size, num_steps) - size + 1, key[1] // every
        start = moved % places if roll_back else min(moved, places - 1)
        return range(start, start + size)

    return window


def random_window(size: int, first: int = 0, end: int = 0) -> Window:
    """Flow-GRPO-Fast: each group draws its window anew, inside steps ``first`` to ``end`` - 1; 0 = to the last."""

    def window(key: Key, num_steps: int) -> range:
        noisy = fitting(first + size, num_steps)
        latest = min(end or noisy, noisy) - size
        if latest < first:
            raise ValueError(f"a window of {size} steps does not fit between steps {first} and {end}; make it smaller")
        start = int(rng(Purpose.WINDOW, *key).integers(first, latest + 1))
        return range(start, start + size)

    return window


def fitting(end: int, num_steps: int) -> int:
    """The number of steps that can be noisy. Raises ValueError when a window that ends at ``end`` has no place."""
    if end > num_steps - 1:
        raise ValueError(
            f"a window that reaches to step {end} does not fit: of {num_steps} denoising steps {num_steps - 1} can be "
            "noisy; take more steps or a smaller window"
        )
    return num_steps - 1


def independent_chains(
    group_size: int, *, window: Window = all_steps, shared_noise: bool = False, train_fraction: float = 1.0
) -> Explore:
    """G chains per prompt, noise at the steps of ``window``, which a group shares.

    ``shared_noise`` starts a group from one x_T. ``train_fraction`` trains a random part of the noisy
    steps of each chain (DanceGRPO: 0.6).
    """

    def explore(latent_shape: tuple[int, ...], rates: Tensor, key: Key) -> Plan:
        num_steps = len(rates)
        steps = list(window(key, num_steps))
        table = torch.zeros(group_size, num_steps)
        table[:, steps] = rates[steps]
        lottery = torch.from_numpy(rng(Purpose.TRAINED_STEPS, *key).random((group_size, num_steps)))
        rank = lottery.where(table > 0, 2.0).argsort(1).argsort(1)
        root = torch.zeros(group_size, dtype=torch.long) if shared_noise else torch.arange(group_size)
        return Plan(
            noise=starting_noise(latent_shape, root, key),
            prompt=torch.zeros(group_size, dtype=torch.long),
            root=root,
            rate=table,
            train=(rank < max(1, int(train_fraction * len(steps)))) & (table > 0),
            group=torch.zeros(group_size, dtype=torch.long),
            seed=torch.arange(group_size),
            key=(key,) * group_size,
        )

    return explore


def single_step_branches(
    group_size: int, *, branch_steps: Callable[[int], Sequence[int]], num_seeds: int = 1, across_seeds: bool = False
) -> Explore:
    """From the ODE trunk of each seed, at each of ``branch_steps`` (of T), G chains that are noisy there alone.

    TempFlow-GRPO (arXiv 2508.04324) and G2RPO (arXiv 2510.01982). The chains of one seed and step form a group;
    with ``across_seeds`` those of one step do, whichever their seed. Until they branch they are one state, which is
    computed once, in sampling and in training.
    """

    def explore(latent_shape: tuple[int, ...], rates: Tensor, key: Key) -> Plan:
        branches = torch.tensor(list(branch_steps(len(rates))))
        root = torch.arange(num_seeds).repeat_interleave(len(branches) * group_size)
        branch = torch.arange(len(branches)).repeat_interleave(group_size).repeat(num_seeds)
        table = torch.nn.functional.one_hot(branches[branch], len(rates)) * rates
        return Plan(
            noise=starting_noise(latent_shape, root, key),
            prompt=torch.zeros_like(root),
            root=root,
            rate=table,
            train=table > 0,
            group=branch if across_seeds else root * len(branches) + branch,
            seed=torch.arange(len(root)),
            key=(key,) * len(root),
        )

    return explore


def first_steps(share: float) -> Callable[[int], Sequence[int]]:
    """The branch steps: the first ``share`` of all steps, at least one, never the last."""
    return lambda num_steps: range(min(max(1, int(share * num_steps)), num_steps - 1))


def starting_noise(latent_shape: tuple[int, ...], root: Tensor, key: Key) -> Tensor:
    """[B, C, H, W]; chains of one root get the same noise."""
    starts = [normal(latent_shape, Purpose.START, *key, chain=i) for i in range(int(root.max()) + 1)]
    return torch.stack(starts)[root]
