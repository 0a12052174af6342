"""Compositional checker for coloured shapes: finds them without any model and applies GenEval's rules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, one_hot, pad

from ..demo.scenes import BACKGROUND, COLOURS, SHAPES, Record, all_prompts
from ..knobs import Choice
from ..protocols import RewardBatch, RewardResult
from .geneval import Detection, judge, problems

SIZE = 64
"""Images are box-filtered to this size first, so the time does not depend on theirs."""
REACH = 80 / 255
"""A pixel belongs to a colour within this distance in RGB."""
FULL_AREA = 0.25
"""Share of the image that earns the whole dense score of a colour."""
MIN_AREA = 0.015
"""Smaller components are specks."""
TRIANGLE_CENTRE, SQUARE_EXTENT = 0.57, 0.86
"""A triangle's mean row lies 2/3 down its box, others' in the middle; a square fills its box, a circle pi / 4 of it."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """How well the picture shows the shapes, colours, counts and places its prompt asks for, 0..1.

    ``strict``: everything holds. ``partial``: share of counts, colours and relations that hold. ``dense``: area of
    the wanted colours, each capped at a quarter of the image: a smooth companion that says nothing of shape.
    """

    score: Annotated[str, Choice(("dense", "partial", "strict"), "which score is the reward")] = "dense"

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image."""
        images = interpolate(batch.images, (SIZE, SIZE), mode="area")
        metadata = [with_clauses(*pair) for pair in zip(batch.prompts, batch.metadata, strict=True)]
        if self.score == "dense":
            return RewardResult(wanted_area(images, metadata))
        verdicts = [judge(d, m) for d, m in zip(detect(images), metadata, strict=True)]
        return RewardResult(torch.tensor([getattr(v, self.score) for v in verdicts], dtype=torch.float32))

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """GenEval clauses of our shapes and colours; the dense score needs a colour."""
        found = []
        for prompt, given in zip(prompts, metadata, strict=True):
            data = with_clauses(prompt, given)
            problem = problems(data, SHAPES, list(COLOURS))
            if not problem and self.score == "dense" and not any("color" in c for c in data["include"]):
                problem = "the dense score needs a clause with a color; use score 'partial'"
            if problem:
                found.append(f"prompt {prompt!r}: {problem}")
        return found


@cache
def grammar() -> dict[str, Record]:
    """The demo model's prompts: their clauses follow from the text."""
    return {entry["prompt"]: entry for entry in all_prompts()}


def with_clauses(prompt: str, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata, or what a prompt of the demo model's grammar means when it has none."""
    return metadata if "include" in metadata else grammar().get(prompt.strip(), metadata)


def wanted_area(images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """[B]: mean over coloured clauses of the colour's area, capped at ``FULL_AREA``."""
    names = list(COLOURS)
    want = torch.zeros(len(images), len(names))
    for row, data in zip(want, metadata, strict=True):
        for clause in data["include"]:
            if "color" in clause:
                row[names.index(clause["color"])] += 1
    colours = images.new_tensor(list(COLOURS.values())) / 255
    near = torch.cdist(images.flatten(2).mT, colours, compute_mode="donot_use_mm_for_euclid_dist") < REACH
    area = (near.float().mean(1) / FULL_AREA).clamp(max=1)
    return (area * want.to(area)).sum(1) / want.to(area).sum(1)


def detect(images: Tensor) -> list[list[Detection]]:
    """The shapes in each image [B, 3, 64, 64], largest first."""
    palette = images.new_tensor([*COLOURS.values(), BACKGROUND]) / 255
    distance = torch.cdist(images.flatten(2).mT, palette, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.argmin(2).masked_fill(distance.amin(2) > REACH, len(COLOURS))
    masks = one_hot(nearest, len(palette))[..., :-1].mT.unflatten(2, images.shape[-2:]).bool()
    image, colour = (masks.flatten(2).float().mean(2) >= MIN_AREA).nonzero(as_tuple=True)
    found: list[list[Detection]] = [[] for _ in images]
    # A few planes at a time: their label maps then fit the cache.
    for start in range(0, len(image), 16):
        planes = slice(start, start + 16)
        labels = components(masks[image[planes], colour[planes]])
        for plane, shape in classify(labels, [list(COLOURS)[c] for c in colour[planes].tolist()]):
            found[int(image[start + plane])].append(shape)
    return [sorted(shapes, key=area, reverse=True) for shapes in found]


def area(shape: Detection) -> float:
    """Of the bounding box."""
    left, top, right, bottom = shape.box
    return (right - left) * (bottom - top)


def components(masks: Tensor) -> Tensor:
    """[N, H, W] bool -> int labels of 8-connected components, unique within a plane; 0 outside."""
    size = masks[0].numel()
    labels = torch.arange(1, size + 1, dtype=torch.float32, device=masks.device).view(masks.shape[1:]) * masks
    while True:
        grown = max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * masks
        if torch.equal(grown, labels):
            return labels.long()
        # Pointer jumping: take over the label of the pixel one is named after, so rounds grow with log(size).
        flat = pad(grown.flatten(1), (1, 0))
        labels = flat.gather(1, grown.flatten(1).long()).view_as(grown)


def classify(labels: Tensor, colours: Sequence[str]) -> list[tuple[int, Detection]]:
    """Components [N, H, W] of planes of one colour each -> (plane, shape)."""
    plane, y, x = labels.nonzero(as_tuple=True)
    names = plane * labels[0].numel() + labels[plane, y, x] - 1
    _, which, pixels = names.unique(return_inverse=True, return_counts=True)

    def reduce(values: Tensor, how: str) -> Tensor:
        return values.new_zeros(len(pixels)).scatter_reduce(0, which, values, how, include_self=False)

    box = torch.stack([reduce(x, "amin"), reduce(y, "amin"), reduce(x, "amax") + 1, reduce(y, "amax") + 1], 1)
    left, top, right, bottom = box.float().unbind(1)
    extent = pixels / ((right - left) * (bottom - top))
    centre = (reduce(y.float(), "mean") + 0.5 - top) / (bottom - top)
    owner: list[int] = reduce(plane, "amin").tolist()
    found = []
    for i in (pixels >= MIN_AREA * labels[0].numel()).nonzero().flatten().tolist():
        name = "square" if extent[i] > SQUARE_EXTENT else "circle"
        name = "triangle" if centre[i] > TRIANGLE_CENTRE else name
        found.append((owner[i], Detection(name, colours[int(owner[i])], tuple(box[i].tolist()))))
    return found
