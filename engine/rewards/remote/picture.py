"""Images as a server gets them: lossless PNG files."""

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ...protocols import RewardBatch
from ..clip import eight_bit

NOT_NUMBERS = "the image has pixels that are not numbers"


def png_files(images: Tensor) -> list[bytes | None]:
    """[B, 3, H, W] in 0..1 -> a PNG file each; None for an image whose pixels are not all numbers.

    8 bits per colour, rounded. Raises ValueError for anything but RGB.
    """
    good = images.isfinite().flatten(1).all(1).tolist()
    pixels = eight_bit(images.nan_to_num()).byte().movedim(1, -1).cpu().contiguous().numpy()
    return [png(Image.fromarray(array)) if fine else None for array, fine in zip(pixels, good, strict=True)]


def png(image: Image.Image) -> bytes:
    """Fast rather than small: most servers are near."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def text_of(file: bytes) -> str:
    """Base64, as JSON carries files."""
    return base64.b64encode(file).decode("ascii")


def trial_batch(metadata: dict[str, object] | None = None) -> RewardBatch:
    """A plain grey image, to see whether a reward answers at all."""
    return RewardBatch(torch.full((1, 3, 64, 64), 0.5), ["a plain grey image"], [metadata or {}])


def spread(good: Sequence[int], values: Sequence[float], num_images: int) -> Tensor:
    """[B] float32 with ``values`` at the indices ``good``, NaN elsewhere."""
    scores = torch.full((num_images,), torch.nan)
    scores[list(good)] = torch.tensor(values, dtype=torch.float32)
    return scores
