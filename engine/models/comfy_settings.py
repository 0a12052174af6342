"""Settings of the ComfyUI back end; this file does not need the host."""

from dataclasses import dataclass
from typing import Annotated

from ..guidance import CFG_GRADS
from ..knobs import Choice, Knob, Text, flag
from ..lora import LoraSettings
from ..protocols import FlowModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ComfySettings:
    """How a MODEL of the running ComfyUI is sampled while it is trained."""

    width: Annotated[int, Knob(16, 8192, "width of the training images in pixels")] = 512
    height: Annotated[int, Knob(16, 8192, "height of the training images in pixels")] = 512
    cfg: Annotated[float, Knob(1.0, 100.0, "classifier-free guidance, as in KSampler; 1 = off, half the cost")] = 1.0
    cfg_grad: Annotated[str, Choice(CFG_GRADS, "whether the unconditional half gets gradients; detach is cheaper")] = (
        "full"
    )
    guidance: Annotated[
        float, Knob(0.0, 100.0, "guidance that models like FLUX.1-dev take as an input; 0 = as the prompts have it")
    ] = 0.0
    scheduler: Annotated[str, Text("the host's scheduler that makes the noise levels, as in KSampler")] = "simple"
    gradient_checkpointing: Annotated[bool, flag("compute activations twice to save memory")] = True

    def load(self, lora: LoraSettings, seed: int) -> FlowModel:
        """Impossible outside: raises ValueError that says so."""
        raise ValueError(
            "this run trains a MODEL of ComfyUI: queue its workflow again with the same run name to resume it"
        )
