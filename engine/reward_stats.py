"""What the record of an iteration says of its rewards."""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from .data import Advantages, Plan, Stats, StepRewards
from .distributed import World

PATIENCE = 10
"""Iterations in a row in which nothing is learnt before that is said."""
ZERO = 1e-6
"""Spreads and advantages below are those of equal scores, but for rounding."""


def reward_stats(
    rewards: StepRewards,
    credit: Tensor,
    advantages: Advantages,
    plan: Plan,
    ends: Mapping[str, Tensor],
    passed_over: Mapping[str, Tensor],
    world: World,
) -> Stats:
    """Numbers of the iteration over all processes, whose ``credit`` this is; views are added with their weights.

    ``ends``: label of each reward -> [B] raw scores of this process's final images; ``passed_over``: label -> [B] bool,
    those that a person chose not to judge.
    """
    values = world.gather(rewards.values, 1)
    train, mask = world.gather(plan.train), world.gather(advantages.mask)
    slot = world.gather(torch.tensor([key[2] for key in plan.key]))
    weights = rewards.weights / rewards.weights.abs().sum().clamp(min=1e-12)
    final = torch.einsum("v,vb->b", weights, values[..., -1])
    gains = torch.einsum("v,vbt->bt", weights, credit).masked_fill(~train, torch.nan)
    scores = {label: world.gather(found) for label, found in ends.items()}
    skipped = {label: world.gather(found) for label, found in passed_over.items()}
    taught = world.gather(advantages.values)[mask].abs() >= ZERO
    by_a_person = torch.stack([*skipped.values()]).any(0)
    return {
        "reward": final.nanmean().item(),
        "reward_std": (final - final.nanmean()).square().nanmean().sqrt().item(),
        "group_std": mean_or_zero(group_stds(final, slot)),
        "unscored": share(final.isnan() & ~by_a_person),
        "skipped": share(by_a_person),
        "zero_advantages": mean_or_zero((~taught).float()),
        "masked": 1 - mask.sum().item() / max(train.sum().item(), 1),
        "step_credit": nan_to_zero(gains.nanmean(0)),
        "step_credit_std": nan_to_zero((gains - gains.nanmean(0)).square().nanmean(0).sqrt()),
        "step_credit_positive": nan_to_zero((gains > 0).float().where(gains.isfinite(), torch.nan).nanmean(0)),
        "rewards": {label: one_reward(found, skipped[label], slot) for label, found in scores.items()},
        "reward_correlation": {
            f"{a} / {b}": correlation(scores[a], scores[b], slot) for a, b in combinations(scores, 2)
        },
    }


def one_reward(scores: Tensor, skipped: Tensor, slot: Tensor) -> dict[str, float]:
    """Raw scores [B] of one reward: mean, mean spread inside groups, share of groups without any.

    And shares of images that have no score: ``missing`` because it failed, ``skipped`` because a person passed over.
    """
    stds = group_stds(scores, slot)
    return {
        "mean": scores.nanmean().item(),
        "group_std": mean_or_zero(stds),
        "flat_groups": mean_or_zero((stds < ZERO).float()),
        "missing": share(scores.isnan() & ~skipped),
        "skipped": share(skipped),
    }


def share(marked: Tensor) -> float:
    """Which part of ``marked`` [B] is true."""
    return marked.float().mean().item()


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


class Idleness:
    """Notices rewards that no longer tell the images of a group apart, and iterations that teach nothing."""

    def __init__(self):
        self.rewards: dict[str, int] = {}
        """Label -> iterations in a row in which all groups were flat."""
        self.all = 0
        """Iterations in a row in which all advantages were 0 although some reward was not flat."""

    def add(self, stats: Stats) -> list[str]:
        """One more iteration: what to say of it, a sentence each; nothing is said twice in a row."""
        scored = {label: found for label, found in stats["rewards"].items() if found["mean"] == found["mean"]}
        flat = {label for label, found in scored.items() if found["flat_groups"] == 1}
        if len(flat) == len(scored) and stats["zero_advantages"] < 1:
            flat = set()  # the ends are alike, but not the steps there
        for label in scored:
            self.rewards[label] = self.rewards.get(label, 0) + 1 if label in flat else 0
        unexplained = stats["zero_advantages"] == 1 and not all(self.rewards[label] for label in scored)
        self.all = self.all + 1 if unexplained else 0
        found = [
            f"reward {label} gave all images of each group the same score, {PATIENCE} iterations in a row: nothing is "
            "learnt from it; try it with densegrpo score, or take easier prompts or larger groups"
            for label in scored
            if self.rewards[label] == PATIENCE
        ]
        if self.all == PATIENCE:
            found.append(
                f"nothing was learnt {PATIENCE} iterations in a row: every advantage is 0; lower min_std, or raise cap"
            )
        return found
