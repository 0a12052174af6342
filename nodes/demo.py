"""Load Demo Model: a first run without any download."""

from comfy_api.latest import io

from ..engine.models.comfy_demo import load_demo
from .widgets import CATEGORY


class LoadDemoModel(io.ComfyNode):
    """The shipped model as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DenseGRPOLoadDemoModel",
            display_name="Load Demo Model",
            category=CATEGORY,
            description="The tiny shipped model (SD3 architecture, 5 MB): coloured circles, squares and triangles at "
            "64 x 64 pixels, e.g. 'a red circle left of a blue square'.",
            inputs=[],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="Diffusion model; sample it with cfg 1 at 64 x 64 pixels."
                ),
                io.Clip.Output(
                    "clip", display_name="clip", tooltip="Text encoder; knows colours, shapes, numbers and places."
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="Latents to pixels."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo())
