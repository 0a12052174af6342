"""The ODE tails of probed states, travelling down the noise levels beside the chains.

A tail is born where its state is reached, from the velocity that the chain needs anyway. A state after which its
chain is not noisy any more has the chain itself for its tail, where a grid takes every remaining level.
"""

import torch
from torch import Tensor

from .data import Finals, Plan, distinct, expand
from .protocols import Probe


def euler(x: Tensor, velocity: Tensor, before: Tensor, sigma_before: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """First order."""
    return x + velocity * expand(there - here, x)


def dpm2m(x: Tensor, velocity: Tensor, before: Tensor, sigma_before: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): also uses the clean latent seen one step before.

    First order, which is Euler, for the first step, from sigma 1 and into sigma 0, where log-SNR is infinite.
    """
    growth, growth_before = here.logit() - there.logit(), sigma_before.logit() - here.logit()
    factor = (growth / (2 * growth_before)).nan_to_num(0, 0, 0)
    x0 = x - velocity * expand(here, x)
    share = expand(there / here, x)
    return share * x + (1 - share) * (x0 + expand(factor, x) * (x0 - before))


SOLVERS = {"euler": euler, "dpm2m": dpm2m}
"""(x, velocity, clean latent seen one step before, its sigma (1 = none), sigma, sigma_next) -> next x."""


class Wave:
    """Which chains are needed at each level, and the tails."""

    def __init__(self, plan: Plan, probe: Probe, like: Tensor):
        self.plan, self.grids, self.solver = plan, probe.grids, SOLVERS[probe.tail_solver]
        num_chains, num_steps = plan.rate.shape
        self.wanted = probe.states(plan)
        self.next_level = torch.zeros(len(self.grids), num_steps, num_steps + 1, dtype=torch.long)
        self.whole = torch.ones(len(self.grids), num_steps + 1, dtype=torch.bool)
        """[S, T+1] whether the grid takes every level after state ``k``."""
        for g, grid in enumerate(self.grids):
            for k in range(num_steps):
                route = list(grid(k, num_steps))
                self.next_level[g, k, route[:-1]] = torch.tensor(route[1:])
                self.whole[g, k] = len(route) == num_steps - k + 1 and probe.tail_solver == "euler"
        noisy_later = plan.rate.gt(0).flip(1).cumsum(1).flip(1) > 0
        self.ends_as_ode = torch.cat([~noisy_later, noisy_later.new_ones(num_chains, 1)], 1)
        self.own = (self.wanted & self.ends_as_ode) & self.whole[:, None]
        """[S, B, T+1] states whose tail is the chain itself."""
        # Before an ODE step a state has the same whole tail as after it.
        self.like_next = (plan.rate.eq(0) & noisy_later) & self.whole[:, None, :-1]
        self.births = self.wanted & ~self.own
        """[S, B, T+1] states whose tail is computed."""
        for k in range(num_steps):
            moved = self.births[..., k] & self.like_next[..., k]
            self.births[..., k + 1] |= moved
            self.births[..., k] &= ~moved
        self.to_the_end = self.own.any(0).any(1)
        last_wanted = self.wanted.int().cumsum(1).argmax(1)
        self.rests_after = last_wanted.where(~self.to_the_end, num_steps)
        self.noisy_later = noisy_later
        self.latents = self.before = like[:0]
        self.sigma_before = like.new_zeros(0)
        self.grid, self.birth, self.level, self.prompt = (plan.prompt[:0] for _ in range(4))
        self.index = torch.full((len(self.grids), num_chains, num_steps + 1), -1)

    def needed(self, t: int) -> tuple[Tensor, Tensor]:
        """Distinct states before step ``t`` whose velocity somebody needs: (rows [R], inverse [B], -1 for none)."""
        rows, inverse = distinct(self.plan, t)
        busy = inverse[self.noisy_later[:, t] | (self.rests_after >= t)].unique()
        place = torch.full_like(rows, -1)
        place[busy] = torch.arange(len(busy))
        return rows[busy], place[inverse]

    def at(self, t: int) -> Tensor:
        """Which tails need a velocity at level ``t``."""
        return (self.level == t).nonzero().flatten()

    def advance(self, t: int, moving: Tensor, velocity: Tensor, sigmas: Tensor) -> None:
        """Solver step of the tails ``moving`` from level ``t`` to the next level of their grid."""
        level = self.next_level[self.grid[moving], self.birth[moving], t]
        here, there = sigmas[t].expand(len(moving)), sigmas[level.to(sigmas.device)]
        x, before, sigma_before = self.latents[moving], self.before[moving], self.sigma_before[moving]
        self.latents[moving] = self.solver(x, velocity, before, sigma_before, here, there)
        self.before[moving], self.sigma_before[moving] = x - velocity * expand(here, x), here
        self.level[moving] = level

    def give_birth(self, t: int, x: Tensor, velocity: Tensor, inverse: Tensor, sigmas: Tensor) -> None:
        """Start the tails of state ``t``; ``x``, ``velocity`` [R, ...] of the needed rows, ``inverse`` [B]."""
        for g in range(len(self.grids)):
            chains = self.births[g, :, t].nonzero().flatten()
            born, slot = inverse[chains].unique(return_inverse=True)
            first = len(self.latents)
            self.index[g, chains, t] = first + slot
            member = torch.zeros(len(x), dtype=torch.long).index_put((inverse[chains],), self.plan.prompt[chains])
            self.latents = torch.cat([self.latents, x[born]])
            self.before = torch.cat([self.before, x[born]])
            self.sigma_before = torch.cat([self.sigma_before, sigmas.new_ones(len(born))])
            self.prompt = torch.cat([self.prompt, member[born]])
            for name, value in (("grid", g), ("birth", t), ("level", t)):
                setattr(self, name, torch.cat([getattr(self, name), torch.full_like(born, value)]))
            self.advance(t, first + torch.arange(len(born)), velocity[born], sigmas)

    def finals(self, ends: Tensor) -> Finals:
        """All clean latents: the distinct ends of the chains that got there, then the tails.

        A chain that rests before its end ends like the tail of its last probed state.
        """
        rows, inverse = distinct(self.plan, self.wanted.shape[1] - 1)
        kept = inverse[self.to_the_end].unique()
        place = torch.full_like(rows, -1)
        place[kept] = torch.arange(len(kept))
        index = torch.where(self.index >= 0, self.index + len(kept), place[inverse][:, None].where(self.own, -1))
        for k in reversed(range(self.like_next.shape[-1])):
            index[..., k] = torch.where(self.like_next[..., k], index[..., k + 1], index[..., k])
        index = index.where(self.wanted, -1)
        last = index.gather(2, self.rests_after.expand(len(index), -1)[..., None])[..., 0]
        index[..., -1] = torch.where(self.to_the_end, place[inverse], last)
        prompt = torch.cat([self.plan.prompt[rows[kept]], self.prompt])
        return Finals(torch.cat([ends[rows[kept]], self.latents]), prompt, index)
