"""Save LoRA: a file that the stock loaders list."""

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..engine.errors import errors_named
from ..engine.models.comfy_run import save_lora
from .widgets import CATEGORY, name_problem


class SaveLora(io.ComfyNode):
    """Writes, reads back and compares."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPOSaveLoRA",
            display_name="Save LoRA (GRPO)",
            category=CATEGORY,
            description="Saves the trained LoRA into models/loras, where the stock LoRA loaders find it.",
            is_output_node=True,
            inputs=[
                io.LoraModel.Input("lora", tooltip="From GRPO Train Loop, or any stock LoRA trainer."),
                io.String.Input("name", default="my_grpo_lora", tooltip="File name; a number is added."),
                io.Combo.Input(
                    "keys",
                    options=["comfy", "diffusers"],
                    default="comfy",
                    tooltip="Names of the layers: as ComfyUI, or as diffusers calls them (needs the model).",
                ),
                io.Model.Input("model", optional=True, tooltip="The model it was trained on; only for diffusers keys."),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="File name as the LoRA loaders list it.")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return name_problem(name)

    @classmethod
    def execute(cls, lora: Any, name: str, keys: str, model: Any = None) -> io.NodeOutput:
        folder = Path(folder_paths.get_folder_paths("loras")[0])
        with errors_named("Save LoRA (GRPO)"):
            path = save_lora(lora, folder, name, keys, model)
        return io.NodeOutput(path.name, ui={"text": [f"saved {path.name}"]})
