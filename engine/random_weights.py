"""Random weights in the shapes of real models: speed and memory can be measured without any download."""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .guidance import guided
from .lora import LoraSettings, add_lora
from .schedule import shifted_linear


class Shape(NamedTuple):
    """What is needed to build a model of some family."""

    family: str
    """Class of the transformer in diffusers."""
    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_tokens: int
    latent_size: int


VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SHAPES = {
    "SD3.5-medium, 512 px": Shape(
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        VAE,
        text_tokens=333,
        latent_size=64,
    ),
    "FLUX.1-dev, 512 px": Shape(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        VAE,
        text_tokens=512,
        latent_size=64,
    ),
}


class RandomModel:
    """``FlowModel`` of a real model's shape with random weights and random text."""

    lora_prefix = "transformer"

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, guidance: float, cfg_grad: str):
        from .models.diffusers import FAMILIES

        library: Any = import_module("diffusers")
        self.family, self.device, self.dtype = FAMILIES[shape.family], device, dtype
        self.scale, self.cfg_grad = guidance if self.family.is_guided else 1.0, cfg_grad
        self.latent_shape: tuple[int, ...] = (shape.vae["latent_channels"], shape.latent_size, shape.latent_size)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self.network = getattr(library, shape.family)(**shape.transformer).eval()
                self.vae = library.AutoencoderKL(**shape.vae).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        self.network.enable_gradient_checkpointing()
        self.lora = add_lora(self.network, LoraSettings(), self.family.targets).to(device)
        config = self.network.config
        self.context = torch.randn(1, shape.text_tokens, config.joint_attention_dim, device=device, dtype=dtype)
        self.pooled = torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype)

    def encode(self, prompts: Any) -> None:
        """All prompts are the same random text."""

    def velocity(self, x: Tensor, sigma: Tensor, cond: Any, rows: Tensor) -> Tensor:
        """As the real model of this family."""

        def predict(x: Tensor, sigma: Tensor, rows: Tensor, conditional: bool) -> Tensor:
            text = (self.context.expand(len(x), -1, -1), self.pooled.expand(len(x), -1))
            return self.family.predict(self.network, x.to(self.dtype), sigma, *text, 3.5).float()

        return guided(predict, x, sigma, rows, self.scale, self.cfg_grad)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Four at a time, as the real back end."""
        parts = [self.vae.decode(part.to(self.dtype), return_dict=False)[0] for part in latents.split(4)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).float()

    def schedule(self, num_steps: int) -> Tensor:
        """Times do not depend on it."""
        return shifted_linear(num_steps)
