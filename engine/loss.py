"""Policy losses on single transitions, KL forms, weights of steps, and the split into optimizer steps.

Axes: N transitions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .data import Gaussian, Plan
from .kernels import noisy_std
from .knobs import Choice, Knob
from .protocols import Kernel


class Move(NamedTuple):
    """One policy's opinion of N transitions."""

    velocity: Tensor
    """[N, C, H, W]"""
    dist: Gaussian
    """Distribution of the next state."""
    log_prob: Tensor
    """[N] of the next state that was sampled."""

    def detach(self) -> "Move":
        """The same numbers without gradient."""
        return Move(self.velocity.detach(), Gaussian(*(a.detach() for a in self.dist)), self.log_prob.detach())


def per_element(values: Tensor) -> Tensor:
    """[N, ...] -> [N] mean."""
    return values.flatten(1).mean(1)


def plain_ratio(new: Move, old: Move, sample: Tensor) -> Tensor:
    """pi_new / pi_old of the sampled states, as a geometric mean per latent element, [N]."""
    return (new.log_prob - old.log_prob).exp()


def normalised_ratio(new: Move, old: Move, sample: Tensor) -> Tensor:
    """GRPO-Guard's ratio (arXiv 2510.22319): same variance at every step, and no drift below 1.

    std * (log ratio + |mean shift|^2 / (2 std^2)) equals the mean of (mean shift) * (noise that was drawn); this
    form also serves densities whose constants were removed.
    """
    noise = (sample - old.dist.mean) / noisy_std(old.dist)
    return per_element((new.dist.mean - old.dist.mean) * noise).exp()


RATIOS = {"plain": plain_ratio, "guard": normalised_ratio}


def exact_kl(new: Move, reference: Move, step_size: Tensor) -> Tensor:
    """KL(new || reference) per element, |mean shift|^2 / (2 std^2), [N]; 0 where ``std`` is 0."""
    shift = (new.dist.mean - reference.dist.mean) ** 2 / (2 * noisy_std(new.dist) ** 2)
    return per_element(shift.where(new.dist.std > 0, 0))


def flow_grpo_kl(new: Move, reference: Move, step_size: Tensor) -> Tensor:
    """|mean shift|^2 / (2 rate^2): what Flow-GRPO's code calls KL; the exact one times the step size, [N]."""
    return exact_kl(new, reference, step_size) * step_size


def velocity_kl(new: Move, reference: Move, step_size: Tensor) -> Tensor:
    """Mean squared difference of velocities: every step counts alike, [N]."""
    return per_element((new.velocity - reference.velocity) ** 2)


KLS = {"exact": exact_kl, "flow_grpo": flow_grpo_kl, "velocity": velocity_kl}


def uniform(std: Tensor, step_size: Tensor) -> Tensor:
    """All steps weigh 1."""
    return torch.ones_like(std)


def noise_aware(std: Tensor, step_size: Tensor) -> Tensor:
    """In proportion to the injected noise (TempFlow-GRPO, arXiv 2508.04324, eq. 8).

    The mean over the schedule is 1: for SD3.5, T = 10, a = 0.7 that is their 2.25 * std.
    """
    return std / std.mean()


def inverse_step(std: Tensor, step_size: Tensor) -> Tensor:
    """In proportion to 1 / step size, mean 1: with GRPO-Guard's ratio all steps pull alike (arXiv 2510.22319)."""
    return 1 / step_size / (1 / step_size).mean()


WEIGHTS = {"uniform": uniform, "noise": noise_aware, "inverse_step": inverse_step}
"""(std of the noise [T-1], step sizes [T-1]) of all steps but the last -> factor on the policy loss of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyUpdate:
    """PPO's clipped objective plus a KL penalty; the clip range is tiny because densities are means per element."""

    clip_range: Annotated[float, Knob(1e-8, 1.0, "how far a ratio may go before its gradient stops")] = 1e-4
    ratio: Annotated[str, Choice(tuple(RATIOS), "plain, or GRPO-Guard's normalised ratio (arXiv 2510.22319)")] = "plain"
    step_weight: Annotated[
        str, Choice(tuple(WEIGHTS), "which steps count more: none, noisy ones (TempFlow-GRPO), short ones (GRPO-Guard)")
    ] = "uniform"
    kl: Annotated[str, Choice(tuple(KLS), "which KL form pulls to the untrained model")] = "exact"
    kl_weight: Annotated[float, Knob(0.0, 1000.0, "pull towards the untrained model")] = 0.0
    num_updates: Annotated[int, Knob(1, 64, "optimizer steps per iteration, each on a share of every group")] = 1
    update_per: Annotated[
        str,
        Choice(("rollout", "step"), "those optimizer steps for the whole rollout, or for each denoising step (G2RPO)"),
    ] = "rollout"

    def policy_loss(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """All [N] -> [N] losses."""
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return torch.maximum(-advantage * ratio, -advantage * clipped)

    def is_clipped(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """[N] bool: transitions that have gone far enough and give no gradient."""
        too_far = torch.where(advantage > 0, ratio > 1 + self.clip_range, ratio < 1 - self.clip_range)
        return too_far & (advantage != 0)

    def weights(self, kernel: Kernel, sigmas: Tensor, rates: Tensor) -> Tensor:
        """[T+1] noise levels, [T] noise rates of a schedule -> [T] factors on the policy loss; 0 for the last step."""
        here, there = sigmas[:-2], sigmas[1:-1]
        nothing = torch.zeros(len(here), 1).to(sigmas)
        std = kernel.step(nothing, nothing, here, there, rates[:-1].to(sigmas)).std.flatten()
        return torch.nn.functional.pad(WEIGHTS[self.step_weight](std, here - there), (0, 1))

    def updates(self, mask: Tensor, plan: Plan) -> Iterator[Tensor]:
        """[B, T] what is trained -> one such mask per optimizer step, an equal share of every group's chains.

        With ``update_per`` "step" the denoising steps take turns, the noisiest first (G2RPO's code).
        """
        place = place_in_group(plan.group)
        every_step = torch.ones(1, mask.shape[1], dtype=torch.bool)
        steps = torch.eye(mask.shape[1], dtype=torch.bool) if self.update_per == "step" else every_step
        for column in steps:
            for part in range(self.num_updates):
                yield mask & column & (place % self.num_updates == part)[:, None]


def place_in_group(group: Tensor) -> Tensor:
    """[B] -> [B] number of each chain among those of its group."""
    same = group[:, None] == group
    return same.tril(-1).sum(1)
