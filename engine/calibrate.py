"""Calibrated exploration (DenseGRPO, arXiv 2601.20218, algorithm 1): how much noise each step bears.

With too much noise at a step nearly every chain loses reward there, and the step teaches only that noise is bad. The
rules look for the most noise at which about as many chains gain as lose. Nothing is trained.

Balance alone is no proof of good noise: the brightness of pure noise goes up as often as down. So the robust rule, our
addition, also keeps every state near the noise level that the model expects there.

Axes: T denoising steps, B trajectories, M rewards. The last step is never noisy; its rate stays as it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .credit import gain
from .data import Plan, Prompt, StepRewards
from .filmstrip import untimed
from .knobs import Choice, Knob, Option, check, options_of
from .probe import EveryState, score
from .protocols import FlowModel
from .randomness import Purpose, normal, rng
from .recipes import Recipe
from .rewards import Panel
from .rollout import rollout
from .train import RewardError

SMALLEST = 1e-3
"""A rate of 0 would make the step an ODE step, whose gain is always 0."""
LARGEST = {"sde": 99.0, "cps": 1.0}
"""By kernel; with CPS a rate is the share of fresh noise."""
ENOUGH = 6
"""Gains other than 0 without which the robust rule leaves a step alone."""


class Balance(NamedTuple):
    """How often each step raised and lowered the reward. Steps that changed nothing count in neither."""

    positive: Tensor
    """[T] trajectories whose gain is above 0."""
    negative: Tensor
    """[T] trajectories whose gain is below 0."""
    scored: Tensor
    """[T] trajectories whose gain is known."""

    @property
    def imbalance(self) -> Tensor:
        """[T] (positive - negative) / (positive + negative), in -1..1; 0 where nothing changed."""
        return (self.positive - self.negative) / (self.positive + self.negative).clamp(min=1)


class Rule(Protocol):
    """How the rates move from round to round."""

    def limits(self, sigmas: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        """Return the least and the most noise of each step, [T] each, for noise levels [T+1]."""
        ...

    def __call__(self, rates: Tensor, balance: Balance, progress: float) -> Tensor:
        """Return the next rates [T]; ``progress`` is the part of the rounds that is done, 0 in the first."""
        ...

    def result(self, tried: Tensor) -> Tensor:
        """Return the calibrated rates [T] from those after each round [rounds, T]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Faithful:
    """Algorithm 1 of DenseGRPO as printed: a fixed amount up where the counts are nearly equal, else down.

    It drifts down where ``trajectories`` is above 9 or so, even when gains are balanced, because ``eps1`` does not grow
    with it; and up without end where most gains are 0. The paper gives neither start, rounds nor limits.
    """

    eps1: Annotated[float, Knob(0.0, 10_000.0, "faithful: more noise when the counts differ by less than this")] = 2.0
    eps2: Annotated[float, Knob(0.0001, 1.0, "faithful: how much a rate changes in a round")] = 0.01

    def limits(self, sigmas: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        """Only what a kernel can do at all."""
        most = torch.full((len(sigmas) - 1,), LARGEST[kernel])
        return torch.full_like(most, SMALLEST), most

    def __call__(self, rates: Tensor, balance: Balance, progress: float) -> Tensor:
        """One step up or down."""
        balanced = (balance.positive - balance.negative).abs() < self.eps1
        return rates + torch.where(balanced, self.eps2, -self.eps2)

    def result(self, tried: Tensor) -> Tensor:
        """The last."""
        return tried[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Robust:
    """The same idea, independent of the number of trajectories, safe with ties, and it settles.

    Rates change by a factor that shrinks from round to round. A step counts as balanced within ``tolerance``, or within
    one standard error, 1 / sqrt(n) of n gains, where that is more: with a tighter limit chance alone would lower the
    rate of a balanced step in most rounds. It settles where the imbalance is about ``tolerance``.
    """

    tolerance: Annotated[
        float, Knob(0.0, 1.0, "robust: part by which more gains may go one way than the other; 0.25 is 62 to 38 %")
    ] = 0.25
    stride: Annotated[
        float, Knob(0.001, 1.0, "robust: part by which a rate changes in the first round; falls to 0 over the rounds")
    ] = 0.2
    excess: Annotated[
        float, Knob(0.001, 1.0, "robust: noise that a step of kernel sde may leave above the noise level it leads to")
    ] = 0.05
    lowest: Annotated[float, Knob(0.001, 1.0, "robust: least noise of a step")] = 0.05
    highest: Annotated[float, Knob(0.01, 20.0, "robust: most noise of a step; with kernel cps at most 1")] = 3.5
    averaged: Annotated[int, Knob(1, 1000, "robust: rounds at the end whose rates are averaged")] = 8

    def limits(self, sigmas: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        """``lowest``, and ``highest`` or what ``excess`` allows. CPS leaves no excess by construction."""
        most = torch.full((len(sigmas) - 1,), min(self.highest, LARGEST[kernel]))
        if kernel == "sde":
            most = most.minimum(rate_of_excess(sigmas, self.excess))
        return most.clamp(max=self.lowest), most

    def __call__(self, rates: Tensor, balance: Balance, progress: float) -> Tensor:
        """One factor up or down, or none where too few gains are known."""
        changed = balance.positive + balance.negative
        balanced = balance.imbalance.abs() <= changed.clamp(min=1).rsqrt().clamp(min=self.tolerance)
        factor = 1 + self.stride * (1 - progress)
        moved = torch.where(balanced, rates * factor, rates / factor)
        return torch.where(changed >= ENOUGH, moved, rates)

    def result(self, tried: Tensor) -> Tensor:
        """The average of the last ones."""
        return tried[-self.averaged :].mean(0)


RULES: dict[str, type[Robust] | type[Faithful]] = {"robust": Robust, "faithful": Faithful}


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """How much is tried. A trajectory costs T (T + 1) / 2 model evaluations: 55 at T = 10, 36 at T = 8."""

    rule: Annotated[
        str, Choice(tuple(RULES), "how rates follow the balance: robust settles, faithful is the paper's own")
    ] = "robust"
    rounds: Annotated[int, Knob(1, 10_000, "how often rates are tried and changed")] = 30
    trajectories: Annotated[int, Knob(ENOUGH, 10_000, "trajectories of a round, each of a random prompt")] = 32
    measured: Annotated[int, Knob(1, 100_000, "other trajectories that measure the balance before and after")] = 128

    def evaluations(self, num_steps: int) -> int:
        """Model evaluations of a whole calibration, when every probe takes all remaining steps."""
        return (self.rounds * self.trajectories + 2 * self.measured) * num_steps * (num_steps + 1) // 2


class Round(NamedTuple):
    """What one round of a calibration hands to its caller."""

    number: int
    """0 measures the start, 1 to ``last`` - 1 change the rates, ``last`` measures the result."""
    last: int
    sigmas: Tensor
    """[T+1]"""
    rates: Tensor
    """[T] that were tried."""
    balance: Balance


def calibration_options() -> dict[str, Option]:
    """Everything a calibration can be told: its size, and the options of all rules."""
    return {key: option for part in (CalibrationSettings, *RULES.values()) for key, option in options_of(part).items()}


def make_calibration(options: Mapping[str, Any]) -> tuple[CalibrationSettings, Rule]:
    """Settings and rule from options by name. Raises ValueError for an option that the chosen rule does not have."""
    size = options_of(CalibrationSettings)
    rule = RULES.get(options.get("rule", "robust"), Robust)
    check("calibration", size | options_of(rule), options)
    settings = CalibrationSettings(**{key: value for key, value in options.items() if key in size})
    return settings, rule(**{key: value for key, value in options.items() if key not in size})


@torch.no_grad()
def calibrate(
    model: FlowModel,
    cond: Any,
    prompts: Sequence[Prompt],
    panel: Panel,
    recipe: Recipe,
    settings: CalibrationSettings,
    rule: Rule,
    *,
    num_steps: int,
    seed: int,
    batch: int,
) -> Iterator[Round]:
    """Yield ``rounds`` + 2 rounds: the balance at the recipe's own noise, the search, the balance at its result.

    ``cond`` is ``model.encode`` of the texts of ``prompts``. The first and the last round look at the same
    trajectories, which the search has not seen. At most ``batch`` latents go through the model at once; the result
    does not depend on it. Several rewards are added with their weights, each divided by the spread of its gains.
    Raises ValueError when a reward cannot use a prompt, RewardError when no trajectory of a round could be scored.
    """
    panel.validate(prompts)
    sigmas = model.schedule(num_steps).cpu()
    probe = recipe.probe if isinstance(recipe.probe, EveryState) else EveryState()
    last = settings.rounds + 1

    def tried(number: int, key: int, rates: Tensor, count: int) -> Round:
        gains, errors = [], []
        for first in range(0, count, batch):
            keys = [(seed, key, slot) for slot in range(first, min(first + batch, count))]
            plan = make_plan(model.latent_shape, rates, len(prompts), keys)
            _, finals = rollout(model, cond, plan, sigmas, recipe.noise.step, probe, batch)
            rewards, scored, _ = score(model, finals, prompts, panel, batch, untimed)
            gains.append(gain(rewards, plan.group))
            errors += scored.errors
        balance = balance_of(StepRewards(torch.cat(gains, 1), panel.weights))
        if not balance.scored.any():
            reason = errors[0] if errors else "a reward gave NaN to every image"
            raise RewardError(
                f"calibration, round {number}: none of the {count} trajectories could be scored ({reason}); fix the "
                "reward, then calibrate again"
            )
        return Round(number, last, sigmas, rates, balance)

    def allowed(rates: Tensor) -> Tensor:
        return torch.cat([rates.clamp(*limits)[:-1], start[-1:]])

    limits = rule.limits(sigmas, recipe.noise.kernel)
    start = recipe.noise.rates(sigmas).float().cpu()
    yield tried(0, 0, start, settings.measured)
    rates, history = allowed(start), []
    for number in range(1, last):
        found = tried(number, number, rates, settings.trajectories)
        rates = allowed(rule(rates, found.balance, (number - 1) / settings.rounds))
        history.append(rates)
        yield found
    yield tried(last, 0, allowed(rule.result(torch.stack(history))), settings.measured)


def rate_of_excess(sigmas: Tensor, excess: float) -> Tensor:
    """[T] the rate g at which a step of the SDE leaves noise of sigma' + ``excess`` where sigma' is due.

    A perfect model's noise after the step is sqrt((sigma' - q)^2 + g^2 h), with h = sigma - sigma' and q = g^2 h /
    (2 sigma); that is sqrt(sigma'^2 + q^2 + 2 q h). An ODE tail takes away sigma' of it and the rest stays visible.
    """
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    h = sigma - sigma_next
    q = (h.square() + excess * (excess + 2 * sigma_next)).sqrt() - h
    return (2 * sigma * q / h).sqrt()


def make_plan(
    latent_shape: tuple[int, ...], rates: Tensor, num_prompts: int, keys: Sequence[tuple[int, int, int]]
) -> Plan:
    """One chain for each key, of a random prompt, noisy at every step but the last."""
    chain = torch.arange(len(keys))
    rate = rates.repeat(len(keys), 1)
    rate[:, -1] = 0
    return Plan(
        noise=torch.stack([normal(latent_shape, Purpose.START, *key) for key in keys]),
        prompt=torch.tensor([int(rng(Purpose.CALIBRATION, *key).integers(num_prompts)) for key in keys]),
        root=chain,
        rate=rate,
        train=rate > 0,
        group=chain,
        seed=torch.zeros_like(chain),
        key=tuple(keys),
    )


def balance_of(gains: StepRewards) -> Balance:
    """Count the signs of gains, ``values`` [M, B, T]; NaN = unknown.

    Several rewards are first brought to one scale, else the one with the largest numbers would decide alone. They are
    not shifted: a gain of 0 stays 0.
    """
    scale = gains.values.square().nanmean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
    total = torch.einsum("m,mbt->bt", gains.weights, gains.values / scale)
    return Balance(*(what.sum(0).float() for what in (total > 0, total < 0, total.isfinite())))
