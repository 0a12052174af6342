"""How small (or large) an image gets as JPEG, the classic of DDPO (arXiv 2305.13301)."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from PIL import Image
from torch import Tensor

from ..knobs import Choice
from ..protocols import RewardBatch, RewardResult


@dataclass(frozen=True, slots=True)
class Jpeg:
    """Minus (compressible) or plus (incompressible) the bits per pixel at quality 95."""

    direction: Annotated[
        str, Choice(("compressible", "incompressible"), "whether small or large files are rewarded")
    ] = "compressible"

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image."""
        sign = -1 if self.direction == "compressible" else 1
        height, width = batch.images.shape[-2:]
        sizes = [sign * 8 * num_bytes(image) / (height * width) for image in batch.images]
        return RewardResult(torch.tensor(sizes, dtype=torch.float32))

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Any prompt will do."""
        return []


def num_bytes(image: Tensor) -> int:
    """Size of one image [3, H, W] as JPEG."""
    pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue())
