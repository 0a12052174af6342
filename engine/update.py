"""Policy updates: replay the sampled transitions with gradient and step the optimizer.

The density of a transition before an update is computed in the very batches that train it, not taken from
sampling: batch shapes change the last bits of a network's output, and with clip ranges of 1e-4 they count. So
the ratio is exactly 1 before the first update, in every precision; how far sampling was off is reported.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Advantages, Stats, Trajectory, distinct
from .distributed import World
from .learner import Learner
from .loss import KLS, RATIOS, Move
from .protocols import FlowModel
from .recipes import Recipe
from .rollout import policy


class Batch(NamedTuple):
    """Transitions that go through the model together. R distinct states, N transitions, N >= R."""

    state_chain: Tensor
    """[R] a chain that is in the state."""
    state_step: Tensor
    """[R]"""
    state: Tensor
    """[N] which state each transition leaves from."""
    chain: Tensor
    """[N]"""


def batches(traj: Trajectory, mask: Tensor, size: int) -> list[Batch]:
    """Split the transitions of ``mask`` [B, T] into batches of at most ``size`` distinct states.

    Chains that share a state share one evaluation.
    """
    states, members = [], []
    for t in mask.any(0).nonzero().flatten().tolist():
        rows, inverse = distinct(traj.plan, t)
        chains = mask[:, t].nonzero().flatten()
        for row in inverse[chains].unique().tolist():
            states.append((int(rows[row]), t))
            members.append(chains[inverse[chains] == row])
    found = []
    for start in range(0, len(states), size):
        part, chains = torch.tensor(states[start : start + size]), members[start : start + size]
        state = torch.arange(len(part)).repeat_interleave(torch.tensor([len(c) for c in chains]))
        found.append(Batch(part[:, 0], part[:, 1], state, torch.cat(chains)))
    return found


def replay(model: FlowModel, cond: Any, traj: Trajectory, recipe: Recipe, batch: Batch) -> Move:
    """What the current policy says of the transitions of ``batch``."""
    device = traj.states.device
    chain, step = batch.state_chain.to(device), batch.state_step.to(device)
    prompts = traj.plan.prompt[batch.state_chain]
    velocity = model.velocity(traj.states[chain, step], traj.sigmas[step], cond, prompts)
    state, sampled_by = batch.state.to(device), batch.chain.to(device)
    velocity, step = velocity[state], step[state]
    rate = traj.plan.rate[batch.chain, batch.state_step[batch.state]]
    x, sample = traj.states[sampled_by, step], traj.states[sampled_by, step + 1]
    dist = policy(recipe.noise.step, x, velocity, traj.sigmas[step], traj.sigmas[step + 1], rate)
    return Move(velocity, dist, recipe.noise.step.log_prob(sample, dist))


def learn(
    model: FlowModel,
    cond: Any,
    traj: Trajectory,
    advantages: Advantages,
    recipe: Recipe,
    learner: Learner,
    world: World,
    batch_size: int,
) -> Stats:
    """All optimizer steps of one iteration; returns their statistics, averaged over transitions."""
    masks = list(recipe.update.updates(advantages.mask, traj.plan))
    weights = recipe.update.weights(recipe.noise.step, traj.sigmas.cpu(), recipe.noise.rates(traj.sigmas.cpu()))
    advantages = replace(advantages, values=advantages.values * weights)
    parts = [batches(traj, mask, batch_size) for mask in masks]
    with torch.no_grad():
        old = [[replay(model, cond, traj, recipe, batch) for batch in part] for part in parts[1:]]
    totals, norms = torch.zeros(len(TOTALS), dtype=torch.float64), []
    for mask, part, before in zip(masks, parts, [[None] * len(parts[0]), *old], strict=True):
        count = int(world.sum(mask.sum().to(model.device)))
        if count == 0:
            continue
        for batch, old_move in zip(part, before, strict=True):
            # Without a KL penalty one batch is enough to report it; the reference costs a forward pass.
            with_kl = recipe.update.kl_weight > 0 or not float(totals[0])
            totals += batch_step(model, cond, traj, advantages, recipe, batch, old_move, count, with_kl)
        for parameter in learner.lora.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = world.sum(gradient)
        norms.append(learner.step())
    totals = world.sum(totals.to(model.device, torch.float32)).cpu()
    sums = dict(zip(TOTALS, totals.tolist(), strict=True))
    transitions, with_kl = sums.pop("transitions"), sums.pop("with_kl")
    stats: Stats = {name: value / max(with_kl if name == "kl" else transitions, 1) for name, value in sums.items()}
    mean_norm = sum(norms) / max(len(norms), 1)
    return stats | {"transitions": transitions, "updates": float(len(norms)), "grad_norm": mean_norm}


TOTALS = ("transitions", "loss", "policy_loss", "with_kl", "kl", "ratio", "clip_fraction", "sampling_gap")
"""Sums over transitions that ``batch_step`` returns."""


def batch_step(
    model: FlowModel,
    cond: Any,
    traj: Trajectory,
    advantages: Advantages,
    recipe: Recipe,
    batch: Batch,
    old: Move | None,
    count: int,
    with_kl: bool,
) -> Tensor:
    """Accumulate the gradient of one batch; returns sums over its transitions, see ``TOTALS``."""
    steps = batch.state_step[batch.state]
    with torch.enable_grad():
        new = replay(model, cond, traj, recipe, batch)
        old = old or new.detach()
        device = new.log_prob.device
        sample = traj.states[batch.chain.to(device), steps.to(device) + 1]
        ratio = RATIOS[recipe.update.ratio](new, old, sample)
        advantage = advantages.values[batch.chain, steps].to(device)
        policy_loss = recipe.update.policy_loss(ratio, advantage)
        kl = torch.zeros_like(policy_loss)
        if with_kl:
            with torch.no_grad(), model.lora.disabled():
                reference = replay(model, cond, traj, recipe, batch)
            step_size = traj.sigmas[steps.to(device)] - traj.sigmas[steps.to(device) + 1]
            kl = KLS[recipe.update.kl](new, reference, step_size)
        loss = policy_loss + recipe.update.kl_weight * kl
        (loss.sum() / count).backward()
    sampled = traj.log_prob[batch.chain.to(device), steps.to(device)]
    columns: Sequence[Tensor] = (
        torch.ones_like(loss),
        loss,
        policy_loss,
        torch.full_like(loss, float(with_kl)),
        kl,
        ratio,
        recipe.update.is_clipped(ratio, advantage).float(),
        (old.log_prob - sampled).abs(),
    )
    return torch.stack([c.detach().double().sum() for c in columns]).cpu()
