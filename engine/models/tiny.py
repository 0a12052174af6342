"""The shipped demo model: 1.1 M parameters of SD3 architecture that paint coloured shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..demo import codec, text
from ..guidance import CFG_GRADS, guided
from ..knobs import Choice, Knob
from ..lora import LoraSettings, add_lora
from ..schedule import shifted_linear
from .mmdit import MMDiT

DEMO_FILES = Path(__file__).resolve().parents[1] / "demo"
DEFAULT_TARGETS = r"joint_blocks\..*\.(qkv|proj|fc1|fc2)$"


class Encoded(NamedTuple):
    """Conditioning of P prompts; the last row is the empty prompt."""

    context: Tensor
    """[P + 1, 8, 64]"""
    pooled: Tensor
    """[P + 1, 128]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """The shipped demo model: coloured shapes, 64 x 64 pixels, no download."""

    guidance: Annotated[float, Knob(1.0, 20.0, "classifier-free guidance; 1 = none, half the cost")] = 1.0
    cfg_grad: Annotated[str, Choice(CFG_GRADS, "whether the unconditional half gets gradients")] = "detach"
    shift: Annotated[float, Knob(0.1, 20.0, "time shift of the schedule; SD3 uses 3")] = 3.0
    dtype: Annotated[str, Choice(("float32", "bfloat16"), "precision of the base weights")] = "float32"

    def load(self, lora: LoraSettings, seed: int) -> "DemoModel":
        """The shipped weights with a fresh LoRA."""
        return DemoModel(load_network(DEMO_FILES), self, lora, seed)


class DemoModel:
    """``FlowModel`` over an ``MMDiT`` with the shipped codec and text encoding."""

    lora_prefix = "diffusion_model"
    latent_shape: tuple[int, ...] = (codec.CHANNELS, 8, 8)

    def __init__(self, network: MMDiT, settings: DemoSettings, lora: LoraSettings, seed: int = 0):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, settings.dtype)
        self.network = network.to(self.device, self.dtype).eval()
        self.settings = settings
        self.codec = load_file(DEMO_FILES / "codec.safetensors", str(self.device))
        self.text = load_file(DEMO_FILES / "text.safetensors")
        self.lora = add_lora(self.network, lora, DEFAULT_TARGETS, seed)

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Look the words up."""
        context, pooled = text.encode([*prompts, ""], self.text)
        return Encoded(context.to(self.device, self.dtype), pooled.to(self.device, self.dtype))

    def velocity(self, x: Tensor, sigma: Tensor, cond: Encoded, rows: Tensor) -> Tensor:
        """[R, 16, H, W] -> [R, 16, H, W] float32."""

        def predict(x: Tensor, sigma: Tensor, rows: Tensor, conditional: bool) -> Tensor:
            rows = rows if conditional else torch.full_like(rows, -1)
            inputs = (x.to(self.dtype), sigma, cond.context[rows], cond.pooled[rows])
            return self.network(*inputs).float()

        return guided(predict, x, sigma, rows, self.settings.guidance, self.settings.cfg_grad)

    def decode(self, latents: Tensor) -> Tensor:
        """One matrix product."""
        return codec.decode(latents, self.codec)

    def schedule(self, num_steps: int) -> Tensor:
        """SD3's, as ComfyUI samples it."""
        return shifted_linear(num_steps, self.settings.shift)


def load_network(folder: Path) -> MMDiT:
    """The transformer in ``folder``; its size is read from the weights."""
    weights = load_file(folder / "transformer.safetensors")
    hidden, context_dim = weights["context_embedder.weight"].shape
    pooled_dim = weights["y_embedder.mlp.0.weight"].shape[1]
    side = int(weights["pos_embed"].shape[1] ** 0.5)
    network = MMDiT(hidden // 64, context_dim, pooled_dim, max_tokens=side)
    network.load_state_dict(weights)
    return network
