"""Sampling: turn a plan into trajectories and finished probes, in one wave down the noise levels.

All rows at the same noise level - chains that differ and the ODE tails of probed states - go through the
model together. A chain's velocity is also its probe's first step, so DenseGRPO at T = 10 costs 55
evaluations and 10 batched calls per chain instead of 65 and 65.
"""

from typing import Any

import torch
from torch import Tensor

from .data import Finals, Gaussian, Plan, Trajectory, distinct, expand
from .protocols import FlowModel, Kernel, Probe
from .randomness import Purpose, normal


@torch.no_grad()
def rollout(
    model: FlowModel, cond: Any, plan: Plan, sigmas: Tensor, kernel: Kernel, probe: Probe, chunk: int = 64
) -> tuple[Trajectory, Finals]:
    """Sample every chain of ``plan`` with the current policy and finish the states ``probe`` asks for.

    At most ``chunk`` rows go through the model at once; results do not depend on it.
    """
    num_steps = len(sigmas) - 1
    sigmas = sigmas.to(model.device)
    x = plan.noise.to(model.device)
    wave = Wave(plan, probe, x)
    states, stds, log_probs = [x], [], []
    for t in range(num_steps):
        rows, inverse = distinct(plan, t)
        moving = wave.at(t)
        batch = torch.cat([x[rows], wave.latents[moving]])
        prompts = torch.cat([plan.prompt[rows], wave.prompt[moving]])
        velocity = in_chunks(model, cond, batch, sigmas[t], prompts, chunk)
        own, tails = velocity[: len(rows)], velocity[len(rows) :]
        wave.advance(t, moving, tails, sigmas)
        wave.give_birth(t, x[rows], own, inverse, sigmas)
        dist = policy(kernel, x, own[inverse], sigmas[t], sigmas[t + 1], plan.rate[:, t])
        x = torch.where(dist.std > 0, dist.mean + dist.std * step_noise(plan, t, x), dist.mean)
        states.append(x)
        stds.append(dist.std.flatten(1).mean(1))
        log_probs.append(kernel.log_prob(x, dist))
    columns = (torch.stack(column, 1) for column in (states, stds, log_probs))
    return Trajectory(plan, sigmas, *columns), wave.finals(x)


def policy(kernel: Kernel, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, rate: Tensor) -> Gaussian:
    """The distribution of the next state; ``sigma`` and ``sigma_next`` scalar or [B]. Also used in training."""
    size = (len(x),)
    return kernel.step(x, velocity, sigma.expand(size), sigma_next.expand(size), rate)


def in_chunks(model: FlowModel, cond: Any, x: Tensor, sigma: Tensor, prompts: Tensor, chunk: int) -> Tensor:
    """Velocities of rows at one noise level, at most ``chunk`` at a time."""
    pieces = zip(x.split(chunk), prompts.split(chunk), strict=True)
    return torch.cat([model.velocity(part, sigma.expand(len(part)), cond, rows) for part, rows in pieces])


def step_noise(plan: Plan, t: int, like: Tensor) -> Tensor:
    """Fresh noise of each chain at step ``t``; zeros where the step is an ODE step."""
    noise = torch.zeros(like.shape)
    for b in plan.rate[:, t].nonzero().flatten().tolist():
        noise[b] = normal(like.shape[1:], Purpose.STEP, *plan.key[b], chain=int(plan.seed[b]), step=t)
    return noise.to(like)


@torch.no_grad()
def finish_by_ode(model: FlowModel, cond: Any, x: Tensor, sigmas: Tensor, prompts: Tensor, chunk: int = 64) -> Tensor:
    """Euler steps from ``sigmas[0]`` down to ``sigmas[-1]`` without noise."""
    sigmas = sigmas.to(x)
    for t in range(len(sigmas) - 1):
        x = x + in_chunks(model, cond, x, sigmas[t], prompts, chunk) * (sigmas[t + 1] - sigmas[t])
    return x


class Wave:
    """The ODE tails of probed states, travelling down the noise levels beside the chains.

    A tail is born where its state is reached, from the velocity that the chain needs anyway. A state after
    which its chain is not noisy any more has the chain itself for its tail.
    """

    def __init__(self, plan: Plan, probe: Probe, like: Tensor):
        self.plan, self.grids = plan, probe.grids
        num_chains, num_steps = plan.rate.shape
        noisy_later = plan.rate.gt(0).flip(1).cumsum(1).flip(1) > 0
        self.ends_as_ode = torch.cat([~noisy_later, noisy_later.new_ones(num_chains, 1)], 1)
        self.wanted = probe.states(plan)
        self.next_level = torch.zeros(len(self.grids), num_steps, num_steps + 1, dtype=torch.long)
        for g, grid in enumerate(self.grids):
            for k in range(num_steps):
                route = list(grid(k, num_steps))
                self.next_level[g, k, route[:-1]] = torch.tensor(route[1:])
        self.latents = like[:0]
        self.grid, self.birth, self.level, self.prompt = (plan.prompt[:0] for _ in range(4))
        self.index = torch.full((len(self.grids), num_chains, num_steps + 1), -1)

    def at(self, t: int) -> Tensor:
        """Which tails need a velocity at level ``t``."""
        return (self.level == t).nonzero().flatten()

    def advance(self, t: int, moving: Tensor, velocity: Tensor, sigmas: Tensor) -> None:
        """Euler step of the tails ``moving`` from level ``t`` to the next level of their grid."""
        level = self.next_level[self.grid[moving], self.birth[moving], t]
        dt = (sigmas[level.to(sigmas.device)] - sigmas[t]).to(velocity)
        self.latents[moving] = self.latents[moving] + velocity * expand(dt, velocity)
        self.level[moving] = level

    def give_birth(self, t: int, x: Tensor, velocity: Tensor, inverse: Tensor, sigmas: Tensor) -> None:
        """Start the tails of state ``t``; ``x``, ``velocity`` [R, ...] of its distinct rows, ``inverse`` [B]."""
        num_steps = self.wanted.shape[1] - 1
        for g, grid in enumerate(self.grids):
            whole = list(grid(t, num_steps)) == list(range(t, num_steps + 1))
            chains = (self.wanted[:, t] & ~(self.ends_as_ode[:, t] & whole)).nonzero().flatten()
            born, slot = inverse[chains].unique(return_inverse=True)
            first = len(self.latents)
            self.index[g, chains, t] = first + slot
            member = torch.zeros(len(x), dtype=torch.long).index_put((inverse,), self.plan.prompt)
            self.latents = torch.cat([self.latents, x[born]])
            self.prompt = torch.cat([self.prompt, member[born]])
            for name, value in (("grid", g), ("birth", t), ("level", t)):
                setattr(self, name, torch.cat([getattr(self, name), torch.full_like(born, value)]))
            self.advance(t, first + torch.arange(len(born)), velocity[born], sigmas)

    def finals(self, ends: Tensor) -> Finals:
        """All clean latents: the distinct ends of the chains, then the tails."""
        num_steps = self.wanted.shape[1] - 1
        rows, inverse = distinct(self.plan, num_steps)
        tails = self.index >= 0
        own = self.wanted & self.ends_as_ode
        index = torch.where(tails, self.index + len(rows), inverse[:, None].where(own, -1))
        prompt = torch.cat([self.plan.prompt[rows], self.prompt])
        return Finals(torch.cat([ends[rows], self.latents]), prompt, index)
