"""CLIPScore (Hessel et al., arXiv 2104.08718): does the image fit its prompt?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

CLIP_L = from_hub(
    "clip-vit-large-patch14", "openai/clip-vit-large-patch14", size="1.7 GB", licence="MIT, as OpenAI's CLIP"
)


@dataclass(frozen=True, slots=True)
class ClipScore:
    """Cosine of CLIP-L/14 features of image and prompt, -1..1, usually 0.15..0.35.

    The raw cosine; the paper multiplies it by 2.5 and cuts it at 0.
    """

    model: ModelFolder = CLIP_L.folder
    precision: Precision = "float32"
    placement: Placement = "swap"
    batch_size: BatchSize = 32

    def needs(self) -> tuple[Need, ...]:
        """Its files."""
        return (CLIP_L.for_folder(self.model),)

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image. Raises ValueError when the model cannot be loaded."""
        clip = load_clip(*locate(self.needs()), self.precision, self.placement)
        return score_batch(clip, batch, self.batch_size, lambda images, prompts: clip.cosine(images, prompts, crop))

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Missing or wrong files, and empty prompts."""
        return problems_of(lambda: check_folder(*locate(self.needs())), prompts)
