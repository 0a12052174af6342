"""Calibrate Exploration: how much noise each step bears, as a table for the samplers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.utils
from comfy_api.latest import io
from server import PromptServer

from ..engine.calibrate import RULES, CalibrationSettings, Round, calibration_options
from ..engine.errors import errors_named
from ..engine.knobs import options_of
from ..engine.models.comfy_run import Encoded, calibrate_model, reuse_table
from ..engine.models.comfy_settings import ComfySettings
from ..engine.rewards.kept import holding
from ..engine.train import TrainSettings
from . import sockets
from .progress import runs_folder
from .train import settings
from .widgets import CATEGORY, name_problem, widgets

CALIBRATE = "calibrate now"


class CalibrateExploration(io.ComfyNode):
    """Searches once and saves; later the file can be chosen."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPOCalibrateExploration",
            display_name="Calibrate Exploration",
            category=f"{CATEGORY}/method",
            description="DenseGRPO: finds for every denoising step the most noise at which about as many images gain "
            "reward as lose it. Connect the table to the noise_table of a second sampler, which trains with it.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[*links(), *numbers()],
            outputs=[
                sockets.NoiseTable.Output(
                    "noise_table", display_name="noise_table", tooltip="For the noise_table of the sampler that trains."
                ),
                io.Image.Output("picture", display_name="picture", tooltip="Balance and noise, before and after."),
                io.String.Output("report", display_name="report", tooltip="The same as numbers."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file_name: str | None = None) -> bool | str:
        return name_problem(file_name)

    @classmethod
    def fingerprint_inputs(cls, reuse: str, **inputs: Any) -> Any:
        path = tables_folder() / reuse
        return (reuse, path.stat().st_mtime if path.is_file() else 0)

    @classmethod
    def execute(cls, model: Any, vae: Any, **inputs: Any) -> io.NodeOutput:
        sampler, reward = inputs["sampler"], inputs["reward"]
        with errors_named("Calibrate Exploration"), holding(reward.kept):
            if inputs["reuse"] != CALIBRATE:
                path = tables_folder() / inputs["reuse"]
                found = reuse_table(model, settings(inputs), sampler["num_steps"], path)
            else:
                found = calibrate_model(
                    model,
                    vae,
                    Encoded(*vars(inputs["prompts"]).values()),
                    settings(inputs),
                    reward.entries,
                    reward.mode,
                    method(sampler, inputs.get("probe")),
                    sampler["num_steps"],
                    inputs["seed"],
                    inputs["sample_batch"],
                    chosen(inputs),
                    tables_folder(),
                    inputs["file_name"],
                    Follower(cls.hidden.unique_id),
                )
        return io.NodeOutput(*found, ui={"text": [found.report]})


def links() -> list[Any]:
    """What is connected."""
    return [
        io.Model.Input("model", tooltip="The model to be trained."),
        io.Vae.Input("vae", tooltip="The VAE that belongs to it."),
        sockets.Prompts.Input("prompts", tooltip="Each trajectory draws one of them."),
        sockets.Reward.Input("reward", tooltip="What will be trained on: another reward needs another table."),
        sockets.Sampler.Input("sampler", tooltip="Its num_steps, kernel and noise are where the search starts."),
        sockets.Probe.Input(
            "probe", optional=True, tooltip="Only its probe_evaluations; none: states are finished in all steps."
        ),
    ]


def numbers() -> list[Any]:
    """What is typed. Saved graphs hold values by position: add at the end."""
    return [
        io.Combo.Input(
            "reuse",
            options=[CALIBRATE, *saved()],
            default=CALIBRATE,
            tooltip="Or a table in output/densegrpo/noise_tables that was saved earlier: nothing is computed then.",
        ),
        io.String.Input("file_name", default="my_noise_table", tooltip="Name of the saved table; a number is added."),
        *widgets(calibration_options()),
        *widgets(options_of(ComfySettings), ("width", "height", "cfg", "guidance")),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31 - 1,
            control_after_generate=False,
            tooltip="Seed of everything random.",
        ),
        *widgets(options_of(TrainSettings), ("sample_batch",)),
    ]


def method(sampler: Mapping[str, Any], probe: Mapping[str, Any] | None) -> dict[str, Any]:
    """DenseGRPO with the sampler's noise; a calibration starts afresh, and has its own prompts and groups."""
    noise = {key: sampler[key] for key in ("noise", "noise_shape", "kernel") if key in sampler}
    coarser = {key: probe[key] for key in ("probe_evaluations",) if probe and key in probe}
    return {"name": "dense_grpo", **noise, **coarser}


def chosen(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the chosen rule has."""
    known = options_of(CalibrationSettings) | options_of(RULES[inputs["rule"]])
    return {key: inputs[key] for key in known}


def tables_folder() -> Path:
    """Where all noise tables of this host are."""
    return runs_folder() / "noise_tables"


def saved() -> list[str]:
    """The tables there, newest first."""
    return [path.name for path in sorted(tables_folder().glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True)]


class Follower:
    """Shows the progress of a calibration on its node."""

    def __init__(self, node_id: str):
        self.node_id, self.bar = node_id, None

    def __call__(self, found: Round) -> None:
        """Update the bar and the text."""
        done, total = found.number + 1, found.last + 1
        self.bar = self.bar or comfy.utils.ProgressBar(total, node_id=self.node_id)
        self.bar.update_absolute(done, total)
        if PromptServer.instance is not None:
            text = f"{done}/{total}  imbalance {found.balance.imbalance.abs().mean():.2f}"
            PromptServer.instance.send_progress_text(text, self.node_id)
