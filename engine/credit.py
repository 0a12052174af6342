"""Credit assignment: rewards of states [V, B, T+1] -> credit of steps [V, B, T]. All are pure.

Each also takes the group [B] of every chain and its noisy steps [B, T] (None: all), which only turning points look at.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from .data import StepRewards
from .knobs import Choice, flag


def broadcast_terminal(rewards: StepRewards, group: Tensor, noisy: Tensor | None = None) -> Tensor:
    """Every step gets the final reward (Flow-GRPO, arXiv 2505.05470)."""
    return rewards.values[..., -1:].expand_as(rewards.values[..., 1:])


def gain(rewards: StepRewards, group: Tensor, noisy: Tensor | None = None) -> Tensor:
    """Each step gets the reward it added (DenseGRPO, arXiv 2601.20218, eq. 7); they sum to R_T - R_0."""
    return rewards.values.diff(dim=-1)


def after_step(rewards: StepRewards, group: Tensor, noisy: Tensor | None = None) -> Tensor:
    """Each step gets the reward of the state it led to (G2RPO, arXiv 2510.01982)."""
    return rewards.values[..., 1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurningPoints:
    """Gains, but a turning point gets the whole gain from its state to the end (TP-GRPO, arXiv 2602.06422).

    A step is a turning point when it follows the chain's overall trend and the step before went against it (definition
    4.1); the first noisy step, when it follows the trend. Signs are strict: a step that changed nothing is none.
    """

    consistent: Annotated[bool, flag("a turning point must also be followed by a gain in its own direction")] = True
    """Definition 5.1."""
    balance: Annotated[
        str, Choice(("batch", "group", "off"), "among whom good and bad turning points are made equally many")
    ] = "batch"
    """Appendix D."""
    balance_by: Annotated[
        str, Choice(("aggregate", "trend"), "ranked by the credit they get, or (authors' code) by the chain's gain")
    ] = "aggregate"

    def __call__(self, rewards: StepRewards, group: Tensor, noisy: Tensor | None = None) -> Tensor:
        """[V, B, T+1] -> [V, B, T]."""
        return torch.where(self.mark(rewards, group, noisy), aggregate(rewards), gain(rewards, group, noisy))

    def mark(self, rewards: StepRewards, group: Tensor, noisy: Tensor | None = None) -> Tensor:
        """[V, B, T] bool: the turning points, after balancing."""
        reward, gains = rewards.values, gain(rewards, group, noisy)
        trend = reward[..., -1:] - reward[..., :1]
        follows = gains.sign() * trend.sign()
        against_before = torch.nn.functional.pad(follows[..., :-1] < 0, (1, 0))
        noisy = torch.ones_like(gains[0], dtype=torch.bool) if noisy is None else noisy
        first = noisy & (noisy.cumsum(1) == 1)
        turns = (follows > 0) & (against_before | first)
        if self.consistent:
            # For the first step this implies following the trend, which is the sum of both gains.
            turns &= gains.sign() * (reward[..., -1:] - reward[..., 1:]).sign() > 0
        if self.balance == "off":
            return turns
        size = aggregate(rewards) if self.balance_by == "aggregate" else trend.expand_as(gains)
        pools = [group == g for g in group.unique()] if self.balance == "group" else [torch.ones_like(group).bool()]
        for view, sizes in zip(turns, size, strict=True):
            for chains in pools:
                view[chains] = balanced(view[chains], sizes[chains])
        return turns


def aggregate(rewards: StepRewards) -> Tensor:
    """The gain from each state to the end, R_T - R_k (TP-GRPO, eq. 8)."""
    return rewards.values[..., -1:] - rewards.values[..., :-1]


def balanced(turns: Tensor, size: Tensor) -> Tensor:
    """As many positive as negative turning points: the largest of the larger side stay. All [B, T].

    When one side is empty, all stay; those of size 0 are on neither side and stay. Among equal sizes ``topk`` chooses,
    as in the authors' code.
    """
    sides = [(turns & side).flatten().nonzero().flatten() for side in (size > 0, size < 0)]
    fewer = min(len(side) for side in sides)
    if fewer == 0:
        return turns
    kept = (turns & (size == 0)).flatten()
    for side in sides:
        kept[side[size.flatten()[side].abs().topk(fewer).indices]] = True
    return kept.view_as(turns)
