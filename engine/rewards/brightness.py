"""Mean brightness: needs no model, so it suits tests and a first run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from ..knobs import Knob
from ..protocols import RewardBatch, RewardResult

LUMA = (0.299, 0.587, 0.114)
"""Rec. 601 weights of red, green and blue."""


@dataclass(frozen=True, slots=True)
class Brightness:
    """1 - |mean luma - target|, 0..1; target 1 rewards bright, target 0 dark images."""

    target: Annotated[float, Knob(0.0, 1.0, "mean luma that is worth 1")] = 1.0

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image."""
        return RewardResult(1 - (luma(batch.images).flatten(1).mean(1) - self.target).abs())

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Any prompt will do."""
        return []


def luma(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, H, W]."""
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1)
