"""Sampling: turn a plan into trajectories and finished probes, in one wave down the noise levels.

All rows at the same noise level - chains that differ and the ODE tails of probed states - go through the
model together. A chain's velocity is also its probe's first step, so DenseGRPO at T = 10 costs 55
evaluations and 10 batched calls per chain instead of 65 and 65. States that are still equal are computed once
(shared starts, trunks of branches), and a chain rests when nobody needs the rest of it.
"""

from typing import Any

import torch
from torch import Tensor

from .data import Finals, Gaussian, Plan, Trajectory
from .protocols import FlowModel, Kernel, Probe
from .randomness import Purpose, normal
from .wave import Wave


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
        rows, inverse = wave.needed(t)
        moving = wave.at(t)
        batch = torch.cat([x[rows], wave.latents[moving]])
        prompts = torch.cat([plan.prompt[rows], wave.prompt[moving]])
        velocity = in_chunks(model, cond, batch, sigmas[t], prompts, chunk)
        own, tails = velocity[: len(rows)], velocity[len(rows) :]
        wave.advance(t, moving, tails, sigmas)
        wave.give_birth(t, x[rows], own, inverse, sigmas)
        # Chains that are needed no more rest where they are.
        own = torch.cat([own, torch.zeros_like(x[:1])])[inverse]
        dist = policy(kernel, x, own, sigmas[t], sigmas[t + 1], plan.rate[:, t])
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
    if len(x) == 0:  # all tails skip this level
        return x
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
