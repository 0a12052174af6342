"""The published methods, each a choice of the same orthogonal parts. Read this file first.

| part      | question it answers                                  | module       |
|-----------|------------------------------------------------------|--------------|
| explore   | where is noise injected, which chains are compared?  | explore.py   |
| rate      | how much noise does each step get?                   | schedule.py  |
| kernel    | how does one noisy step look?                        | kernels.py   |
| probe     | which states are scored?                             | probe.py     |
| credit    | which step earned what?                              | credit.py    |
| normalise | how do credits become advantages?                    | advantage.py |
| update    | how does the policy move, which steps matter more?   | loss.py      |
"""

from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .advantage import GroupNorm
from .credit import TurningPoints, after_step, broadcast_terminal, gain
from .data import Plan
from .explore import (
    Window,
    first_steps,
    fixed_window,
    independent_chains,
    random_window,
    single_step_branches,
    sliding_window,
)
from .kernels import CPS, EULER_MARUYAMA
from .knobs import (
    AcrossSeeds,
    BranchShare,
    Evaluations,
    Fraction,
    GroupSize,
    KernelName,
    Noise,
    NoiseTable,
    Option,
    RollBack,
    Seeds,
    SharedNoise,
    Strides,
    TailShare,
    TailSolver,
    WindowEnd,
    WindowEvery,
    WindowFirst,
    WindowSize,
    check,
    options_of,
    suggest,
    whole_numbers,
)
from .loss import PolicyUpdate
from .probe import TERMINAL, after_noise, every_nth, every_state, share
from .protocols import Credit, Explore, Kernel, Probe, Rate
from .randomness import Key
from .schedule import constant_rate, flow_rate, table_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training method."""

    explore: Explore
    rate: Rate
    kernel: Kernel = EULER_MARUYAMA
    probe: Probe = TERMINAL
    credit: Credit = broadcast_terminal
    normalise: GroupNorm = field(default_factory=GroupNorm)
    update: PolicyUpdate = field(default_factory=PolicyUpdate)

    def plan(self, latent_shape: tuple[int, ...], sigmas: Tensor, key: Key) -> Plan:
        """The plan of one prompt on the noise levels ``sigmas`` [T+1]."""
        return self.explore(latent_shape, self.rate(sigmas), key)


def flow_grpo(
    group_size: GroupSize = 24,
    noise: Noise = 0.7,
    kernel: KernelName = "sde",
    shared_noise: SharedNoise = False,
    noise_table: NoiseTable = None,
) -> Recipe:
    """Flow-GRPO, arXiv 2505.05470: noise everywhere, one terminal reward for all steps, KL to the untrained model.

    Differs from the authors' code: the last step is an ODE step, and the group's own standard deviation
    divides (their default is that of the whole batch: ``std_scope="global"``).
    """
    return Recipe(
        explore=independent_chains(group_size, shared_noise=shared_noise),
        rate=rates(kernel, noise, noise_table),
        kernel=KERNELS[kernel],
        update=PolicyUpdate(kl="flow_grpo", kl_weight=0.04, num_updates=2),
    )


def flow_grpo_fast(
    group_size: GroupSize = 24,
    noise: Noise = 0.8,
    kernel: KernelName = "cps",
    shared_noise: SharedNoise = False,
    noise_table: NoiseTable = None,
    window: WindowSize = 3,
    window_first: WindowFirst = 0,
    window_end: WindowEnd = 5,
) -> Recipe:
    """Flow-GRPO-Fast (the Flow-GRPO authors' code): noise and training only in a short window, drawn for each group.

    Differs from the authors' code: there a window belongs to a model call, so that a group may hold several.
    """
    return Recipe(
        explore=independent_chains(
            group_size, window=random_window(window, window_first, window_end), shared_noise=shared_noise
        ),
        rate=rates(kernel, noise, noise_table),
        kernel=KERNELS[kernel],
        normalise=GroupNorm(std_scope="global"),
        update=PolicyUpdate(clip_range=1e-5, num_updates=2),
    )


def dance_grpo(
    group_size: GroupSize = 12,
    noise: Noise = 0.3,
    kernel: KernelName = "sde",
    shared_noise: SharedNoise = True,
    noise_table: NoiseTable = None,
    train_fraction: Fraction = 0.6,
) -> Recipe:
    """DanceGRPO, arXiv 2505.07818: the same noise at each step, one start per group, random steps are trained.

    The paper advises ``num_updates = 1`` for models with classifier-free guidance. It trains all weights at 1e-5.
    """
    return Recipe(
        explore=independent_chains(group_size, shared_noise=shared_noise, train_fraction=train_fraction),
        rate=table_of(kernel, noise_table) if noise_table else constant_rate(noise),
        kernel=KERNELS[kernel],
        normalise=GroupNorm(std_eps=1e-8),
        update=PolicyUpdate(num_updates=4),
    )


def mix_grpo(
    group_size: GroupSize = 12,
    noise: Noise = 0.7,
    kernel: KernelName = "sde",
    shared_noise: SharedNoise = True,
    noise_table: NoiseTable = None,
    window: WindowSize = 4,
    window_every: WindowEvery = 25,
    roll_back: RollBack = True,
) -> Recipe:
    """MixGRPO, arXiv 2507.21802: noise and training only in a window that slides from the first step to the last."""
    return Recipe(
        explore=independent_chains(
            group_size, window=moving(window, window_every, roll_back), shared_noise=shared_noise
        ),
        rate=rates(kernel, noise, noise_table),
        kernel=KERNELS[kernel],
        update=PolicyUpdate(num_updates=4),
    )


def mix_grpo_flash(
    group_size: GroupSize = 12,
    noise: Noise = 0.7,
    kernel: KernelName = "sde",
    shared_noise: SharedNoise = True,
    noise_table: NoiseTable = None,
    window: WindowSize = 4,
    window_every: WindowEvery = 25,
    roll_back: RollBack = True,
    tail_share: TailShare = 0.4,
    tail_solver: TailSolver = "dpm2m",
) -> Recipe:
    """MixGRPO-Flash, arXiv 2507.21802: fewer steps after the window, by a second-order solver.

    ``window_every = 0`` leaves the window at the start: Flash*.
    """
    base = mix_grpo(group_size, noise, kernel, shared_noise, noise_table, window, window_every, roll_back)
    return replace(base, probe=Probe(after_noise, (share(tail_share),), tail_solver))


def dense_grpo(
    group_size: GroupSize = 24,
    noise: Noise = 0.7,
    kernel: KernelName = "sde",
    shared_noise: SharedNoise = False,
    noise_table: NoiseTable = None,
    probe_evaluations: Evaluations = 0,
) -> Recipe:
    """DenseGRPO, arXiv 2601.20218: every step is paid the reward it added, measured by ODE probes (eq. 7-10).

    The paper calibrates the noise (``densegrpo calibrate``); without a table it is Flow-GRPO's. Differs from the
    paper: the last step is an ODE step, so its gain is 0 and it is not trained.
    """
    base = flow_grpo(group_size, noise, kernel, shared_noise, noise_table)
    return replace(base, probe=every_state(probe_evaluations), credit=gain)


def tempflow_grpo(
    group_size: GroupSize = 6,
    noise: Noise = 0.7,
    kernel: KernelName = "sde",
    noise_table: NoiseTable = None,
    num_seeds: Seeds = 4,
    branch_share: BranchShare = 1.0,
    across_seeds: AcrossSeeds = False,
) -> Recipe:
    """TempFlow-GRPO, arXiv 2508.04324: branch at each step of an ODE trunk, weigh steps by their noise (eq. 7-8).

    ``across_seeds`` compares as the paper's first version did.
    """
    return Recipe(
        explore=single_step_branches(
            group_size, branch_steps=first_steps(branch_share), num_seeds=num_seeds, across_seeds=across_seeds
        ),
        rate=rates(kernel, noise, noise_table),
        kernel=KERNELS[kernel],
        update=PolicyUpdate(step_weight="noise", kl_weight=0.004, num_updates=2),
    )


def g2rpo(
    group_size: GroupSize = 12,
    noise: Noise = 0.7,
    kernel: KernelName = "sde",
    noise_table: NoiseTable = None,
    branch_share: BranchShare = 0.5,
    strides: Strides = "1, 2, 3",
) -> Recipe:
    """G2RPO (Granular-GRPO), arXiv 2510.01982: branches judged at several granularities, whose advantages add up.

    Differs from the authors' code: each grid ends at sigma 0. Their code has strides 1, 2; the paper 1, 2, 3.
    """
    return Recipe(
        explore=single_step_branches(group_size, branch_steps=first_steps(branch_share)),
        rate=rates(kernel, noise, noise_table),
        kernel=KERNELS[kernel],
        probe=Probe(after_noise, tuple(map(every_nth, whole_numbers(strides)))),
        credit=after_step,
        normalise=GroupNorm(std_eps=1e-8),
        update=PolicyUpdate(update_per="step"),
    )


def tp_grpo(
    group_size: GroupSize = 24,
    noise: Noise = 0.7,
    kernel: KernelName = "cps",
    shared_noise: SharedNoise = False,
    noise_table: NoiseTable = None,
    probe_evaluations: Evaluations = 0,
) -> Recipe:
    """TP-GRPO, arXiv 2602.06422: gains, and at turning points the whole gain to the end.

    ``consistent = false`` is the paper's other variant. Differs from the authors' code: the gain of the first step
    starts from the image of the chain's own noise, and ``balance_by`` ranks what is applied.
    """
    return Recipe(
        explore=independent_chains(group_size, shared_noise=shared_noise),
        rate=rates(kernel, noise, noise_table),
        kernel=KERNELS[kernel],
        probe=every_state(probe_evaluations),
        credit=TurningPoints(),
        update=PolicyUpdate(clip_range=1e-5, kl_weight=1e-4, num_updates=2),
    )


KERNELS = {"sde": EULER_MARUYAMA, "cps": CPS}


def rates(kernel: str, noise: float, table: Any) -> Rate:
    """A calibrated table, or what belongs to a kernel: Flow-GRPO's rates for the SDE, a constant share for CPS.

    Raises ValueError when CPS is asked for more than all of the noise.
    """
    if table is not None:
        return table_of(kernel, table)
    if kernel == "cps" and noise > 1:
        raise ValueError(f"noise is the share of fresh noise with kernel cps and must be in 0..1, got {noise}")
    return flow_rate(noise) if kernel == "sde" else constant_rate(noise)


def moving(size: int, every: int, roll_back: bool) -> Window:
    """A window that moves on each ``every`` iterations, or stays at the start when 0."""
    return sliding_window(size, every, roll_back) if every else fixed_window(size)


RECIPES: dict[str, Callable[..., Recipe]] = {
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


def table_of(kernel: str, table: Any) -> Rate:
    """The rates of a noise table. Raises ValueError when it was calibrated for the other kernel."""
    if table["kernel"] != kernel:
        raise ValueError(f"the noise table was calibrated for kernel {table['kernel']}, not {kernel}; calibrate again")
    return table_rate(torch.tensor(table["rates"]), torch.tensor(table["sigmas"]))


def configurable(recipe: Recipe) -> list[str]:
    """The parts of a recipe that have options of their own."""
    return [name for name in ("credit", "normalise", "update") if is_dataclass(getattr(recipe, name))]


def recipe_options(name: str) -> dict[str, Option]:
    """All options of a recipe: its own, then those of its configurable parts (credit, normaliser, policy update)."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{suggest(name, RECIPES)}; known: {', '.join(sorted(RECIPES))}")
    recipe = RECIPES[name]()
    known = options_of(RECIPES[name])
    for part in (getattr(recipe, p) for p in configurable(recipe)):
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
    parts = {part: getattr(recipe, part) for part in configurable(recipe)}
    return replace(recipe, **{part: replace(value, **of(type(value))) for part, value in parts.items()})
