"""Codec of the demo model: 8 x 8 pixels <-> 16 channels by principal components, one matrix product.

Latents follow SD3's convention, so that ComfyUI's SD3 latent format fits: what the model sees is
``(latent - SHIFT) * SCALE``.
"""

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

PATCH, CHANNELS = 8, 16
SCALE, SHIFT = 1.5305, 0.0609


def fit(images: Tensor) -> dict[str, Tensor]:
    """The tensors of ``codec.safetensors`` from sample images [N, 3, H, W].

    Components are scaled half-way to unit variance: full whitening would make the model spend as much on
    the faintest detail as on colour.
    """
    patches = pixel_unshuffle(images, PATCH).permute(0, 2, 3, 1).flatten(0, 2)
    mean = patches.mean(0)
    _, values, basis = torch.linalg.svd((patches - mean).T.cov().double())
    std = values[:CHANNELS].sqrt().float()
    scale = std.sqrt()
    scale = scale * ((std / scale) ** 2).mean().sqrt()
    components = basis[:CHANNELS].float()
    return {"mean": mean, "encode": components / scale[:, None], "decode": components * scale[:, None]}


def encode(images: Tensor, codec: dict[str, Tensor]) -> Tensor:
    """Images [B, 3, H, W] in 0..1 -> model-space latents [B, 16, H/8, W/8], about unit variance."""
    patches = pixel_unshuffle(images, PATCH).movedim(1, -1)
    return ((patches - codec["mean"]) @ codec["encode"].T).movedim(-1, 1)


def decode(latents: Tensor, codec: dict[str, Tensor]) -> Tensor:
    """Model-space latents -> images [B, 3, H, W] in 0..1."""
    patches = (latents.movedim(1, -1) @ codec["decode"] + codec["mean"]).movedim(-1, 1)
    return pixel_shuffle(patches, PATCH).clamp(0, 1)
