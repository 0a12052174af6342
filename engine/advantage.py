"""Group-relative advantages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from .data import Advantages, StepRewards
from .knobs import Choice, Knob

TIES = 1e-6
"""Ranks that differ less are equal but for rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNorm:
    """(credit - group mean) / standard deviation, per view, then the weighted sum of views.

    Where a group's credit of a view differs less than the view's ``min_std``, it teaches nothing. It does not count in
    spreads over all groups either, else the others would be blown up the more, the more groups are silent.

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
        heard = torch.zeros_like(credit, dtype=torch.bool)
        for chains in members:
            known = valid[chains]
            own = self.centre(credit[:, chains], known)
            enough = known.sum(0) > 1 if self.norm_axis == "step" else known.any(1).sum() > 1
            mask[chains] = known & enough
            heard[:, chains] = self.loud(own, known, rewards.rules.min_std) & mask[chains]
            centred[:, chains], spread[:, chains] = own, self.spread(own, known)
        centred = centred.masked_fill(~heard, 0)
        if self.std_scope == "global":
            spread = self.spread(centred, heard)
        divisor = spread + self.std_eps
        values = centred / divisor.where(divisor > 0, 1)
        summed = torch.einsum("v,vbt->bt", rewards.weights.double(), values)
        summed = (self.over_batch(summed, heard.any(0)) if rewards.rules.over_batch else summed).float()
        return Advantages(summed.masked_fill(~mask, 0).clamp(-self.advantage_clip, self.advantage_clip), mask)

    def loud(self, centred: Tensor, valid: Tensor, min_std: Sequence[float]) -> Tensor:
        """[V, 1, T] or [V, 1, 1]: whether the credit of one group differs as much as each view asks for."""
        width = replace(self, std_floor=0.0).spread(centred, valid)
        return width >= width.new_tensor(min_std or [0.0])[:, None, None]

    def over_batch(self, values: Tensor, heard: Tensor) -> Tensor:
        """[B, T] with zero mean and unit spread over all that ``heard`` marks, 0 elsewhere (GDPO, arXiv 2601.05242)."""
        known = values[heard]
        if not len(known):
            return values
        return ((values - known.mean()) / (known.std(correction=0) + max(self.std_eps, 1e-12))).masked_fill(~heard, 0)

    def centre(self, credit: Tensor, valid: Tensor) -> Tensor:
        """Credit minus its mean over the chains (and steps) of one group; 0 where not valid."""
        known = credit.masked_fill(~valid, 0)
        if self.norm_axis == "joint":
            mean = known.sum((1, 2), keepdim=True) / valid.sum().clamp(min=1)
        else:
            mean = known.sum(1, keepdim=True) / valid.sum(0).clamp(min=1)
        return (known - mean).masked_fill(~valid, 0)

    def spread(self, centred: Tensor, valid: Tensor) -> Tensor:
        """Root mean square over chains (and steps), [V, 1, T] or [V, 1, 1]; ``valid`` [B, T] or [V, B, T]."""
        square, valid = centred.square(), valid.expand_as(centred)
        pooled = square.sum((1, 2), keepdim=True) / valid.sum((1, 2), keepdim=True).clamp(min=1)
        if self.norm_axis == "joint":
            return pooled.sqrt()
        per_step = square.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        return (per_step + self.std_floor**2 * pooled).sqrt()


def ranked(rewards: StepRewards, group: Tensor) -> StepRewards:
    """The same with views that ask for it as ranks: which part of the others of its group a state beats, 0..1.

    A tie counts half (Pref-GRPO's win rate, arXiv 2508.20751). States are compared with those at the same noise level.
    ``min_std`` is about scores: a group that differs less is all ties, and of ranks only ties are silent.
    """
    if not any(rewards.rules.rank):
        return rewards
    values, least = rewards.values.clone(), rewards.rules.min_std
    for g in group.unique():
        chains = group == g
        for v in torch.tensor(rewards.rules.rank).nonzero().flatten().tolist():
            own = rewards.values[v, chains]
            values[v, chains] = win_rate(own if v >= len(least) else levelled(own, least[v]))
    left = [min(small, TIES) if rank else small for small, rank in zip(least, rewards.rules.rank, strict=False)]
    return replace(rewards, values=values, rules=rewards.rules._replace(min_std=left))


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
