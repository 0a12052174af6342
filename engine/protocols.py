"""The few things a user can replace. Each is a handful of methods or a plain callable."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .data import Gaussian, Plan, StepRewards
from .lora import Lora
from .randomness import Key


class FlowModel(Protocol):
    """A flow-matching model with a LoRA. x_sigma = (1 - sigma) x_0 + sigma noise; velocity = noise - x_0."""

    latent_shape: tuple[int, ...]
    device: torch.device
    lora: Lora
    lora_prefix: str
    """What stock loaders expect before module names, e.g. ``diffusion_model`` or ``transformer``."""

    def encode(self, prompts: Sequence[str]) -> Any:
        """Return the conditioning of ``prompts``; only this model looks inside."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, cond: Any, rows: Tensor) -> Tensor:
        """Return dx/dsigma [R, ...] in float32 at ``x`` [R, ...], ``sigma`` [R], guidance applied.

        ``rows`` [R] says which of the encoded prompts each latent belongs to.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return images [N, 3, H, W] in 0..1, float32."""
        ...

    def schedule(self, num_steps: int) -> Tensor:
        """Return the noise levels [T+1], 1 to 0, that this model samples with."""
        ...


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """Images to score."""

    images: Tensor
    """[B, 3, H, W] float32 in 0..1."""
    prompts: Sequence[str]
    """[B]"""
    metadata: Sequence[Mapping[str, Any]]
    """[B] what the prompt file says beside the prompt."""
    groups: Tensor | None = None
    """[B] number of the group of images of one prompt that each belongs to; None: not known."""


@dataclass(frozen=True, slots=True)
class RewardResult:
    """Scores, higher is better; a failure is NaN with a reason, never 0."""

    scores: Tensor
    """[B] float32 on the CPU; NaN = no score."""
    details: Mapping[str, Tensor] = field(default_factory=dict)
    """Sub-scores that are logged, [B] each."""
    errors: Mapping[int, str] = field(default_factory=dict)
    """Index of a failed image -> reason."""
    skipped: frozenset[int] = frozenset()
    """Indices of images without a score that a person chose to pass over: that is no failure."""


class Reward(Protocol):
    """Scores a batch of images.

    Optional extras of its class, all False or missing unless it has them:

    - ``remote: ClassVar[bool]``: something else computes. It is asked in background threads, while the next images
      are made, so ``__call__`` must be safe in several threads at a time and must not use torch's random state.
    - ``interactive: ClassVar[bool]``: a person answers. It sees all images of an iteration in one call, with
      ``batch.groups``, in the main thread, and is left out of evaluations.
    - ``needs() -> Sequence[Need]``: the files it cannot do without, see ``rewards/files.py``.
    - ``session(folder: Path) -> AbstractContextManager[None]``: entered while a run in that folder is trained.
    """

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image of ``batch``."""
        ...

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Say what is wrong with these prompts for this reward, before training starts."""
        ...


class Kernel(NamedTuple):
    """One denoising step, used by sampling and by training alike."""

    step: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Gaussian]
    """(x, velocity, sigma, sigma_next, rate) -> distribution of the next state."""
    log_prob: Callable[[Tensor, Gaussian], Tensor]
    """(next state, its distribution) -> [B] mean per latent element."""


Rate = Callable[[Tensor], Tensor]
"""sigmas [T+1] -> noise rate of each step [T]."""

Explore = Callable[[tuple[int, ...], Tensor, Key], Plan]
"""(latent_shape, noise rate of each step [T], key of the group) -> the plan of one prompt."""

Grid = Callable[[int, int], Sequence[int]]
"""(state k, T) -> indices of the noise levels that finish it, k first, T last."""


class Probe(Protocol):
    """Which states are finished by ODE and scored."""

    @property
    def grids(self) -> tuple[Grid, ...]:
        """One granularity each."""
        ...

    @property
    def tail_solver(self) -> str:
        """How tails are finished, see ``SOLVERS`` in wave.py."""
        ...

    def states(self, plan: Plan) -> Tensor:
        """[B, T+1] bool: the states to finish."""
        ...


Credit = Callable[[StepRewards, Tensor, Tensor], Tensor]
"""([V, B, T+1] rewards of states, [B] group of each chain, [B, T] noisy steps) -> [V, B, T] credit of steps."""
