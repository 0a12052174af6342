"""How a noisy step looks and how much noise it gets."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from .kernels import CPS, EULER_MARUYAMA
from .knobs import Choice, Knob, Table
from .protocols import Kernel
from .schedule import constant_rate, flow_rate, table_rate

KERNELS = {"sde": EULER_MARUYAMA, "cps": CPS}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNoise:
    """A kernel and its noise rates. Raises ValueError where they do not go together."""

    noise: Annotated[float, Knob(0.01, 2.0, "how much noise a noisy step injects")] = 0.7
    noise_shape: Annotated[
        str, Choice(("flow", "constant"), "more noise in the early steps (Flow-GRPO), or the same in all (DanceGRPO)")
    ] = "flow"
    kernel: Annotated[
        str,
        Choice(
            tuple(KERNELS),
            "noisy step: Flow-GRPO's SDE, or CPS (arXiv 2509.05952), where noise is the share of fresh noise",
        ),
    ] = "sde"
    noise_table: Annotated[Any, Table("calibrated noise of each step; replaces noise and noise_shape")] = None

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        table = self.noise_table
        if table is None and self.kernel == "cps" and self.noise > 1:
            raise ValueError(f"noise is the share of fresh noise with kernel cps and must be in 0..1, got {self.noise}")
        if table is not None and table["kernel"] != self.kernel:
            raise ValueError(
                f"the noise table was calibrated for kernel {table['kernel']}, not {self.kernel}; calibrate again"
            )

    @property
    def step(self) -> Kernel:
        """The kernel."""
        return KERNELS[self.kernel]

    def rates(self, sigmas: Tensor) -> Tensor:
        """Noise levels [T+1] -> rates [T]. Raises ValueError when a table belongs to other noise levels."""
        if self.noise_table is not None:
            table = table_rate(torch.tensor(self.noise_table["rates"]), torch.tensor(self.noise_table["sigmas"]))
            return table(sigmas)
        # With CPS a rate is a share, which is the same everywhere.
        flow = self.noise_shape == "flow" and self.kernel == "sde"
        return (flow_rate if flow else constant_rate)(self.noise)(sigmas)
