"""The published methods, each a choice of the same orthogonal parts. Read this file first.

| part      | question it answers                                  | choices                                           |
|-----------|------------------------------------------------------|---------------------------------------------------|
| explore   | where is noise injected, which chains are compared?  | Chains, Branches (explore.py)                     |
| noise     | how does a noisy step look, how much noise?          | StepNoise (noise.py, kernels.py, schedule.py)     |
| probe     | which states are finished and scored?                | FinalImage, EveryState, Granularities, FasterTail |
| credit    | which step earned what?                              | credit.py                                         |
| normalise | how do credits become advantages?                    | GroupNorm (advantage.py)                          |
| update    | how does the policy move, which steps matter more?   | PolicyUpdate (loss.py)                            |

The fields of the parts are the options of a method, with what stands here as defaults: GRPO-Guard's ratio or a sliding
window work in any method whose parts have them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from .advantage import GroupNorm
from .credit import TurningPoints, after_step, broadcast_terminal, gain
from .data import Plan
from .explore import Branches, Chains
from .knobs import Option, check, options_of, suggest
from .loss import PolicyUpdate
from .noise import StepNoise
from .probe import EveryState, FasterTail, FinalImage, Granularities
from .protocols import Credit, Explore, Probe
from .randomness import Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training method."""

    explore: Explore
    noise: StepNoise = field(default_factory=StepNoise)
    probe: Probe = field(default_factory=FinalImage)
    credit: Credit = broadcast_terminal
    normalise: GroupNorm = field(default_factory=GroupNorm)
    update: PolicyUpdate = field(default_factory=PolicyUpdate)

    def plan(self, latent_shape: tuple[int, ...], sigmas: Tensor, key: Key) -> Plan:
        """The plan of one prompt on the noise levels ``sigmas`` [T+1]. Raises ValueError when they do not suit it."""
        return self.explore(latent_shape, self.noise.rates(sigmas), key)


def flow_grpo() -> Recipe:
    """Flow-GRPO, arXiv 2505.05470: noise everywhere, one terminal reward for all steps, KL to the untrained model.

    Differs from the authors' code: the last step is an ODE step, and the group's own standard deviation
    divides (their default is that of the whole batch: ``std_scope="global"``).
    """
    return Recipe(explore=Chains(), update=PolicyUpdate(kl="flow_grpo", kl_weight=0.04, num_updates=2))


def flow_grpo_fast() -> Recipe:
    """Flow-GRPO-Fast (the Flow-GRPO authors' code): noise and training only in a short window, drawn for each group.

    Differs from the authors' code: there a window belongs to a model call, so that a group may hold several.
    """
    return Recipe(
        explore=Chains(window="random", window_size=3, window_end=5),
        noise=StepNoise(noise=0.8, kernel="cps"),
        normalise=GroupNorm(std_scope="global"),
        update=PolicyUpdate(clip_range=1e-5, num_updates=2),
    )


def dance_grpo() -> Recipe:
    """DanceGRPO, arXiv 2505.07818: the same noise at each step, one start per group, random steps are trained.

    The paper advises ``num_updates = 1`` for models with classifier-free guidance. It trains all weights at 1e-5.
    """
    return Recipe(
        explore=Chains(group_size=12, shared_noise=True, train_fraction=0.6),
        noise=StepNoise(noise=0.3, noise_shape="constant"),
        normalise=GroupNorm(std_eps=1e-8),
        update=PolicyUpdate(num_updates=4),
    )


def mix_grpo() -> Recipe:
    """MixGRPO, arXiv 2507.21802: noise and training only in a window that slides from the first step to the last."""
    return Recipe(
        explore=Chains(group_size=12, shared_noise=True, window="sliding"), update=PolicyUpdate(num_updates=4)
    )


def mix_grpo_flash() -> Recipe:
    """MixGRPO-Flash, arXiv 2507.21802: fewer steps after the window, by a second-order solver.

    With ``window = "fixed"`` it stays at the start: Flash*.
    """
    return replace(mix_grpo(), probe=FasterTail())


def dense_grpo() -> Recipe:
    """DenseGRPO, arXiv 2601.20218: every step is paid the reward it added, measured by ODE probes (eq. 7-10).

    The paper calibrates the noise (``densegrpo calibrate``); without a table it is Flow-GRPO's. Differs from the
    paper: the last step is an ODE step, so its gain is 0 and it is not trained.
    """
    return replace(flow_grpo(), probe=EveryState(), credit=gain)


def tempflow_grpo() -> Recipe:
    """TempFlow-GRPO, arXiv 2508.04324: branch at each step of an ODE trunk, weigh steps by their noise (eq. 7-8).

    ``across_seeds`` compares as the paper's first version did.
    """
    return Recipe(
        explore=Branches(group_size=6, num_seeds=4),
        update=PolicyUpdate(step_weight="noise", kl_weight=0.004, num_updates=2),
    )


def g2rpo() -> Recipe:
    """G2RPO (Granular-GRPO), arXiv 2510.01982: branches judged at several granularities, whose advantages add up.

    Differs from the authors' code: each grid ends at sigma 0. Their code has strides 1, 2; the paper 1, 2, 3.
    """
    return Recipe(
        explore=Branches(branch_share=0.5),
        probe=Granularities(),
        credit=after_step,
        normalise=GroupNorm(std_eps=1e-8),
        update=PolicyUpdate(update_per="step"),
    )


def tp_grpo() -> Recipe:
    """TP-GRPO, arXiv 2602.06422: gains, and at turning points the whole gain to the end.

    ``consistent = false`` is the paper's other variant. Differs from the authors' code: the gain of the first step
    starts from the image of the chain's own noise, and ``balance_by`` ranks what is applied.
    """
    return Recipe(
        explore=Chains(),
        noise=StepNoise(kernel="cps"),
        probe=EveryState(),
        credit=TurningPoints(),
        update=PolicyUpdate(clip_range=1e-5, kl_weight=1e-4, num_updates=2),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    f.__name__: f
    for f in (
        flow_grpo,
        flow_grpo_fast,
        dance_grpo,
        mix_grpo,
        mix_grpo_flash,
        dense_grpo,
        tempflow_grpo,
        g2rpo,
        tp_grpo,
    )
}


def parts_of(name: str) -> dict[str, Any]:
    """The parts of a recipe that have options. Raises ValueError that names what is known."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{suggest(name, RECIPES)}; known: {', '.join(sorted(RECIPES))}")
    recipe = RECIPES[name]()
    parts = {part.name: getattr(recipe, part.name) for part in fields(Recipe)}
    return {part: value for part, value in parts.items() if is_dataclass(value)}


def recipe_options(name: str) -> dict[str, Option]:
    """All options of a recipe: those of its parts, with its own defaults."""
    return {
        key: option._replace(default=getattr(part, key))
        for part in parts_of(name).values()
        for key, option in options_of(type(part)).items()
    }


def make_recipe(name: str, **options: Any) -> Recipe:
    """The recipe of that name; ValueError names what is known."""
    check(name, recipe_options(name), options)
    if options.get("norm_axis") == "joint" and options.get("std_floor", 0) > 0:
        raise ValueError(f"{name}: std_floor has no effect with norm_axis 'joint'; leave one of them out")
    changed = {
        part: replace(value, **{key: options[key] for key in options_of(type(value)) if key in options})
        for part, value in parts_of(name).items()
    }
    return replace(RECIPES[name](), **changed)
