"""Which of ten colours an object has, by CLIP, as GenEval asks it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .clip import Clip, crop
from .geneval_words import COLOURS

TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = 0x99 / 255
"""What is painted around an object: #999."""
LONGEST = 16
"""Of the long edge to the short one: CLIP sees the middle square only, and the rest would fill the memory."""


def on_grey(image: Tensor, box: tuple[int, int, int, int], mask: Tensor) -> Tensor:
    """The part of ``image`` [3, H, W] in a box (left, top, right, bottom), grey where ``mask`` [h, w] is False."""
    left, top, right, bottom = box
    part = image[:, top:bottom, left:right]
    return part.where(mask.to(part.device), GREY)


def colours_of(clip: Clip, objects: Sequence[Tensor], names: Sequence[str], batch_size: int) -> list[str]:
    """The colour of each object: cut-outs [3, h, w] of any sizes, and the names of their classes."""
    edge, found = clip.model.config.vision_config.image_size, []
    for start in range(0, len(objects), batch_size):
        rows = slice(start, start + batch_size)
        pixels = torch.cat([crop(middle(one)[None].to(clip.model.device), edge) for one in objects[rows]])
        features = clip.image_features(pixels, lambda prepared, _: prepared)
        weights = torch.stack([colour_features(clip, name) for name in names[rows]])
        found += [COLOURS[i] for i in (weights @ features[:, :, None]).squeeze(2).argmax(1).tolist()]
    return found


def middle(image: Tensor) -> Tensor:
    """[3, H, W] cut in its middle to ``LONGEST`` times its short edge."""
    height, width = image.shape[1:]
    rows, columns = min(height, LONGEST * width), min(width, LONGEST * height)
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[:, top : top + rows, left : left + columns]


def colour_features(clip: Clip, name: str) -> Tensor:
    """[10, D]: for each colour the mean of the templates' text features, of unit length."""
    texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
    features = clip.text_features(texts).unflatten(0, (len(COLOURS), len(TEMPLATES)))
    return normalize(features.mean(1), dim=-1)
