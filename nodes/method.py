"""The parts of a method: how to explore, what to probe, who earned what, how to update."""

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..engine.credit import TurningPoints
from ..engine.errors import errors_named
from ..engine.knobs import Option, options_of
from ..engine.learner import OptimizerSettings
from ..engine.lora import LoraSettings
from ..engine.probe import EveryState, FasterTail, Granularities
from ..engine.recipes import recipe_options
from ..engine.train import TrainSettings
from . import sockets
from .mapping import ASSIGNMENTS, EVERY_STATE, FEWER_STEPS, GRANULARITIES, STATES, credit_of, probe_of
from .widgets import CATEGORY, widgets

METHOD = f"{CATEGORY}/method"
# In the order of the canvas. Saved graphs hold values by position: add at the end.
CHAINS = (
    *("group_size", "noise", "kernel", "shared_noise", "noise_shape", "train_fraction"),
    *("window", "window_size", "window_first", "window_end", "window_every", "roll_back"),
)
BRANCHES = ("group_size", "num_seeds", "noise", "kernel", "noise_shape", "branch_share", "across_seeds")
UPDATE = (
    *("clip_range", "ratio", "kl", "kl_weight", "num_updates", "norm_axis", "std_scope", "std_floor"),
    *("step_weight", "update_per", "std_eps", "advantage_clip"),
)
OPTIMIZER = ("lr", "beta2", "grad_clip", "ema_decay", "ema_every")
LORA = ("rank", "alpha", "targets")
SMALLEST = {"lr": 1e-6, "clip_range": 1e-6, "kl_weight": 1e-4, "std_eps": 1e-8}
"""Steps of number widgets: the canvas shows as many decimals."""


def sampler_inputs(known: Mapping[str, Option], names: tuple[str, ...]) -> list[Any]:
    """Steps, exploration, and a calibrated noise table."""
    table = sockets.NoiseTable.Input(
        "noise_table",
        optional=True,
        tooltip="From Calibrate Exploration: noise of each step, instead of noise and noise_shape. "
        "Calibrate with the same num_steps and kernel.",
    )
    return [*widgets(options_of(TrainSettings), ("num_steps",)), *widgets(known, names), table]


class DenseSampler(io.ComfyNode):
    """Exploration of whole chains."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPODenseSampler",
            display_name="Dense SDE Sampler",
            category=METHOD,
            description="Explore with whole noisy chains: noise at every denoising step but the last (Flow-GRPO, "
            "DenseGRPO, TP-GRPO, DanceGRPO), or only in a window (MixGRPO, Flow-GRPO-Fast).",
            inputs=sampler_inputs(recipe_options("flow_grpo"), CHAINS),
            outputs=[sockets.Sampler.Output("sampler", display_name="sampler")],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(options)


class BranchSampler(io.ComfyNode):
    """Exploration by single noisy steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPOBranchSampler",
            display_name="Branch SDE Sampler",
            category=METHOD,
            description="Explore by branching: from one clean chain, at each step, several images that differ by the "
            "noise of that step alone (TempFlow-GRPO; with a probe at several granularities G2RPO).",
            inputs=sampler_inputs(recipe_options("tempflow_grpo"), BRANCHES),
            outputs=[sockets.Sampler.Output("sampler", display_name="sampler")],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(options)


class RewardProbe(io.ComfyNode):
    """Which states are finished and scored."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        states = io.Combo.Input(
            "states",
            options=list(STATES),
            default=EVERY_STATE,
            tooltip=f"'{EVERY_STATE}': each step is paid the reward it added (DenseGRPO, TP-GRPO). "
            f"'{GRANULARITIES}': finish each branch coarsely and finely (G2RPO, with Branch SDE Sampler). "
            f"'{FEWER_STEPS}': save time after a window (MixGRPO-Flash).",
        )
        only_here = [
            (EveryState, EVERY_STATE),
            (Granularities, GRANULARITIES),
            (FasterTail, FEWER_STEPS),
        ]
        every, *others = [only_with(f"states '{choice}'", widgets(options_of(part))) for part, choice in only_here]
        return io.Schema(
            node_id="DenseGRPORewardProbe",
            display_name="ODE Reward Probe",
            category=METHOD,
            description="Finish states by ODE and score them. Every state: step-wise rewards (DenseGRPO). "
            "Without a probe only the final image is scored (Flow-GRPO, TempFlow-GRPO).",
            inputs=[*every, states, *(widget for part in others for widget in part)],
            outputs=[sockets.Probe.Output("probe", display_name="probe")],
        )

    @classmethod
    def validate_inputs(cls, strides: str | None = None) -> bool | str:
        problem = strides is not None and options_of(Granularities)["strides"].limits.wrong(strides, str)
        return f"strides {problem}, got {strides!r}" if problem else True

    @classmethod
    def execute(cls, **chosen: Any) -> io.NodeOutput:
        with errors_named("ODE Reward Probe"):
            return io.NodeOutput(probe_of(chosen))


class TurningPointAssigner(io.ComfyNode):
    """Which step earned what."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        mode = io.Combo.Input(
            "mode",
            options=list(ASSIGNMENTS),
            tooltip="'turning points': a step that turns the reward to where it ends gets the whole gain from there "
            "to the end (TP-GRPO). 'plain gains': each step gets what it added itself (DenseGRPO).",
        )
        turning = only_with("mode 'turning points'", widgets(options_of(TurningPoints)))
        return io.Schema(
            node_id="DenseGRPOTurningPoints",
            display_name="Turning-Point Assigner",
            category=METHOD,
            description="TP-GRPO: pay turning points the long-term gain. Needs an ODE Reward Probe of every state; "
            "Inspect Rollout shows which steps it would mark.",
            inputs=[mode, *turning],
            outputs=[sockets.Credit.Output("credit", display_name="credit")],
        )

    @classmethod
    def execute(cls, **chosen: Any) -> io.NodeOutput:
        with errors_named("Turning-Point Assigner"):
            return io.NodeOutput(credit_of(chosen))


class PolicyUpdate(io.ComfyNode):
    """Loss, optimizer and LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        # New widgets stand at the end, see CHAINS.
        return io.Schema(
            node_id="DenseGRPOPolicyUpdate",
            display_name="Policy Update",
            category=METHOD,
            description="How the policy moves: learning rate, LoRA, clip range, KL to the untrained model. Its values "
            "replace those of the method; without this node the method's own hold.",
            inputs=fine(
                [
                    *widgets(options_of(OptimizerSettings), OPTIMIZER[:1]),
                    *widgets(options_of(LoraSettings), LORA),
                    *widgets(recipe_options("dense_grpo"), UPDATE[:8]),
                    *widgets(options_of(OptimizerSettings), OPTIMIZER[1:]),
                    *widgets(recipe_options("dense_grpo"), UPDATE[8:]),
                ]
            ),
            outputs=[sockets.Update.Output("update", display_name="update")],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(options)


def fine(inputs: list[Any]) -> list[Any]:
    """The same widgets, with enough decimals for the values of the papers."""
    for entry in inputs:
        if entry.id in SMALLEST:
            entry.step = SMALLEST[entry.id]
    return inputs


def only_with(choice: str, inputs: list[Any]) -> list[Any]:
    """The same widgets; their tooltips say when they matter."""
    for entry in inputs:
        entry.tooltip += f" Only with {choice}."
    return inputs
