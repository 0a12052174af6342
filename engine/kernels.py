"""One denoising step as a Gaussian. With ``rate = 0`` every kernel is the Euler step of the ODE.

Shapes: x, velocity [B, ...]; sigma, sigma_next, rate [B]. sigma falls from 1 (noise) to 0 (data),
so ``dt = sigma_next - sigma`` is negative.
"""

import math

from torch import Tensor

from .data import Gaussian, expand
from .protocols import Kernel


def euler_maruyama(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, rate: Tensor) -> Gaussian:
    """Marginal-preserving SDE, noise ``rate`` per sqrt(time) (Flow-GRPO, arXiv 2505.05470, eq. 9).

    Flow-GRPO, DanceGRPO and DenseGRPO differ only in the table of rates, see ``schedule.py``.
    """
    s, s_next, rate = (expand(a, x) for a in (sigma, sigma_next, rate))
    dt = s_next - s
    noise_estimate = x + (1 - s) * velocity
    mean = x + velocity * dt + rate**2 / (2 * s) * noise_estimate * dt
    return Gaussian(mean, rate * (-dt).sqrt())


def cps(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, rate: Tensor) -> Gaussian:
    """Coefficient-preserving step (arXiv 2509.05952); ``rate`` in 0..1 is the share of fresh noise."""
    s, s_next, rate = (expand(a, x) for a in (sigma, sigma_next, rate))
    x0, noise_estimate = x - s * velocity, x + (1 - s) * velocity
    std = s_next * (rate * math.pi / 2).sin()
    return Gaussian((1 - s_next) * x0 + (s_next**2 - std**2).clamp(min=0).sqrt() * noise_estimate, std)


def log_prob(sample: Tensor, dist: Gaussian) -> Tensor:
    """Mean log density per element, [B]; 0 where ``std`` is 0 (an ODE step has no density)."""
    std = noisy_std(dist)
    density = -((sample - dist.mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.where(dist.std > 0, 0).flatten(1).mean(1)


def unscaled_log_prob(sample: Tensor, dist: Gaussian) -> Tensor:
    """-(sample - mean)^2, mean per element, [B]: the density as all CPS codes have it, 1 / (2 std^2) removed.

    With the true density the last noisy step (std about 0.008) would outweigh every other thirty times and more.
    """
    density = -((sample - dist.mean) ** 2)
    return density.where(dist.std > 0, 0).flatten(1).mean(1)


def noisy_std(dist: Gaussian) -> Tensor:
    """``std`` with 1 for 0: dividing by 0 and masking afterwards would still give NaN gradients."""
    return dist.std.where(dist.std > 0, 1)


EULER_MARUYAMA = Kernel(euler_maruyama, log_prob)
CPS = Kernel(cps, unscaled_log_prob)
