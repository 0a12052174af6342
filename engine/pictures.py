"""Grids of images with captions."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

CAPTION, GAP = 14, 4


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in 0..1 -> RGB image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().contiguous().numpy())


def grid(images: Tensor, captions: Sequence[str] = (), columns: int = 0, smallest: int = 128) -> Image.Image:
    """[N, 3, H, W] in 0..1 -> one picture; small images are enlarged to at least ``smallest`` pixels."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    factor = max(1, math.ceil(smallest / images.shape[-1]))
    height, width = images.shape[-2] * factor, images.shape[-1] * factor
    row_height = height + GAP + (CAPTION if captions else 0)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * row_height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * row_height
        sheet.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if captions:
            draw.text((x, y + height + 1), shortened(captions[i], width, draw), fill="black")
    return sheet


def annotated(images: Tensor, captions: Sequence[str]) -> Tensor:
    """[N, 3, H, W] -> the same images enlarged to at least 256 pixels, each with its caption below, [N, 3, H', W']."""
    sheets = [to_tensor(grid(image[None], [caption], 1, 256)) for image, caption in zip(images, captions, strict=True)]
    return torch.stack(sheets)


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB image -> [3, H, W] in 0..1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0).float() / 255


def shortened(text: str, width: int, draw: ImageDraw.ImageDraw) -> str:
    """As much of ``text`` as fits into ``width`` pixels."""
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
