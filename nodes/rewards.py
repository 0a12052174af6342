"""Rewards: choose one, combine several, try them on images before any training."""

from typing import Any

from comfy_api.latest import io

from ..engine.errors import errors_named
from ..engine.rewards import MODES, VARIANTS
from ..engine.tryout import score_images
from . import sockets
from .widgets import CATEGORY

NUM_COMBINED = 4


class RewardModel(io.ComfyNode):
    """One reward."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPORewardModel",
            display_name="Reward Model",
            category=f"{CATEGORY}/reward",
            description="What training makes more of.",
            inputs=[
                io.Combo.Input(
                    "reward",
                    options=list(VARIANTS),
                    default="shapes partial",
                    tooltip="None of these needs a download. 'shapes' judges coloured circles, squares and triangles.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="Weight when several rewards are combined; negative punishes.",
                ),
            ],
            outputs=[sockets.Reward.Output("choice", display_name="reward")],
        )

    @classmethod
    def execute(cls, reward: str, weight: float) -> io.NodeOutput:
        return io.NodeOutput(sockets.RewardChoice(({**VARIANTS[reward], "weight": weight},)))


class CombineRewards(io.ComfyNode):
    """Several rewards as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        rewards = [
            sockets.Reward.Input(f"reward_{i}", optional=i > 1, tooltip="A reward with its weight.")
            for i in range(1, NUM_COMBINED + 1)
        ]
        mode = io.Combo.Input(
            "mode",
            options=list(MODES),
            default="each",
            tooltip="each: normalise every reward within its group, then add. sum: add the scores, then normalise.",
        )
        return io.Schema(
            node_id="DenseGRPOCombineRewards",
            display_name="Combine Rewards",
            category=f"{CATEGORY}/reward",
            description="Train on several rewards at once.",
            inputs=[*rewards, mode],
            outputs=[sockets.Reward.Output("choice", display_name="reward")],
        )

    @classmethod
    def execute(cls, mode: str, **rewards: sockets.RewardChoice | None) -> io.NodeOutput:
        entries = tuple(entry for choice in rewards.values() if choice for entry in choice.entries)
        return io.NodeOutput(sockets.RewardChoice(entries, mode))


class RewardScore(io.ComfyNode):
    """Scores of images, written on them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPORewardScore",
            display_name="Reward Score",
            category=f"{CATEGORY}/reward",
            description="Try a reward on images before training on it: each image with its score.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Images to score."),
                sockets.Reward.Input("reward", tooltip="The reward to try."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="The prompt of the images: one for all, or one line per image.",
                ),
            ],
            outputs=[
                io.Image.Output("annotated", display_name="annotated", tooltip="The images with their scores."),
                io.Float.Output("scores", display_name="scores", is_output_list=True, tooltip="One number per image."),
            ],
        )

    @classmethod
    def execute(cls, images: Any, reward: sockets.RewardChoice, prompt: str) -> io.NodeOutput:
        with errors_named("Reward Score"):
            annotated, scores, text = score_images(images, prompt, reward.entries, reward.mode)
        return io.NodeOutput(annotated, scores, ui={"text": [text]})
