"""What the record of an iteration says of its rewards."""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from .data import Advantages, Plan, Stats, StepRewards
from .distributed import World


def reward_stats(
    rewards: StepRewards,
    credit: Tensor,
    advantages: Advantages,
    plan: Plan,
    ends: Mapping[str, Tensor],
    world: World,
) -> Stats:
    """Numbers of the iteration over all processes, whose ``credit`` this is; views are added with their weights.

    ``ends``: label of each reward -> [B] raw scores of this process's final images.
    """
    values = world.gather(rewards.values, 1)
    train, mask = world.gather(plan.train), world.gather(advantages.mask)
    slot = world.gather(torch.tensor([key[2] for key in plan.key]))
    weights = rewards.weights / rewards.weights.abs().sum().clamp(min=1e-12)
    final = torch.einsum("v,vb->b", weights, values[..., -1])
    gains = torch.einsum("v,vbt->bt", weights, credit).masked_fill(~train, torch.nan)
    scores = {label: world.gather(found) for label, found in ends.items()}
    return {
        "reward": final.nanmean().item(),
        "reward_std": (final - final.nanmean()).square().nanmean().sqrt().item(),
        "group_std": mean_or_zero(group_stds(final, slot)),
        "unscored": final.isnan().float().mean().item(),
        "masked": 1 - mask.sum().item() / max(train.sum().item(), 1),
        "step_credit": nan_to_zero(gains.nanmean(0)),
        "step_credit_std": nan_to_zero((gains - gains.nanmean(0)).square().nanmean(0).sqrt()),
        "step_credit_positive": nan_to_zero((gains > 0).float().where(gains.isfinite(), torch.nan).nanmean(0)),
        "rewards": {label: one_reward(found, slot) for label, found in scores.items()},
        "reward_correlation": {
            f"{a} / {b}": correlation(scores[a], scores[b], slot) for a, b in combinations(scores, 2)
        },
    }


def one_reward(scores: Tensor, slot: Tensor) -> dict[str, float]:
    """Raw scores [B] of one reward: mean, mean spread inside groups, share of groups without any, share missing."""
    stds = group_stds(scores, slot)
    return {
        "mean": scores.nanmean().item(),
        "group_std": mean_or_zero(stds),
        "flat_groups": mean_or_zero((stds < 1e-6).float()),
        "missing": scores.isnan().float().mean().item(),
    }


def group_stds(scores: Tensor, slot: Tensor) -> Tensor:
    """Standard deviation [G] of each group that has two scores or more."""
    known = [(group := scores[slot == s])[group.isfinite()] for s in slot.unique()]
    return torch.tensor([group.std(correction=0).item() for group in known if len(group) > 1])


def correlation(a: Tensor, b: Tensor, slot: Tensor) -> float:
    """Pearson correlation of two rewards [B] inside groups: below 0 they pull apart. NaN when one is constant."""
    both = a.isfinite() & b.isfinite()
    a, b, slot = a[both].double(), b[both].double(), slot[both]
    for s in slot.unique():
        a[slot == s] -= a[slot == s].mean()
        b[slot == s] -= b[slot == s].mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return ((a * b).sum() / scale).item() if scale > 1e-12 else float("nan")


def mean_or_zero(values: Tensor) -> float:
    """The mean, 0 of nothing."""
    return values.mean().item() if len(values) else 0.0


def nan_to_zero(values: Tensor) -> list[float]:
    """Steps without credit count 0, so that the record stays plain JSON."""
    return values.nan_to_num(0).tolist()
