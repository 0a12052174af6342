"""Aesthetic predictor v2.5 (github.com/discus0434/aesthetic-predictor-v2-5) on SigLIP, without its package.

Its licence is the AGPL-3.0, so nothing of it is part of this package: whoever accepts the licence brings the file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..protocols import RewardBatch, RewardResult
from .aesthetic import Head, apply, check_head, head_need, load_head
from .clip import (
    BatchSize,
    ModelFolder,
    Precision,
    Weights,
    eight_bit,
    normalised,
    resized_as_pillow,
    score_batch,
    unit,
)
from .files import Need, locate, read_shapes, read_weights, require_transformers
from .kept import Kept
from .placement import Placement
from .pretrained import check_shapes, check_type, pretrained

if TYPE_CHECKING:
    from transformers import SiglipVisionConfig

SIGLIP = Need(
    "siglip-so400m-patch14-384",
    (("config.json",), ("model.safetensors",)),
    "google/siglip-so400m-patch14-384",
    "3.5 GB",
    "Apache-2.0",
    "hf download google/siglip-so400m-patch14-384 config.json model.safetensors --local-dir {folder}",
)
HEAD = Head(
    head_need(
        "aesthetic_predictor_v2_5.pth",
        "2.6 MB",
        "AGPL-3.0",
        "github.com/discus0434/aesthetic-predictor-v2-5",
        "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth",
    ),
    ("scoring_head.0.", "scoring_head.2.", "scoring_head.4.", "scoring_head.6.", "scoring_head.8."),
    (1024, 128, 64, 16, 1),
)
TYPES = ("siglip", "siglip_vision_model")
HALF = (0.5, 0.5, 0.5)
"""Mean and deviation: SigLIP sees -1..1."""


@dataclass(frozen=True, slots=True)
class AestheticSiglip:
    """Aesthetic predictor v2.5, 1..10, from 5.5 on good, as its author says; it reads no prompt.

    An affine map of SigLIP's unit image features, without bounds: easy to cheat; combine it with a reward that reads
    the prompt.
    """

    model: ModelFolder = SIGLIP.folder
    precision: Precision = "float32"
    placement: Placement = "swap"
    batch_size: BatchSize = 16

    def needs(self) -> tuple[Need, ...]:
        """Its files."""
        return SIGLIP.for_folder(self.model), HEAD.need

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image. Raises ValueError when the model cannot be loaded."""
        folder, head_folder = locate(self.needs())
        siglip = load_siglip(folder, self.precision, self.placement)
        head = load_head(head_folder, HEAD, siglip.model.config.hidden_size)
        return score_batch(siglip, batch, self.batch_size, lambda images, _: apply(head, siglip.features(images)))

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Missing or wrong files; any prompt will do."""
        try:
            require_transformers()
            folder, head_folder = locate(self.needs())
            check_head(head_folder, HEAD, check_siglip(folder).hidden_size)
        except ValueError as problem:
            return [str(problem)]
        return []


@dataclass(eq=False)
class Siglip:
    """The image encoder of a SigLIP."""

    model: Any
    placement: str

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 -> unit features [B, D], float32 on the CPU."""
        pixels = squash(images.to(self.model.device), self.model.config.image_size)
        return unit(self.model(pixel_values=pixels.to(self.model.dtype)))


def squash(images: Tensor, size: int) -> Tensor:
    """Both edges to ``size``, normalised: as transformers' SiglipImageProcessor, to one grey level.

    Raises ValueError for anything but float [B, 3, H, W].
    """
    return normalised(resized_as_pillow(eight_bit(images), size, size) / 255, HALF, HALF)


@Kept
@torch.inference_mode(False)
def load_siglip(folder: Path, precision: str, placement: str) -> Siglip:
    """The SigLIP in a folder with config.json and model.safetensors; equal arguments give the same one."""
    require_transformers()
    from transformers import SiglipVisionModel

    path = folder / "model.safetensors"
    model = pretrained(SiglipVisionModel, read_config(folder), of_images(read_weights(path)), path)
    return Siglip(model.to(getattr(torch, precision)), placement)


def check_siglip(folder: Path) -> "SiglipVisionConfig":
    """The model's shape. Raises ValueError when ``load_siglip`` would; the weights are not read."""
    from transformers import SiglipVisionModel

    config, path = read_config(folder), folder / "model.safetensors"
    with torch.device("meta"):
        expected = SiglipVisionModel(config).state_dict()
    check_shapes(path, of_images(read_shapes(path)), expected)
    return config


def read_config(folder: Path) -> "SiglipVisionConfig":
    """The image encoder's shape. Raises ValueError when config.json describes another model."""
    from transformers import SiglipVisionConfig

    check_type(folder, TYPES)
    return SiglipVisionConfig.from_pretrained(folder, local_files_only=True)


def of_images(weights: Weights) -> Weights:
    """The image encoder's tensors, named as in the whole model; transformers 5 leaves the prefix out."""
    prefix, others = "vision_model.", ("text_model.", "logit_")
    return {prefix + name.removeprefix(prefix): v for name, v in weights.items() if not name.startswith(others)}
