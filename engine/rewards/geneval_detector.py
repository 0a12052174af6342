"""Finds COCO's 80 things in images, with Mask2Former, for GenEval.

Any ``Detector`` will do. The official benchmark uses mmdet's Mask2Former Swin-S; this is the same network with the
weights of detectron2 that transformers can load, so scores come near the published ones but are not equal to them.
As there, an image keeps its proportions: the short edge becomes 800 pixels and the long one at most 1333; the edges
are rounded to multiples of 32 here, and filled up with a border there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils import skip_init

from .clip import Weights, eight_bit, normalised, resized_as_pillow
from .files import Need, check_tensors, read_shapes, read_weights, require_transformers, some
from .geneval_words import CLASSES, RENAMED
from .kept import Kept
from .pretrained import check_shapes, check_type, pretrained

if TYPE_CHECKING:
    from transformers import Mask2FormerConfig

DETECTOR = Need(
    "mask2former-swin-small-coco-instance",
    (("config.json",), ("model.safetensors",)),
    "facebook/mask2former-swin-small-coco-instance",
    "0.3 GB",
    "of the weights 'other' on the hub, of the code MIT",
    "hf download facebook/mask2former-swin-small-coco-instance config.json model.safetensors --local-dir {folder}",
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet."""
LONGEST = 1333 / 800
"""Of the long edge to the short one."""
STRIDE = 32
"""The network halves an image five times."""
LOWEST = 0.3
"""Objects with a score up to this are not reported: GenEval never looks at them."""
SPELLINGS = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""How some lists of COCO's things write them -> COCO's own name."""
UNUSED = tuple(f"pixel_level_module.encoder.swin.layernorm.{kind}" for kind in ("weight", "bias"))
"""A norm that transformers 5 adds behind the last stage; the four stages that are used have their own."""


class Found(NamedTuple):
    """One object in an image."""

    name: str
    """GenEval's name of the class."""
    score: float
    """0..1: probability of the class times the mean probability of the mask's pixels."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels; right and bottom are just outside."""
    mask: Tensor
    """[bottom - top, right - left] bool on the CPU; all True when the detector knows boxes only."""


Detector = Callable[[Tensor], list[list[Found]]]
"""(images [B, 3, H, W] in 0..1) -> the objects in each of them, the best first, all above ``LOWEST``."""


class Network(nn.Module):
    """transformers' Mask2FormerForUniversalSegmentation without its loss, which would need scipy."""

    def __init__(self, model: Any, class_predictor: Any):
        super().__init__()
        self.model, self.class_predictor = model, class_predictor

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> logits of Q queries: of classes [B, Q, C + 1], the last of which is none, and of masks."""
        with torch.random.fork_rng(devices=[]):  # transformers 4 draws numbers that only training uses
            found = self.model(pixel_values=pixels, output_hidden_states=True)
        states = found.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(states), found.masks_queries_logits[-1]


@dataclass(eq=False)
class Mask2Former:
    """A loaded network."""

    model: Network
    names: Sequence[str]
    """GenEval's name of each class."""
    placement: str

    def find(self, images: Tensor, size: int) -> list[list[Found]]:
        """A ``Detector`` of images whose short edge is resized to ``size``."""
        device = self.model.class_predictor.weight.device
        classes, masks = self.model(prepared(images.to(device), size))
        shape = (images.shape[-2], images.shape[-1])
        return [instances(*pair, shape, self.names) for pair in zip(classes, masks, strict=True)]


def prepared(images: Tensor, size: int) -> Tensor:
    """Resized and normalised. Raises ValueError for anything but float [B, 3, H, W] in 0..1."""
    pixels = eight_bit(images)
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    rows, columns = (max(1, round(min(edge * scale, LONGEST * size) / STRIDE)) * STRIDE for edge in (height, width))
    return normalised(resized_as_pillow(pixels, rows, columns, "bilinear") / 255, MEAN, STD)


def instances(classes: Tensor, masks: Tensor, shape: tuple[int, int], names: Sequence[str]) -> list[Found]:
    """The objects that Q queries found, for images of that shape: class logits [Q, C + 1], mask logits [Q, h, w]."""
    scores = classes.float().softmax(-1)[:, :-1]
    best, index = scores.flatten().topk(len(scores))
    found = []
    score: float
    which: int
    for score, which in zip(best.tolist(), index.tolist(), strict=True):
        if score <= LOWEST:  # and that of its mask cannot make it more
            break
        query, label = divmod(which, len(names))
        logits = interpolate(masks[query].float()[None, None], shape, mode="bilinear", align_corners=False)[0, 0]
        inside = logits > 0
        if inside.any():
            score *= logits[inside].sigmoid().mean().item()
        if score > LOWEST and inside.any():
            found.append(cut_out(names[label], score, inside.cpu()))
    return sorted(found, key=lambda one: one.score, reverse=True)


def cut_out(name: str, score: float, mask: Tensor) -> Found:
    """An object with its box, of a mask [H, W] of the whole image."""
    rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return Found(name, score, (left, top, right, bottom), mask[top:bottom, left:right].clone())


def class_names(config: "Mask2FormerConfig", path: Path) -> list[str]:
    """GenEval's name of each class of a model. Raises ValueError when it does not know all 80."""
    labels = [label for _, label in sorted((int(i), str(label)) for i, label in (config.id2label or {}).items())]
    names = [SPELLINGS.get(label, label) for label in labels]
    names = [RENAMED.get(name, name) for name in names]
    lacking = [name for name in CLASSES if name not in names]
    if lacking:
        raise ValueError(f"{path} lists {len(names)} classes without {some(lacking)}; it must know COCO's 80 things")
    return names


@Kept
@torch.inference_mode(False)
def load_detector(folder: Path, placement: str) -> Mask2Former:
    """The model in a folder with config.json and model.safetensors; equal arguments give the same one.

    Always float32: a small error can move a score over a threshold. Raises ValueError when it is damaged.
    """
    require_transformers()
    from transformers import Mask2FormerModel

    config, names = read_config(folder)
    path = folder / "model.safetensors"
    body, head = parts_of(read_weights(path), config, len(names), path)
    class_predictor = skip_init(nn.Linear, config.hidden_dim, len(names) + 1)
    class_predictor.load_state_dict(head)
    network = Network(pretrained(Mask2FormerModel, config, body, path, UNUSED), class_predictor)
    return Mask2Former(network.float().eval().requires_grad_(False), names, placement)


def check_detector(folder: Path) -> None:
    """Raise ValueError when ``load_detector`` would; the weights are not read."""
    from transformers import Mask2FormerModel

    config, names = read_config(folder)
    path = folder / "model.safetensors"
    body, _ = parts_of(read_shapes(path), config, len(names), path)
    with torch.random.fork_rng(devices=[]):  # on the CPU: transformers 4 cannot make this one without memory
        expected = Mask2FormerModel(config).state_dict()
    check_shapes(path, body, {name: value for name, value in expected.items() if name not in UNUSED})


def read_config(folder: Path) -> tuple["Mask2FormerConfig", list[str]]:
    """The model's shape and the names of its classes. Raises ValueError when it is another model's."""
    from transformers import Mask2FormerConfig

    check_type(folder, ["mask2former"])
    config = Mask2FormerConfig.from_pretrained(folder, local_files_only=True)
    return config, class_names(config, folder / "config.json")


def parts_of(weights: Weights, config: "Mask2FormerConfig", num_classes: int, path: Path) -> tuple[Weights, Weights]:
    """(the network, the layer behind it that tells classes), each with the names it has alone.

    Raises ValueError when the layer is not there.
    """
    prefixes = ("model.", "class_predictor.")
    body, head = ({n.removeprefix(p): value for n, value in weights.items() if n.startswith(p)} for p in prefixes)
    shapes = {"weight": (num_classes + 1, config.hidden_dim), "bias": (num_classes + 1,)}
    check_tensors(path, weights, {f"class_predictor.{name}": torch.empty(shape) for name, shape in shapes.items()})
    return body, head
