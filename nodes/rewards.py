"""Rewards: choose one, combine several, try them on images before any training."""

import asyncio
from typing import Any

from aiohttp import web
from comfy_api.latest import io
from server import PromptServer

from ..engine.errors import errors_named
from ..engine.rewards import MODES, VARIANTS
from ..engine.rewards.kept import Place, holding
from ..engine.tryout import missing, score_images
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
                    tooltip="The first ones need nothing; the others need model files or packages, and say which.",
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
    def validate_inputs(cls, reward: str | None = None) -> bool | str:
        if reward is None:  # it comes over a link
            return True
        if reward not in VARIANTS:
            return f"reward {reward!r} is none of {', '.join(VARIANTS)}"
        return missing(reward) or True

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
            tooltip="each: normalise every reward within its group, then add. gdpo: the same, and then over the whole "
            "batch. sum: add the scores, then normalise.",
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
        choices = [choice for choice in rewards.values() if choice]
        entries = tuple(entry for choice in choices for entry in choice.entries)
        return io.NodeOutput(sockets.RewardChoice(entries, mode, Place(*(choice.kept for choice in choices))))


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
                    tooltip="The prompt of the images: one for all, or one line per image. A line of a .jsonl file, "
                    "with metadata for GenEval or OCR, will do too.",
                ),
            ],
            outputs=[
                io.Image.Output("annotated", display_name="annotated", tooltip="The images with their scores."),
                io.Float.Output("scores", display_name="scores", is_output_list=True, tooltip="One number per image."),
            ],
        )

    @classmethod
    def execute(cls, images: Any, reward: sockets.RewardChoice, prompt: str) -> io.NodeOutput:
        with errors_named("Reward Score"), holding(reward.kept):
            annotated, scores, text = score_images(images, prompt, reward.entries, reward.mode)
        return io.NodeOutput(annotated, scores, ui={"text": [text]})


async def readiness(request: web.Request) -> web.Response:
    """``GET /densegrpo/reward?name=LABEL``: what a reward of the menu lacks, nothing when it is ready."""
    label = request.query.get("name", "")
    if label not in VARIANTS:
        return web.json_response({"error": f"no reward {label!r}", "rewards": list(VARIANTS)}, status=404)
    # Looking into model folders, and importing transformers for the first time, take a while.
    return web.json_response({"reward": label, "missing": await asyncio.to_thread(missing, label)})


def add_routes() -> None:
    """Called once when the nodes are loaded; there is no server when a tool only reads the nodes."""
    if getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.routes.get("/densegrpo/reward")(readiness)
