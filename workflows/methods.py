"""The methods: one row each of what it is, and its values for the demo model, SD3.5 and FLUX. See training.py.

Values of the papers, or of their authors' code; where a paper names none for a model, those of Flow-GRPO. What is not
named here keeps the value of the node.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

CHAINS, BRANCHES = "DenseGRPODenseSampler", "DenseGRPOBranchSampler"


class Values(NamedTuple):
    """What one model needs beside the values of the method."""

    sampler: Mapping[str, Any] = {}
    update: Mapping[str, Any] = {}
    loop: Mapping[str, Any] = {}
    note: str = ""
    after: str = ""
    """Held-out colourfulness of the demo model after the shipped run, which starts at 0.5."""


class Method(NamedTuple):
    """One row."""

    title: str
    paper: str
    idea: str
    """What it does, in a sentence or two."""
    sampler: Mapping[str, Any]
    """With "num_seeds": a Branch SDE Sampler."""
    update: Mapping[str, Any]
    demo: Values
    sd35: Values
    flux: Values | None = None
    probe: Mapping[str, Any] | None = None
    credit: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        """The node that explores."""
        return BRANCHES if "num_seeds" in self.sampler else CHAINS


NO_KL = {"kl": "exact", "kl_weight": 0.0}
FLOW_KL = {"kl": "flow_grpo", "kl_weight": 0.04}
EVERY_STATE = {"states": "every state"}
STRIDES = {"states": "after the noise, several granularities"}
FEWER_STEPS = {"states": "after the noise, fewer steps"}
CHEAPER = "The paper compares 24 images per group; `group_size` 12 takes half the time."
ALL_WEIGHTS = "The paper trains all weights of FLUX at a learning rate of {}; a LoRA takes the usual one."
WINDOW_OF_8 = {"window_size": 3, "window_every": 10}

METHODS = {
    "flow_grpo": Method(
        "Flow-GRPO",
        "2505.05470",
        "Noise at every step, one reward at the end, shared by all steps. The baseline of all others.",
        {"group_size": 24},
        {**FLOW_KL, "num_updates": 2},
        demo=Values(loop={"iterations": 40}, after="0.87"),
        sd35=Values(note=CHEAPER),
    ),
    "flow_grpo_fast": Method(
        "Flow-GRPO-Fast",
        "2505.05470",
        "Flow-GRPO, but each group has noise in three steps only, drawn anew, and trains only these: a third of the "
        "training time.",
        {"group_size": 24, "noise": 0.8, "kernel": "cps", "window": "random", "window_size": 3, "window_end": 5},
        {**NO_KL, "clip_range": 1e-5, "num_updates": 2, "std_scope": "global"},
        demo=Values(loop={"iterations": 40}, after="1.04"),
        sd35=Values(loop={"cfg": 1.0}, note="As the authors do, without guidance (`cfg` 1), which halves the time."),
    ),
    "dance_grpo": Method(
        "DanceGRPO",
        "2505.07818",
        "The same amount of noise at each step, all images of a group from one starting noise, and a random 60 % of "
        "the steps is trained.",
        {"group_size": 12, "shared_noise": True, "noise": 0.3, "noise_shape": "constant", "train_fraction": 0.6},
        {**NO_KL, "num_updates": 4, "std_eps": 1e-8},
        demo=Values(sampler={"noise": 0.7}, loop={"iterations": 40}, after="0.99"),
        sd35=Values(
            update={"num_updates": 1},
            note="With guidance the paper advises one update per iteration. " + ALL_WEIGHTS.format("0.00001"),
        ),
    ),
    "mix_grpo": Method(
        "MixGRPO",
        "2507.21802",
        "Noise and training only in a window of steps, which slides from the first step to the last while training "
        "goes on. The other steps are exact and cheap.",
        {"group_size": 12, "shared_noise": True, "window": "sliding", "window_size": 4, "window_every": 25},
        {**NO_KL, "num_updates": 4},
        demo=Values(sampler=WINDOW_OF_8, loop={"iterations": 40}, after="1.42"),
        sd35=Values(
            sampler={"group_size": 24, "window_every": 150},
            update={"kl": "flow_grpo", "kl_weight": 0.001},
            loop={"iterations": 1000},
            note="The window moves one step every 150 iterations (`window_every`): lower it for short runs.",
        ),
    ),
    "mix_grpo_flash": Method(
        "MixGRPO-Flash",
        "2507.21802",
        "MixGRPO whose images are finished in fewer steps after the window, by a second-order solver. With window "
        "`fixed` it stays at the first steps and is fastest (Flash*).",
        {"group_size": 12, "shared_noise": True, "window": "sliding", "window_size": 4, "window_every": 25},
        {**NO_KL, "num_updates": 4},
        demo=Values(sampler=WINDOW_OF_8, loop={"iterations": 40}, after="1.30"),
        sd35=Values(
            sampler={"group_size": 24, "window_every": 150},
            update={"kl": "flow_grpo", "kl_weight": 0.001},
            loop={"iterations": 1000},
            note="The window moves one step every 150 iterations (`window_every`): lower it for short runs.",
        ),
        probe={**FEWER_STEPS, "tail_share": 0.4, "tail_solver": "dpm2m"},
    ),
    "dense_grpo": Method(
        "DenseGRPO",
        "2601.20218",
        "Every step is paid the reward it added, measured by ODE probes. Sampling costs about five times Flow-GRPO's; "
        "without the link to `probe` it is Flow-GRPO.",
        {"group_size": 24},
        {**FLOW_KL, "num_updates": 2},
        demo=Values(loop={"iterations": 20}, after="1.20"),
        sd35=Values(note=CHEAPER + " The paper also calibrates the noise of each step: *Calibrate Exploration*."),
        flux=Values(
            sampler={"num_steps": 8, "group_size": 12, "noise": 0.9},
            update={"kl_weight": 0.01},
            note="The paper compares 24 images per group; 12 are cheaper.",
        ),
        probe=EVERY_STATE,
    ),
    "tempflow_grpo": Method(
        "TempFlow-GRPO",
        "2508.04324",
        "From one clean chain, at each step, six images branch off that differ by the noise of that step alone: their "
        "rewards say what this step is worth. Noisier steps count more.",
        {"num_seeds": 4, "group_size": 6},
        {"kl": "exact", "kl_weight": 0.004, "num_updates": 2, "step_weight": "noise"},
        demo=Values(sampler={"num_seeds": 2}, loop={"iterations": 20}, after="1.12"),
        sd35=Values(note="A prompt takes 4 starting noises x 9 steps x 6 branches = 216 images: a slow reward hurts."),
        flux=Values(
            sampler={"num_steps": 10, "noise": 0.9},
            loop={"width": 1024, "height": 1024},
            note="A prompt takes 4 starting noises x 9 steps x 6 branches = 216 images. Lower `width` and `height` "
            "first: the paper trains at 1024.",
        ),
    ),
    "g2rpo": Method(
        "G2RPO",
        "2510.01982",
        "Branches in the first half of the steps, each finished with every, every second and every third step. All "
        "three rewards count: what is good only on a coarse grid is weighed against the fine one.",
        {"num_seeds": 1, "group_size": 12, "branch_share": 0.5},
        {**NO_KL, "num_updates": 1, "update_per": "step", "std_eps": 1e-8},
        demo=Values(sampler={"group_size": 8}, loop={"iterations": 20}, after="0.97"),
        sd35=Values(note="One optimizer step for each branching step. " + ALL_WEIGHTS.format("0.000002")),
        flux=Values(
            sampler={"num_steps": 16},
            update={"lr": 1e-4},
            loop={"width": 720, "height": 720},
            note="Eight optimizer steps per iteration, one for each branching step. " + ALL_WEIGHTS.format("0.000002"),
        ),
        probe={**STRIDES, "strides": "1, 2, 3"},
    ),
    "tp_grpo": Method(
        "TP-GRPO",
        "2602.06422",
        "As DenseGRPO every step is paid what it added; but a step that turns the reward to where it ends gets the "
        "whole gain from there to the end. *Inspect Rollout* frames these steps.",
        {"group_size": 24, "kernel": "cps", "noise": 0.7},
        {"kl": "exact", "kl_weight": 0.0001, "num_updates": 2, "clip_range": 1e-5},
        demo=Values(loop={"iterations": 20}, after="1.09"),
        sd35=Values(note=CHEAPER),
        flux=Values(sampler={"num_steps": 6, "noise": 0.8}, note=CHEAPER),
        probe=EVERY_STATE,
        credit={"mode": "turning points", "consistent": True, "balance": "batch", "balance_by": "aggregate"},
    ),
}
