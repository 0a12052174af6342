"""Exploration: tables of noise rates, the starting noise, and the GRPO groups of one prompt.

G group size. The last step is never noisy: its noise would stay in the image.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .data import Plan
from .protocols import Explore, Rate
from .randomness import Key, Purpose, normal, rng

Window = Callable[[int, int], range]
"""(iteration, num_steps) -> the steps that get noise."""


def independent_chains(
    group_size: int,
    rate: Rate,
    *,
    window: Window | None = None,
    shared_noise: bool = False,
    train_fraction: float = 1.0,
) -> Explore:
    """G chains per prompt, noise at the steps of ``window`` (all but the last when None).

    ``shared_noise`` starts a group from one x_T. ``train_fraction`` trains a random part of the noisy
    steps of each chain (DanceGRPO: 0.6).
    """

    def explore(latent_shape: tuple[int, ...], sigmas: Tensor, key: Key) -> Plan:
        num_steps = len(sigmas) - 1
        steps = list(window(key[1], num_steps) if window else range(num_steps - 1))
        rates = torch.zeros(group_size, num_steps)
        rates[:, steps] = rate(sigmas)[steps]
        lottery = torch.from_numpy(rng(Purpose.TRAINED_STEPS, *key).random((group_size, num_steps)))
        rank = lottery.where(rates > 0, 2.0).argsort(1).argsort(1)
        root = torch.zeros(group_size, dtype=torch.long) if shared_noise else torch.arange(group_size)
        return Plan(
            noise=starting_noise(latent_shape, root, key),
            prompt=torch.zeros(group_size, dtype=torch.long),
            root=root,
            rate=rates,
            train=(rank < max(1, int(train_fraction * len(steps)))) & (rates > 0),
            group=torch.zeros(group_size, dtype=torch.long),
            seed=torch.arange(group_size),
            key=(key,) * group_size,
        )

    return explore


def starting_noise(latent_shape: tuple[int, ...], root: Tensor, key: Key) -> Tensor:
    """[B, C, H, W]; chains of one root get the same noise."""
    starts = [normal(latent_shape, Purpose.START, *key, chain=i) for i in range(int(root.max()) + 1)]
    return torch.stack(starts)[root]
