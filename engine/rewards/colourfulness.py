"""Colourfulness after Hasler and Suesstrunk (2003)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..protocols import RewardBatch, RewardResult


@dataclass(frozen=True, slots=True)
class Colourfulness:
    """Spread plus 0.3 times mean of the red-green and yellow-blue opponents in units of 255; 0 is grey, 1.5 gaudy.

    The published index is 100 times (scale 0..255) this value.
    """

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image."""
        red, green, blue = (batch.images * 2.55).flatten(2).unbind(1)
        red_green, yellow_blue = red - green, (red + green) / 2 - blue
        spread = (red_green.var(1, correction=0) + yellow_blue.var(1, correction=0)).sqrt()
        return RewardResult(spread + 0.3 * (red_green.mean(1) ** 2 + yellow_blue.mean(1) ** 2).sqrt())

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Any prompt will do."""
        return []
