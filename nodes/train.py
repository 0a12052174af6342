"""GRPO Train Loop: runs the parts, shows progress, returns the LoRA."""

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..engine.config import EvaluationSettings
from ..engine.errors import errors_named
from ..engine.knobs import options_of
from ..engine.models.comfy_run import Encoded, train_model
from ..engine.models.comfy_settings import ComfySettings
from ..engine.rewards.kept import Place, holding
from ..engine.train import TrainSettings
from . import sockets
from .mapping import method_of
from .method import LORA, OPTIMIZER, UPDATE
from .progress import Follower, runs_folder
from .widgets import CATEGORY, name_problem, widgets

TRAINING = ("iterations", "groups")
BATCHES = ("sample_batch", "train_batch")
EVALUATION = ("images_per_prompt",)
WHEN_GAMED = ("warn", "stop")
KEEP = ("last", "best held-out")


class TrainLoop(io.ComfyNode):
    """Trains a LoRA for the connected MODEL, which itself stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPOTrainLoop",
            display_name="GRPO Train Loop",
            category=CATEGORY,
            description="Reinforcement learning (GRPO) of a LoRA that makes the model's images score higher. "
            "Sampler, probe and credit decide the method: Flow-GRPO, DenseGRPO, TempFlow-GRPO, G2RPO, TP-GRPO, ...",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[*links(), *numbers()],
            outputs=[
                io.Model.Output(
                    "model_with_lora",
                    display_name="model_with_lora",
                    tooltip="The model with the trained LoRA applied.",
                ),
                io.LoraModel.Output(
                    "lora", display_name="lora", tooltip="For Save LoRA (GRPO) and the stock LoRA nodes."
                ),
                io.Image.Output("curve", display_name="curve", tooltip="Learning curve."),
                io.Image.Output(
                    "before_after", display_name="before_after", tooltip="Held-out images before and after."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, run_name: str | None = None) -> bool | str:
        return name_problem(run_name)

    @classmethod
    def execute(cls, model: Any, vae: Any, **inputs: Any) -> io.NodeOutput:
        with errors_named("GRPO Train Loop"), holding(place(inputs)):
            trained = train_model(
                model,
                vae,
                Encoded(*vars(inputs["prompts"]).values()),
                held_out(inputs),
                settings(inputs),
                config(inputs),
                runs_folder(),
                inputs["resume"],
                Follower(cls.hidden.unique_id),
                best=inputs["keep"] == "best held-out",
            )
        *outputs, run = trained
        return io.NodeOutput(*outputs, ui={"text": [f"run {run.folder.name}"], "run": [run.folder.name]})


def links() -> list[Any]:
    """What is connected."""
    return [
        io.Model.Input("model", tooltip="A flow-matching model: SD3.5, FLUX.1, Qwen-Image, ..."),
        io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
        sockets.Prompts.Input("prompts", tooltip="Prompts to train on."),
        sockets.Reward.Input("reward", tooltip="What to make more of."),
        sockets.Sampler.Input("sampler", tooltip="How to explore: whole chains or branches."),
        sockets.Probe.Input(
            "probe",
            optional=True,
            tooltip="Which states are scored; none: the final image (Flow-GRPO, TempFlow-GRPO).",
        ),
        sockets.Credit.Input(
            "credit",
            optional=True,
            tooltip="Who earned what; none: the gain of each step with a probe of every state, else the score.",
        ),
        sockets.Update.Input(
            "update", optional=True, tooltip="Learning rate, LoRA, KL; none: the defaults of the method."
        ),
        sockets.Prompts.Input(
            "held_out_prompts",
            optional=True,
            tooltip="Prompts that only measure progress; none: no evaluation.",
        ),
        sockets.Reward.Input(
            "held_out_reward", optional=True, tooltip="Only measured, never trained on: it shows gaming."
        ),
    ]


def numbers() -> list[Any]:
    """What is typed."""
    training = options_of(TrainSettings)
    return [
        io.String.Input(
            "run_name",
            default="my_run",
            tooltip="Folder in output/densegrpo: metrics, checkpoints, samples.",
        ),
        io.Boolean.Input(
            "resume",
            default=True,
            tooltip="Continue the run of this name where it stopped. Off: start a new one beside it.",
        ),
        *widgets(training, TRAINING),
        *widgets(options_of(ComfySettings), ("width", "height", "cfg", "guidance")),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31 - 1,
            control_after_generate=False,
            tooltip="Seed of everything random.",
        ),
        *widgets(training, BATCHES),
        io.Int.Input(
            "evaluate_every",
            default=20,
            min=0,
            max=1_000_000,
            tooltip="Iterations between evaluations on the held-out prompts; 0 = only before and after.",
        ),
        *widgets(options_of(EvaluationSettings), EVALUATION),
        io.Combo.Input(
            "when_gamed",
            options=list(WHEN_GAMED),
            default="warn",
            tooltip="When the trained reward rises while a held-out one falls: warn and go on, or stop.",
        ),
        io.Combo.Input(
            "keep",
            options=list(KEEP),
            default="last",
            tooltip="Which LoRA is handed on: the last, or the one that was best on held-out rewards.",
        ),
    ]


def held_out(inputs: Mapping[str, Any]) -> Encoded | None:
    """The held-out prompts, if any."""
    prompts = inputs.get("held_out_prompts")
    return Encoded(*vars(prompts).values()) if prompts else None


def place(inputs: Mapping[str, Any]) -> Place:
    """What holds the models that score: they go when the host drops one of the rewards."""
    held_out_reward = inputs.get("held_out_reward")
    return inputs["reward"].kept.shared_with(held_out_reward.kept if held_out_reward else None)


def settings(inputs: Mapping[str, Any]) -> ComfySettings:
    """How the model is sampled; with guidance the unconditional half runs without gradient, which is cheaper."""
    chosen = {name: inputs[name] for name in ("width", "height", "cfg", "guidance")}
    return ComfySettings(**chosen, cfg_grad="detach" if inputs["cfg"] > 1 else "full")


def config(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The run's configuration without model and prompts."""
    update, sampler = inputs.get("update") or {}, inputs["sampler"]
    held_out_reward = inputs.get("held_out_reward")

    def part(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: update[name] for name in names if name in update}

    training = {name: inputs[name] for name in (*TRAINING, *BATCHES, "seed")}
    return {
        "name": inputs["run_name"],
        "method": method_of(sampler, inputs.get("probe"), inputs.get("credit")) | part(UPDATE),
        "rewards": list(inputs["reward"].entries),
        "reward_mode": inputs["reward"].mode,
        "held_out_rewards": list(held_out_reward.entries) if held_out_reward else [],
        "lora": part(LORA),
        "optimizer": part(OPTIMIZER),
        "training": training | {"num_steps": sampler["num_steps"]},
        "evaluation": {
            "every": inputs["evaluate_every"],
            "images_per_prompt": inputs["images_per_prompt"],
            "num_steps": sampler["num_steps"],
            "stop_when_gamed": inputs["when_gamed"] == "stop",
        },
    }
