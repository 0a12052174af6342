"""The values that flow through one training iteration, in the order they are made.

Axes: P prompts, B chains, T denoising steps, S probe grids, M rewards, V = M * S reward views, C/H/W latent.
``states[:, 0]`` is pure noise (sigma 1), ``states[:, T]`` the clean latent (sigma 0); step ``t`` leads from
state ``t`` to state ``t + 1``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .randomness import Key


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, and what a reward may need to know of it (GenEval clauses, quoted text, ...)."""

    text: str
    metadata: Mapping[str, Any]
    place: str = field(default="", compare=False)
    """Where it was read, for messages: file and line, or its number in a list; may be empty."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where noise is injected, what is trained, and which chains are ranked against each other."""

    noise: Tensor
    """[B, C, H, W] the state at sigma 1."""
    prompt: Tensor
    """[B] index of each chain's prompt."""
    root: Tensor
    """[B] chains with the same root start from the same noise and prompt."""
    rate: Tensor
    """[B, T] noise rate of each step; 0 is a plain ODE step."""
    train: Tensor
    """[B, T] bool, only where ``rate`` > 0."""
    group: Tensor
    """[B] chains with the same id form one GRPO group."""
    seed: Tensor
    """[B] number of the chain among those of its prompt; with its key it determines its noise."""
    key: tuple[Key, ...]
    """[B] random key of each chain's group."""


class Gaussian(NamedTuple):
    """The next state's distribution: N(mean, std^2), ``std`` [B, 1, ...] broadcastable to ``mean``."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What the policy did. All on the model's device, latents in float32."""

    plan: Plan
    sigmas: Tensor
    """[T+1] from 1 down to 0."""
    states: Tensor
    """[B, T+1, C, H, W]"""
    std: Tensor
    """[B, T] standard deviation of the injected noise; 0 on ODE steps."""
    log_prob: Tensor
    """[B, T] mean log density per latent element, under the policy that sampled; 0 on ODE steps."""


@dataclass(frozen=True, slots=True)
class Finals:
    """Distinct clean latents that are decoded and scored, and whose end they are."""

    latents: Tensor
    """[N, C, H, W]"""
    prompt: Tensor
    """[N] index of each latent's prompt."""
    index: Tensor
    """[S, B, T+1] the latent that finishes state ``k`` of chain ``b`` on grid ``s``; -1 where not probed.

    State T is the end of every chain.
    """


class ViewRules(NamedTuple):
    """How reward views become advantages, beside their weights."""

    min_std: Sequence[float] = ()
    """[V] where a group's credit differs less, it teaches nothing; empty: 0."""
    rank: Sequence[bool] = ()
    """[V] whether a view is ranked within its group first; empty: none is."""
    over_batch: bool = False
    """Whether the sum of views is normalised over the whole batch at the end (GDPO)."""


PLAIN = ViewRules()


@dataclass(frozen=True, slots=True)
class StepRewards:
    """What was scored: ``values[v, b, k]`` is the reward of state ``k``, finished by ODE.

    A view is one (reward, grid) pair. NaN marks a state that was not probed or could not be scored.
    """

    values: Tensor
    """[V, B, T+1]"""
    weights: Tensor
    """[V] weight of each view in the final advantage."""
    rules: ViewRules = PLAIN


@dataclass(frozen=True, slots=True)
class Advantages:
    """What the update learns from."""

    values: Tensor
    """[B, T]"""
    mask: Tensor
    """[B, T] bool; True where the plan trains the step and it received credit."""


Stats = dict[str, Any]
"""Name -> number, list of numbers, or numbers by name: plain JSON."""


def join(plans: Sequence[Plan]) -> Plan:
    """One plan from the plans of single prompts; root and group numbers are made distinct."""
    offset = {"root": 0, "group": 0}
    columns: dict[str, list[Any]] = {field.name: [] for field in fields(Plan)}
    for plan in plans:
        for name, column in columns.items():
            value = getattr(plan, name)
            column.append(value + offset[name] if name in offset else value)
        for name in offset:
            offset[name] += int(getattr(plan, name).max()) + 1
    keys = tuple(key for part in columns.pop("key") for key in part)
    return Plan(**{name: torch.cat(column) for name, column in columns.items()}, key=keys)


def join_rollouts(plan: Plan, parts: Sequence[tuple[Trajectory, Finals]]) -> tuple[Trajectory, Finals]:
    """What was sampled in parts, as sampled in one go; ``plan`` is the ``join`` of their plans."""
    trajectories, finals = zip(*parts, strict=True)
    columns = (torch.cat([getattr(t, name) for t in trajectories]) for name in ("states", "std", "log_prob"))
    indices, start = [], 0
    for part in finals:
        indices.append(torch.where(part.index < 0, part.index, part.index + start))
        start += len(part.latents)
    latents, prompt = torch.cat([f.latents for f in finals]), torch.cat([f.prompt for f in finals])
    return Trajectory(plan, trajectories[0].sigmas, *columns), Finals(latents, prompt, torch.cat(indices, 1))


def distinct(plan: Plan, t: int) -> tuple[Tensor, Tensor]:
    """Which states before step ``t`` differ: (rows [R], inverse [B]) with ``state == state[rows][inverse]``.

    Chains of one root are equal until the first of them is noisy, so a shared ODE trunk is computed once.
    """
    apart = plan.rate[:, :t].gt(0).any(1)
    own = plan.root.max() + 1 + apart.cumsum(0)
    _, inverse = own.where(apart, plan.root).unique(return_inverse=True)
    rows = inverse.new_empty(int(inverse.max()) + 1)
    rows[inverse.flip(0)] = inverse.new_tensor(range(len(inverse))).flip(0)
    return rows, inverse


def expand(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] so that it broadcasts over ``like``."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
