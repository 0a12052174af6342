"""Probes: which states are finished by ODE, on which noise levels, and what their images are worth."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from .data import Finals, Plan, Prompt, StepRewards
from .knobs import Choice, Knob, Numbers, whole_numbers
from .protocols import FlowModel, Grid
from .rewards import Panel, Scored
from .rewards.panel import Scoring


def full(k: int, num_steps: int) -> Sequence[int]:
    """Every remaining noise level (DenseGRPO's main setting, n = t)."""
    return range(k, num_steps + 1)


def at_most(num_evaluations: int) -> Grid:
    """At most n Euler steps, evenly spread over the remaining levels (DenseGRPO's ablation, n = 1, 2)."""

    def grid(k: int, num_steps: int) -> Sequence[int]:
        n = min(num_evaluations, num_steps - k)
        return [k + (num_steps - k) * j // n for j in range(n)] + [num_steps] if n else [num_steps]

    return grid


def every_nth(stride: int) -> Grid:
    """Every ``stride``-th remaining level, and sigma 0 (G2RPO, arXiv 2510.01982; the authors' code may miss 0)."""

    def grid(k: int, num_steps: int) -> Sequence[int]:
        return [*range(k, num_steps, stride), num_steps]

    return grid


def share(part: float) -> Grid:
    """That part of the remaining steps, rounded, at least one, evenly spread (MixGRPO-Flash: 0.4)."""

    def grid(k: int, num_steps: int) -> Sequence[int]:
        return at_most(max(1, round(part * (num_steps - k))))(k, num_steps)

    return grid


@dataclass(frozen=True, slots=True)
class FinalImage:
    """Only the image of each chain itself (Flow-GRPO)."""

    grids = (full,)
    tail_solver = "euler"

    def states(self, plan: Plan) -> Tensor:
        """The last."""
        wanted = torch.zeros(len(plan.root), plan.rate.shape[1] + 1, dtype=torch.bool)
        wanted[:, -1] = True
        return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryState:
    """Each state of each chain (DenseGRPO, arXiv 2601.20218, eq. 8-9)."""

    tail_solver = "euler"
    probe_evaluations: Annotated[int, Knob(0, 64, "Euler steps a probe may take; 0 = the whole remaining schedule")] = 0

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The whole schedule, or a coarser one."""
        return (at_most(self.probe_evaluations) if self.probe_evaluations else full,)

    def states(self, plan: Plan) -> Tensor:
        """All."""
        return torch.ones(len(plan.root), plan.rate.shape[1] + 1, dtype=torch.bool)


class AfterNoise:
    """The state after the last noisy step of each chain: all that follows is decided."""

    __slots__ = ()

    def states(self, plan: Plan) -> Tensor:
        """One of each chain."""
        last_noisy = plan.rate.gt(0).int().cumsum(1).argmax(1)
        return torch.nn.functional.one_hot(last_noisy + 1, plan.rate.shape[1] + 1).bool()


@dataclass(frozen=True, slots=True, kw_only=True)
class Granularities(AfterNoise):
    """What follows the noise, on several grids of noise levels (G2RPO, arXiv 2510.01982)."""

    tail_solver = "euler"
    strides: Annotated[str, Numbers(1, 16, "finish on every n-th noise level, once for each of these n")] = "1, 2, 3"

    @property
    def grids(self) -> tuple[Grid, ...]:
        """One for each stride."""
        return tuple(map(every_nth, whole_numbers(self.strides)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FasterTail(AfterNoise):
    """What follows the noise, in fewer steps (MixGRPO-Flash, arXiv 2507.21802)."""

    tail_share: Annotated[float, Knob(0.01, 1.0, "part of the steps after the noise that is taken")] = 0.4
    tail_solver: Annotated[str, Choice(("dpm2m", "euler"), "how these are solved: second or first order")] = "dpm2m"

    @property
    def grids(self) -> tuple[Grid, ...]:
        """A coarser one."""
        return (share(self.tail_share),)


def score(
    model: FlowModel,
    finals: Finals,
    prompts: Sequence[Prompt],
    panel: Panel,
    chunk: int,
    timed: Callable[[str], AbstractContextManager[None]],
) -> tuple[StepRewards, Scored, Tensor]:
    """Decode and score each distinct final once: (rewards of states, details, images of the chains' ends)."""
    with panel.scoring() as scoring:
        images = submit(model, finals, prompts, scoring, chunk, timed)
        with timed("reward"):
            return collect(finals, images, scoring)


def submit(
    model: FlowModel,
    finals: Finals,
    prompts: Sequence[Prompt],
    scoring: Scoring,
    chunk: int,
    timed: Callable[[str], AbstractContextManager[None]],
) -> Tensor:
    """Decode each distinct final and hand it to the panel; returns the images of chains' ends, on the CPU.

    The others are dropped once they are scored: there may be gigabytes of them.
    """
    ends = []
    parts = zip(finals.latents.split(chunk), finals.prompt.split(chunk), is_end(finals).split(chunk), strict=True)
    for latents, rows, end in parts:
        with timed("decode"):
            images = model.decode(latents).cpu()
        with timed("reward"):
            scoring.add(images, [prompts[i] for i in rows.tolist()], rows)
        ends.append(images[end])
    return torch.cat(ends)


def is_end(finals: Finals) -> Tensor:
    """[N] bool: whether a chain ends there."""
    return torch.zeros(len(finals.latents), dtype=torch.bool).index_fill(0, finals.index[0, :, -1], True)


def collect(finals: Finals, images: Tensor, scoring: Scoring) -> tuple[StepRewards, Scored, Tensor]:
    """Rewards of states, details, images of the chains' ends, once all scores are there.

    Views are ordered grid by grid, and within a grid reward by reward.
    """
    scored, panel, index = scoring.collect(), scoring.panel, finals.index
    values = scored.scores[:, index.clamp(min=0)].masked_fill(index < 0, torch.nan).transpose(0, 1).flatten(0, 1)
    rewards = StepRewards(values, panel.weights.repeat(len(index)), panel.rules(len(index)))
    return rewards, scored, images[(is_end(finals).cumsum(0) - 1)[finals.index[0, :, -1]]]
