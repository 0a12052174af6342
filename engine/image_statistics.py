"""What any image has, whatever it shows: when these drift far while a reward rises, the reward is being gamed."""

import torch
from torch import Tensor

from .rewards.brightness import luma

BINS = 64


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """[N, 3, H, W] in 0..1 -> [N] of each: brightness, saturation, sharpness (all 0..1) and entropy (0..6 bits)."""
    grey = luma(images)
    high, low = images.amax(1), images.amin(1)
    right, down = (grey.diff(dim=2).abs().mean((1, 2)), grey.diff(dim=1).abs().mean((1, 2)))
    return {
        "brightness": grey.mean((1, 2)),
        "saturation": ((high - low) / high.clamp(min=1e-6)).mean((1, 2)),
        "sharpness": (right + down) / 2,
        "entropy": entropy(grey),
    }


def entropy(grey: Tensor) -> Tensor:
    """Of the brightness histogram [N, H, W] in 64 bins: 0 bits for a flat image, 6 when all are equally common."""
    levels = (grey.clamp(0, 1) * BINS).long().clamp(max=BINS - 1).flatten(1)
    share = torch.zeros(len(grey), BINS).scatter_add_(1, levels, torch.ones(levels.shape)) / levels.shape[1]
    return -(share * share.clamp(min=1e-12).log2()).sum(1)
