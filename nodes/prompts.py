"""Training Prompts: texts or a file, encoded once with the user's CLIP."""

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..engine.errors import errors_named
from ..engine.prompts import BUILT_IN, load_prompts
from . import sockets
from .widgets import CATEGORY

TEXT_BELOW = "use the text below"


class TrainingPrompts(io.ComfyNode):
    """Prompts with their conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPOTrainingPrompts",
            display_name="Training Prompts",
            category=CATEGORY,
            description="Prompts to train or evaluate on, encoded once with CLIP.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Combo.Input(
                    "file",
                    options=[TEXT_BELOW, *BUILT_IN, *files()],
                    default=TEXT_BELOW,
                    tooltip="A .txt (one prompt per line) or .jsonl (GenEval metadata) file in ComfyUI's input folder, "
                    "or a list of the demo model.",
                ),
                io.String.Input(
                    "text", multiline=True, default="", tooltip="One prompt per line; used when no file is chosen."
                ),
                io.String.Input("negative", default="", tooltip="Negative prompt, as in ordinary sampling."),
                io.Int.Input("limit", default=0, min=0, max=100_000, tooltip="Use only the first so many; 0 = all."),
            ],
            outputs=[sockets.Prompts.Output("prompts", display_name="prompts")],
        )

    @classmethod
    def execute(cls, clip: Any, file: str, text: str, negative: str, limit: int) -> io.NodeOutput:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        with errors_named("Training Prompts"):
            prompts = load_prompts(lines if file == TEXT_BELOW else file, Path(folder_paths.get_input_directory()))
        prompts = prompts[: limit or None]
        encoded = tuple(encode(clip, prompt.text) for prompt in prompts)
        return io.NodeOutput(sockets.EncodedPrompts(tuple(prompts), encoded, encode(clip, negative)))

    @classmethod
    def fingerprint_inputs(cls, file: str, **inputs: Any) -> Any:
        path = BUILT_IN.get(file) or Path(folder_paths.get_input_directory()) / file
        return (file, path.stat().st_mtime if path.is_file() else 0, *inputs.values())


def encode(clip: Any, text: str) -> Any:
    """What the stock CLIP Text Encode node returns."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def files() -> list[str]:
    """Prompt files in the input folder."""
    folder = Path(folder_paths.get_input_directory())
    return sorted(path.name for path in folder.glob("*") if path.suffix in (".txt", ".jsonl"))
