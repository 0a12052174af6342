"""The published methods, each a choice of the same orthogonal parts. Read this file first.

| part      | question it answers                                  | module       |
|-----------|------------------------------------------------------|--------------|
| explore   | where is noise injected, which chains are compared?  | explore.py   |
| kernel    | how does one noisy step look?                        | kernels.py   |
| probe     | which states are scored?                             | probe.py     |
| credit    | which step earned what?                              | credit.py    |
| normalise | how do credits become advantages?                    | advantage.py |
| weight    | which steps matter more?                             | loss.py      |
| update    | how does the policy move?                            | loss.py      |
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .advantage import GroupNorm
from .credit import broadcast_terminal, gain
from .explore import independent_chains
from .kernels import CPS, EULER_MARUYAMA
from .knobs import Evaluations, GroupSize, KernelName, Noise, Option, SharedNoise, check, options_of, suggest
from .loss import PolicyUpdate, uniform
from .probe import TERMINAL, every_state
from .protocols import Credit, Explore, Kernel, Probe, Rate, StepWeight
from .schedule import constant_rate, flow_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training method."""

    explore: Explore
    kernel: Kernel = EULER_MARUYAMA
    probe: Probe = TERMINAL
    credit: Credit = broadcast_terminal
    normalise: GroupNorm = field(default_factory=GroupNorm)
    weight: StepWeight = uniform
    update: PolicyUpdate = field(default_factory=PolicyUpdate)


def flow_grpo(
    group_size: GroupSize = 24,
    noise: Noise = 0.7,
    kernel: KernelName = "sde",
    shared_noise: SharedNoise = False,
) -> Recipe:
    """Flow-GRPO, arXiv 2505.05470: noise everywhere, one terminal reward for all steps, KL to the untrained model.

    Differs from the authors' code: the last step is an ODE step, and the group's own standard deviation
    divides (their default is that of the whole batch: ``std_scope="global"``).
    """
    return Recipe(
        explore=independent_chains(group_size, rates(kernel, noise), shared_noise=shared_noise),
        kernel=KERNELS[kernel],
        update=PolicyUpdate(kl="flow_grpo", kl_weight=0.04, num_updates=2),
    )


def dense_grpo(
    group_size: GroupSize = 24,
    noise: Noise = 0.7,
    kernel: KernelName = "sde",
    shared_noise: SharedNoise = False,
    probe_evaluations: Evaluations = 0,
) -> Recipe:
    """DenseGRPO, arXiv 2601.20218: every step is paid the reward it added, measured by ODE probes (eq. 7-10).

    Differs from the paper: the last step is an ODE step, so its gain is 0 and it is not trained.
    """
    base = flow_grpo(group_size, noise, kernel, shared_noise)
    return replace(base, probe=every_state(probe_evaluations), credit=gain)


KERNELS = {"sde": EULER_MARUYAMA, "cps": CPS}


def rates(kernel: str, noise: float) -> Rate:
    """The rate table that belongs to a kernel: Flow-GRPO's for the SDE, a constant share for CPS.

    Raises ValueError when CPS is asked for more than all of the noise.
    """
    if kernel == "cps" and noise > 1:
        raise ValueError(f"noise is the share of fresh noise with kernel cps and must be in 0..1, got {noise}")
    return flow_rate(noise) if kernel == "sde" else constant_rate(noise)


RECIPES: dict[str, Callable[..., Recipe]] = {f.__name__: f for f in (flow_grpo, dense_grpo)}


def recipe_options(name: str) -> dict[str, Option]:
    """All options of a recipe: its own, then those of the normaliser and of the policy update."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{suggest(name, RECIPES)}; known: {', '.join(sorted(RECIPES))}")
    recipe = RECIPES[name]()
    known = options_of(RECIPES[name])
    for part in (recipe.normalise, recipe.update):
        known |= {key: o._replace(default=getattr(part, key)) for key, o in options_of(type(part)).items()}
    return known


def make_recipe(name: str, **options: Any) -> Recipe:
    """The recipe of that name; ValueError names what is known."""
    known = recipe_options(name)
    check(name, known, options)

    def of(owner: Any) -> dict[str, Any]:
        return {key: value for key, value in options.items() if key in options_of(owner)}

    if options.get("norm_axis") == "joint" and options.get("std_floor", 0) > 0:
        raise ValueError(f"{name}: std_floor has no effect with norm_axis 'joint'; leave one of them out")
    recipe = RECIPES[name](**of(RECIPES[name]))
    return replace(
        recipe,
        normalise=replace(recipe.normalise, **of(GroupNorm)),
        update=replace(recipe.update, **of(PolicyUpdate)),
    )
