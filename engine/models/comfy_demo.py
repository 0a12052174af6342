"""The shipped demo model as ComfyUI's own MODEL, CLIP and VAE, for graphs of stock nodes without a download."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import comfy.sd  # pyright: ignore[reportMissingImports]
import torch
from comfy.sd1_clip import (  # pyright: ignore[reportMissingImports]
    escape_important,
    token_weights,
    unescape_important,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from ..demo import codec, text
from .tiny import DEMO_FILES


class DemoObjects(NamedTuple):
    """What ComfyUI's loaders return."""

    model: Any
    """MODEL"""
    clip: Any
    """CLIP"""
    vae: "DemoVAE"
    """VAE"""


def load_demo(folder: Path = DEMO_FILES) -> DemoObjects:
    """The demo model in ``folder``, in float32 on every device: what it learns elsewhere holds here."""
    model = comfy.sd.load_diffusion_model(str(folder / "transformer.safetensors"), {"dtype": torch.float32})
    tables = load_file(folder / "text.safetensors")
    size = sum(table.numel() for table in tables.values())
    clip = comfy.sd.CLIP(ClipTarget({"tables": tables}, DemoText, DemoTokenizer), parameters=size)
    return DemoObjects(model, clip, DemoVAE(load_file(folder / "codec.safetensors")))


class ClipTarget(NamedTuple):
    """How the host builds a CLIP."""

    params: dict[str, Any]
    clip: type[nn.Module]
    tokenizer: type


class DemoTokenizer:
    """Words to rows of the table. Weights as in "(red:1.2)" are understood and ignored."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Mapping[str, Any] | None = None):
        pass

    def tokenize_with_weights(self, text_: str, return_word_ids: bool = False, **_: Any) -> dict[str, Any]:
        """{"demo": [row]}, a row of (id, weight) or (id, weight, number of the word)."""
        parts = token_weights(escape_important(text_), 1.0)
        words = text.tokens(unescape_important(" ".join(part for part, _ in parts)))
        row = [(word, 1.0, place + 1 if word else 0) for place, word in enumerate(words)]
        return {"demo": [row if return_word_ids else [token[:2] for token in row]]}

    def untokenize(self, token_weight_pair: Any) -> Any:
        """The tokens as they are: hashed words cannot be read back."""
        return token_weight_pair

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}


class DemoText(nn.Module):
    """The word table as the host's text encoder."""

    def __init__(self, tables: Mapping[str, Tensor], device: Any = None, dtype: Any = None, model_options: Any = None):
        super().__init__()
        for name, table in tables.items():
            self.register_parameter(name, nn.Parameter(table.to(device, copy=True), requires_grad=False))
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: Any) -> None:
        """It has no layers to skip."""

    def reset_clip_options(self) -> None:
        """It has no options."""

    def load_sd(self, sd: Mapping[str, Tensor]) -> Any:
        """Other weights for the tables."""
        return self.load_state_dict(sd, strict=False)

    def encode_token_weights(self, tokens: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(context [1, 8, 64], pooled [1, 128], nothing more); several rows become a longer context."""
        tables = {name: value.detach().float().cpu() for name, value in self.named_parameters()}
        ids = torch.tensor([[token[0] for token in row] for row in tokens["demo"]])
        context = tables["word"][ids] + tables["position"]
        pooled = context.flatten(1) @ tables["pooled"].T
        return context.flatten(0, 1)[None], pooled[:1], {}


class DemoVAE:
    """The codec with the methods of the host's VAE. Latents are SD3's, before the host scales them for the model."""

    latent_channels = codec.CHANNELS
    latent_dim = 2
    output_channels = 3
    downscale_ratio = upscale_ratio = codec.PATCH

    def __init__(self, tables: dict[str, Tensor]):
        self.tables = tables

    def decode(self, samples_in: Tensor, vae_options: Any = None) -> Tensor:
        """Latents [B, 16, h, w] -> images [B, 8 h, 8 w, 3] in 0..1."""
        latents = (samples_in.float().cpu() - codec.SHIFT) * codec.SCALE
        return codec.decode(latents, self.tables).movedim(1, -1)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Images [B, H, W, 3] in 0..1 -> latents [B, 16, H / 8, W / 8]; sides are cut to multiples of 8."""
        images = pixel_samples[..., :3].movedim(-1, 1).float().cpu()
        height, width = (size // codec.PATCH * codec.PATCH for size in images.shape[-2:])
        return codec.encode(images[..., :height, :width], self.tables) / codec.SCALE + codec.SHIFT

    def decode_tiled(self, samples: Tensor, **_: Any) -> Tensor:
        """As ``decode``: it needs no tiles."""
        return self.decode(samples)

    def encode_tiled(self, pixel_samples: Tensor, **_: Any) -> Tensor:
        """As ``encode``: it needs no tiles."""
        return self.encode(pixel_samples)

    def spacial_compression_decode(self) -> int:
        """Pixels per latent along a side."""
        return codec.PATCH

    def spacial_compression_encode(self) -> int:
        """Pixels per latent along a side."""
        return codec.PATCH

    def temporal_compression_decode(self) -> None:
        """No video."""

    def get_sd(self) -> dict[str, Tensor]:
        """What a node that saves a VAE writes."""
        return self.tables
