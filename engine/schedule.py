"""Tables over the T denoising steps: noise levels and noise rates."""

import math

import torch
from torch import Tensor

from .protocols import Rate


def shifted_linear(num_steps: int, shift: float = 3.0) -> Tensor:
    """[T+1] from 1 to 0; ``shift`` > 1 spends more steps at high noise (SD3, arXiv 2403.03206, eq. 23)."""
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()


def sd3_twice_shifted(num_steps: int, shift: float = 3.0, num_train_steps: int = 1000) -> Tensor:
    """[T+1] as diffusers' SD3 pipelines sample when only a step count is given: the shift acts twice.

    Flow-GRPO and its successors trained SD3.5 with it, so their rates and clip ranges belong to it.
    """
    lowest = shifted_value(1 / num_train_steps, shift)
    t = torch.linspace(1, lowest, num_steps, dtype=torch.float64)
    return torch.cat([shift * t / (1 + (shift - 1) * t), t.new_zeros(1)]).float()


def flux_shifted(
    num_steps: int, num_tokens: int, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)
) -> Tensor:
    """[T+1] of FLUX.1: linspace(1, 1/T) with a shift that grows with the image, exp(mu).

    mu is linear in the number of tokens, through ``low`` and ``high`` (tokens, mu): 0.5 at 256 and 1.15 at 4096
    tokens (black-forest-labs/flux, get_schedule); same as diffusers.
    """
    mu = low[1] + (high[1] - low[1]) * (num_tokens - low[0]) / (high[0] - low[0])
    return shifted_linear(num_steps, math.exp(mu))


def shifted_value(t: float, shift: float) -> float:
    """One noise level after the shift."""
    return shift * t / (1 + (shift - 1) * t)


def constant_rate(eta: float) -> Rate:
    """DanceGRPO; also the share of fresh noise for ``cps``."""
    return lambda sigmas: torch.full((len(sigmas) - 1,), eta)


def flow_rate(a: float) -> Rate:
    """Flow-GRPO: a * sqrt(sigma / (1 - sigma)); as in the authors' code, sigma 1 uses 1 - sigmas[1]."""

    def rate(sigmas: Tensor) -> Tensor:
        s = sigmas[:-1]
        return a * (s / (1 - s.where(s < 1 - 1e-6, sigmas[1]))).sqrt()

    return rate


def table_rate(rates: Tensor, sigmas: Tensor) -> Rate:
    """DenseGRPO (arXiv 2601.20218, eq. 11): calibrated rates of the steps [T], for the noise levels ``sigmas`` [T+1].

    Raises ValueError when it is used with another schedule.
    """

    def rate(used: Tensor) -> Tensor:
        if len(rates) != len(used) - 1:
            raise ValueError(
                f"the noise table has {len(rates)} rates but the schedule has {len(used) - 1} steps; "
                "calibrate again or use the table's number of steps"
            )
        if not torch.allclose(used.cpu(), sigmas, atol=1e-4):
            levels = ", ".join(f"{s:.3f}" for s in used.tolist())
            raise ValueError(f"the noise table belongs to other noise levels than {levels}; calibrate again")
        return rates

    return rate
