"""LAION's aesthetic predictors: how good an image looks, without any prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..knobs import Choice
from ..protocols import RewardBatch, RewardResult
from .clip import BatchSize, ModelFolder, Precision, check_folder, crop, load_clip, read_config, score_batch
from .clipscore import CLIP_L
from .files import Need, check_tensors, locate, read_shapes, read_weights, require_transformers
from .kept import Kept
from .placement import Placement

FOLDER = "aesthetic"


class Layers(list[tuple[Tensor, Tensor]]):
    """(weight [out, in], bias [out]) of each layer. A class, since nothing refers weakly to a plain list."""


class Head(NamedTuple):
    """What is put on a model's image features; there is no activation between the layers."""

    need: Need
    layers: tuple[str, ...]
    """Prefix of the tensors of each layer, in order."""
    widths: tuple[int, ...]
    """Outputs of each layer."""


def head_need(file: str, size: str, licence: str, repository: str, address: str) -> Need:
    """A file that is published on GitHub only."""
    return Need(FOLDER, ((file,),), repository, size, licence, f"curl -L --create-dirs -o {{folder}}/{file} {address}")


HEADS = {
    "v2": Head(
        head_need(
            "sac+logos+ava1-l14-linearMSE.pth",
            "3.7 MB",
            "Apache-2.0",
            "github.com/christophschuhmann/improved-aesthetic-predictor",
            "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
            "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        ),
        ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7."),
        (1024, 128, 64, 16, 1),
    ),
    "v1": Head(
        head_need(
            "sa_0_4_vit_l_14_linear.pth",
            "4 KB",
            "MIT",
            "github.com/LAION-AI/aesthetic-predictor",
            "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
        ),
        ("",),
        (1,),
    ),
}


@dataclass(frozen=True, slots=True)
class Aesthetic:
    """LAION's aesthetic score, usually 4..7.5 of 10; it has no bounds, so training can drive it anywhere.

    An affine map of CLIP-L/14's unit image features: easy to cheat; combine it with a reward that reads the prompt.
    """

    version: Annotated[str, Choice(("v2", "v1"), "v2: improved predictor, v1: the first one")] = "v2"
    model: ModelFolder = CLIP_L.folder
    precision: Precision = "float32"
    placement: Placement = "swap"
    batch_size: BatchSize = 32

    def needs(self) -> tuple[Need, ...]:
        """Its files."""
        return CLIP_L.for_folder(self.model), HEADS[self.version].need

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image. Raises ValueError when the model cannot be loaded."""
        clip_folder, head_folder = locate(self.needs())
        clip = load_clip(clip_folder, self.precision, self.placement)
        head = load_head(head_folder, HEADS[self.version], clip.model.config.projection_dim)
        return score_batch(clip, batch, self.batch_size, lambda i, _: apply(head, clip.image_features(i, crop)))

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Missing or wrong files; any prompt will do."""
        try:
            require_transformers()
            clip_folder, head_folder = locate(self.needs())
            config: Any = read_config(check_folder(clip_folder))
            check_head(head_folder, HEADS[self.version], config.projection_dim)
        except ValueError as problem:
            return [str(problem)]
        return []


@Kept
@torch.inference_mode(False)
def load_head(folder: Path, head: Head, num_features: int) -> Layers:
    """The head's layers; equal arguments give the same ones. Raises ValueError when the file does not hold them."""
    path = folder / head.need.files[0][0]
    return linear_layers(read_weights(path), path, head.layers, head.widths, num_features)


def check_head(folder: Path, head: Head, num_features: int) -> None:
    """Raise ValueError when ``load_head`` would; nothing is kept."""
    path = folder / head.need.files[0][0]
    linear_layers(read_shapes(path), path, head.layers, head.widths, num_features)


def linear_layers(
    weights: Mapping[str, Tensor], path: Path, layers: Sequence[str], widths: Sequence[int], num_features: int
) -> Layers:
    """Layers by the prefixes of their names and their outputs, in float32.

    Raises ValueError when ``weights``, read from ``path``, lack them.
    """
    expected, width = {}, num_features
    for layer, out in zip(layers, widths, strict=True):
        expected |= {f"{layer}weight": torch.empty(out, width), f"{layer}bias": torch.empty(out)}
        width = out
    check_tensors(path, weights, expected)
    return Layers((weights[f"{layer}weight"].float(), weights[f"{layer}bias"].float()) for layer in layers)


def apply(head: Sequence[tuple[Tensor, Tensor]], features: Tensor) -> Tensor:
    """[B, D] -> [B]."""
    for weight, bias in head:
        features = linear(features, weight, bias)
    return features.squeeze(1)
