"""PickScore (Kirstain et al., arXiv 2305.01569): which image would people pick for the prompt?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..protocols import RewardBatch, RewardResult
from .clip import (
    BatchSize,
    ModelFolder,
    Precision,
    check_folder,
    crop,
    load_clip,
    problems_of,
    score_batch,
)
from .files import Need, from_hub, locate
from .placement import Placement

PICKSCORE = from_hub(
    "PickScore_v1",
    "yuvalkirstain/PickScore_v1",
    size="3.9 GB",
    licence="none stated on the model card; code and base model MIT",
)
FULL_SCORE = 26.0
"""Flow-GRPO divides the published score by it, so that good images come near 1."""


@dataclass(frozen=True, slots=True)
class PickScore:
    """Published PickScore / 26 as in Flow-GRPO, usually 0.65..0.95; the detail ``published`` is the number itself.

    exp(logit_scale) times the cosine of a CLIP-H/14 that was trained on people's choices between images.
    """

    model: ModelFolder = PICKSCORE.folder
    precision: Precision = "float32"
    placement: Placement = "swap"
    batch_size: BatchSize = 16

    def needs(self) -> tuple[Need, ...]:
        """Its files."""
        return (PICKSCORE.for_folder(self.model),)

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image. Raises ValueError when the model cannot be loaded."""
        clip = load_clip(*locate(self.needs()), self.precision, self.placement)

        def published(images: Tensor, prompts: Sequence[str]) -> Tensor:
            return clip.scale * clip.cosine(images, prompts, crop)

        found = score_batch(clip, batch, self.batch_size, published)
        return RewardResult(found.scores / FULL_SCORE, {"published": found.scores}, found.errors)

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Missing or wrong files, and empty prompts."""
        return problems_of(lambda: check_folder(*locate(self.needs())), prompts)
