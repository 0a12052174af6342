"""Group-relative advantages."""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from .data import Advantages, StepRewards
from .knobs import Choice, Knob


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNorm:
    """(credit - group mean) / standard deviation, per view, then the weighted sum of views.

    The standard deviation is sqrt(std^2 + (std_floor * pooled)^2) + std_eps, where ``pooled`` is that of all steps
    of the group: without the floor, steps whose gains are almost pure noise are blown up to unit variance.
    """

    std_scope: Annotated[
        str, Choice(("group", "global"), "whose spread divides: the group's (papers) or all groups' (Flow-GRPO's code)")
    ] = "group"
    norm_axis: Annotated[
        str,
        Choice(
            ("step", "joint"),
            "normalise each step by itself, or all steps together (Stepwise-Flow-GRPO, arXiv 2603.28718)",
        ),
    ] = "step"
    std_floor: Annotated[float, Knob(0.0, 10.0, "floor of a step's spread, as a share of the spread of all steps")] = (
        0.0
    )
    std_eps: Annotated[float, Knob(0.0, 10.0, "added to the spread")] = 1e-4
    advantage_clip: Annotated[float, Knob(0.01, 1000.0, "largest absolute advantage")] = 5.0

    def __call__(self, credit: Tensor, rewards: StepRewards, group: Tensor, train: Tensor) -> Advantages:
        """[V, B, T] credit -> [B, T] advantages.

        Only steps that ``train`` [B, T] marks and that have credit in all views count, in the statistics too;
        a group in which fewer than two are left teaches nothing and is masked.
        """
        # In double precision: else the mean of equal rewards misses them by a rounding, which ``std_eps`` may not hide.
        credit = credit.double()
        valid = credit.isfinite().all(0) & train
        members = [group == g for g in group.unique()]
        centred, mask, spread = torch.zeros_like(credit), torch.zeros_like(valid), torch.ones_like(credit)
        for chains in members:
            known = valid[chains]
            own = self.centre(credit[:, chains], known)
            width = self.spread(own, known)
            if rewards.rules.min_std:
                own = own.where(width >= width.new_tensor(rewards.rules.min_std)[:, None, None], 0)
            centred[:, chains], spread[:, chains] = own, width
            enough = known.sum(0) > 1 if self.norm_axis == "step" else known.any(1).sum() > 1
            mask[chains] = known & enough
        if self.std_scope == "global":
            spread = self.spread(centred, mask)
        divisor = spread + self.std_eps
        values = centred / divisor.where(divisor > 0, 1)
        summed = torch.einsum("v,vbt->bt", rewards.weights.double(), values)
        summed = (self.over_batch(summed, mask) if rewards.rules.over_batch else summed).float()
        return Advantages(summed.masked_fill(~mask, 0).clamp(-self.advantage_clip, self.advantage_clip), mask)

    def over_batch(self, values: Tensor, mask: Tensor) -> Tensor:
        """[B, T] with zero mean and unit spread over all that ``mask`` marks (GDPO, arXiv 2601.05242)."""
        known = values[mask]
        if not len(known):
            return values
        return (values - known.mean()) / (known.std(correction=0) + max(self.std_eps, 1e-12))

    def centre(self, credit: Tensor, valid: Tensor) -> Tensor:
        """Credit minus its mean over the chains (and steps) of one group; 0 where not valid."""
        known = credit.masked_fill(~valid, 0)
        if self.norm_axis == "joint":
            mean = known.sum((1, 2), keepdim=True) / valid.sum().clamp(min=1)
        else:
            mean = known.sum(1, keepdim=True) / valid.sum(0).clamp(min=1)
        return (known - mean).masked_fill(~valid, 0)

    def spread(self, centred: Tensor, valid: Tensor) -> Tensor:
        """Root mean square over chains (and steps), [V, 1, T] or [V, 1, 1]."""
        square = centred.square()
        pooled = square.sum((1, 2), keepdim=True) / valid.sum().clamp(min=1)
        if self.norm_axis == "joint":
            return pooled.sqrt()
        per_step = square.sum(1, keepdim=True) / valid.sum(0).clamp(min=1)
        return (per_step + self.std_floor**2 * pooled).sqrt()


def ranked(rewards: StepRewards, group: Tensor) -> StepRewards:
    """The same with views that ask for it as ranks: which part of the others of its group a state beats, 0..1.

    A tie counts half (Pref-GRPO's win rate, arXiv 2508.20751). States are compared with those at the same noise level.
    """
    if not any(rewards.rules.rank):
        return rewards
    values, least = rewards.values.clone(), rewards.rules.min_std
    for g in group.unique():
        chains = group == g
        for v in torch.tensor(rewards.rules.rank).nonzero().flatten().tolist():
            own = rewards.values[v, chains]
            values[v, chains] = win_rate(own if v >= len(least) else levelled(own, least[v]))
    return replace(rewards, values=values)


def levelled(values: Tensor, least: float) -> Tensor:
    """[B, K] with columns whose known values differ less than ``least`` made equal: a rank would hide how little."""
    spread = (values - values.nanmean(0)).square().nanmean(0).sqrt()
    return values.where(~(spread < least), values.new_zeros(()).where(values.isfinite(), torch.nan))


def win_rate(values: Tensor) -> Tensor:
    """[B, K] -> for each column the part of the other known values that each one beats; NaN stays NaN."""
    known = values.isfinite()
    beaten = (values[:, None] > values[None]) + 0.5 * (values[:, None] == values[None])
    others = known.sum(0) - 1
    wins = (beaten.sum(1) - 0.5) / others.clamp(min=1)
    return wins.where(known, torch.nan).where(others > 0, values.new_tensor(0.5).where(known, torch.nan))
