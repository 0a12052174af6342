"""The parts of a method: how to explore, what to probe, how to update."""

from typing import Any

from comfy_api.latest import io

from ..engine.knobs import options_of
from ..engine.learner import OptimizerSettings
from ..engine.lora import LoraSettings
from ..engine.recipes import recipe_options
from ..engine.train import TrainSettings
from . import sockets
from .widgets import CATEGORY, widgets

EXPLORATION = ("group_size", "noise", "kernel", "shared_noise")
UPDATE = ("clip_range", "ratio", "kl", "kl_weight", "num_updates", "norm_axis", "std_scope", "std_floor")
OPTIMIZER = ("lr", "beta2", "grad_clip", "ema_decay", "ema_every")
LORA = ("rank", "alpha", "targets")


class DenseSampler(io.ComfyNode):
    """Exploration of whole chains."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        steps = widgets(options_of(TrainSettings), ("num_steps",))
        return io.Schema(
            node_id="DenseGRPODenseSampler",
            display_name="Dense SDE Sampler",
            category=f"{CATEGORY}/method",
            description="Explore with noise at every denoising step but the last.",
            inputs=[*steps, *widgets(recipe_options("flow_grpo"), EXPLORATION)],
            outputs=[sockets.Sampler.Output("sampler", display_name="sampler")],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(options)


class RewardProbe(io.ComfyNode):
    """Step-wise rewards."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPORewardProbe",
            display_name="ODE Reward Probe",
            category=f"{CATEGORY}/method",
            description="DenseGRPO: finish every state by ODE, score it, and pay each step the reward it added. "
            "Without a probe all steps get the final reward (Flow-GRPO).",
            inputs=widgets(recipe_options("dense_grpo"), ("probe_evaluations",)),
            outputs=[sockets.Probe.Output("probe", display_name="probe")],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(options)


class PolicyUpdate(io.ComfyNode):
    """Loss, optimizer and LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPOPolicyUpdate",
            display_name="Policy Update",
            category=f"{CATEGORY}/method",
            description="How the policy moves: learning rate, LoRA, clip range, KL to the untrained model.",
            inputs=[
                *widgets(options_of(OptimizerSettings), OPTIMIZER[:1]),
                *widgets(options_of(LoraSettings), LORA),
                *widgets(recipe_options("dense_grpo"), UPDATE),
                *widgets(options_of(OptimizerSettings), OPTIMIZER[1:]),
            ],
            outputs=[sockets.Update.Output("update", display_name="update")],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(options)
