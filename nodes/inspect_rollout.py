"""Inspect Rollout: what training would see, in seconds."""

from typing import Any

from comfy_api.latest import io

from ..engine.errors import errors_named
from ..engine.knobs import options_of
from ..engine.models.comfy_run import Encoded, inspect_model
from ..engine.models.comfy_settings import ComfySettings
from ..engine.rewards.kept import holding
from ..engine.train import TrainSettings
from . import sockets
from .mapping import method_of
from .train import settings
from .widgets import CATEGORY, widgets


class InspectRollout(io.ComfyNode):
    """One group of images, step by step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPOInspectRollout",
            display_name="Inspect Rollout",
            category=CATEGORY,
            description="Samples the first prompt as training would, without training. Chains: a row per image, a "
            "column per scored state, with the reward and what the step added. Branches: a row per step.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to be trained."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to it."),
                sockets.Prompts.Input("prompts", tooltip="The first prompt is used."),
                sockets.Reward.Input("reward", tooltip="What the pictures are scored with."),
                sockets.Sampler.Input("sampler", tooltip="How to explore: whole chains or branches."),
                sockets.Probe.Input("probe", optional=True, tooltip="Which states are scored; none: the final image."),
                sockets.Credit.Input(
                    "credit", optional=True, tooltip="From Turning-Point Assigner: frames the steps it would mark."
                ),
                *widgets(options_of(ComfySettings), ("width", "height", "cfg", "guidance")),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip="Another seed, other noise.",
                ),
                *widgets(options_of(TrainSettings), ("sample_batch",)),
            ],
            outputs=[
                io.Image.Output("picture", display_name="picture", tooltip="What is compared, with rewards."),
                io.String.Output("report", display_name="report", tooltip="Mean rewards, and how many turning points."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, vae: Any, **inputs: Any) -> io.NodeOutput:
        reward, sampler = inputs["reward"], inputs["sampler"]
        with errors_named("Inspect Rollout"), holding(reward.kept):
            strip = inspect_model(
                model,
                vae,
                Encoded(*vars(inputs["prompts"]).values()),
                settings(inputs),
                reward.entries,
                reward.mode,
                method_of(sampler, inputs.get("probe"), inputs.get("credit")),
                sampler["num_steps"],
                inputs["seed"],
                inputs["sample_batch"],
            )
        return io.NodeOutput(strip.picture, strip.report, ui={"text": [strip.report]})
