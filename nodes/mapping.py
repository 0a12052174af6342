"""Which recipe the connected parts make. Plain data in and out: it can be read and tested without a host.

| sampler  | probe               | assigner       | recipe                                                      |
|----------|---------------------|----------------|-------------------------------------------------------------|
| chains   | none                | none           | flow_grpo, flow_grpo_fast, dance_grpo, mix_grpo: see PLAIN  |
| chains   | fewer steps         | none           | mix_grpo_flash                                              |
| chains   | every state         | none, or gains | dense_grpo                                                  |
| chains   | every state         | turning points | tp_grpo                                                     |
| branches | none                | none           | tempflow_grpo                                               |
| branches | several granularities | none         | g2rpo                                                       |

All options are handed over, so the canvas decides what happens; the name of the recipe is for the record.
"""

from collections.abc import Mapping
from typing import Any

Options = Mapping[str, Any]

EVERY_STATE, GRANULARITIES, FEWER_STEPS = (
    "every state",
    "after the noise, several granularities",
    "after the noise, fewer steps",
)
STATES = {
    EVERY_STATE: ("probe_evaluations",),
    GRANULARITIES: ("strides",),
    FEWER_STEPS: ("tail_share", "tail_solver"),
}
"""Choices of ODE Reward Probe -> the options that belong to each."""

GAINS, TURNING_POINTS = "plain gains", "turning points"
ASSIGNMENTS = {TURNING_POINTS: ("consistent", "balance", "balance_by"), GAINS: ()}
"""Choices of Turning-Point Assigner -> the options that belong to each."""

PLAIN = {"all": "flow_grpo", "random": "flow_grpo_fast", "sliding": "mix_grpo", "fixed": "mix_grpo"}
"""Window of chains without a probe -> recipe."""


def probe_of(chosen: Options) -> dict[str, Any]:
    """What travels on a Probe link: the options of the chosen states alone."""
    return {name: chosen[name] for name in known("states", chosen, STATES)}


def credit_of(chosen: Options) -> dict[str, Any]:
    """What travels on a Credit link: the options of turning points, or nothing for plain gains."""
    return {name: chosen[name] for name in known("mode", chosen, ASSIGNMENTS)}


def known(widget: str, chosen: Options, choices: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The options of a choice. The host does not check choices; raises ValueError that names the allowed ones."""
    value = chosen[widget]
    if value not in choices:
        raise ValueError(f"{widget} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return choices[value]


def method_of(sampler: Options, probe: Options | None = None, credit: Options | None = None) -> dict[str, Any]:
    """The method of a configuration. Raises ValueError that says what to connect when no recipe has these parts."""
    exploration = {name: value for name, value in sampler.items() if name != "num_steps"}
    states = next((kind for kind, names in STATES.items() if probe and names[0] in probe), None)
    if credit is not None and states != EVERY_STATE:
        raise ValueError(
            "Turning-Point Assigner needs the reward of every state: connect an ODE Reward Probe with states "
            f"'{EVERY_STATE}' to probe, or take the assigner out"
        )
    name = branched(states) if "branch_share" in sampler else chained(sampler, states, bool(credit))
    return {"name": name, **exploration, **(probe or {}), **(credit or {})}


def branched(states: str | None) -> str:
    """The recipe of branches."""
    found = {None: "tempflow_grpo", GRANULARITIES: "g2rpo"}
    if states not in found:
        raise ValueError(
            f"Branch SDE Sampler does not go with an ODE Reward Probe for '{states}': set its states to "
            f"'{GRANULARITIES}' (G2RPO), take the probe out (TempFlow-GRPO), or use Dense SDE Sampler"
        )
    return found[states]


def chained(sampler: Options, states: str | None, turning: bool) -> str:
    """The recipe of whole chains."""
    if states == EVERY_STATE:
        return "tp_grpo" if turning else "dense_grpo"
    if states == GRANULARITIES:
        raise ValueError(
            f"an ODE Reward Probe for '{states}' needs Branch SDE Sampler (G2RPO): connect that one to sampler, or "
            f"set states to '{EVERY_STATE}' (DenseGRPO)"
        )
    if states == FEWER_STEPS:
        if sampler["window"] == "all":
            raise ValueError(
                f"an ODE Reward Probe for '{states}' has nothing to shorten: with window 'all' the noise goes on to "
                "the last step but one. Set window of Dense SDE Sampler to 'sliding' or 'fixed' (MixGRPO-Flash)"
            )
        return "mix_grpo_flash"
    constant = sampler["noise_shape"] == "constant" or sampler["train_fraction"] < 1
    return "dance_grpo" if sampler["window"] == "all" and constant else PLAIN[sampler["window"]]
