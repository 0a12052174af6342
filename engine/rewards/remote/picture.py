"""Images as a server gets them: lossless PNG files."""

import base64
import io
import zlib
from collections.abc import Sequence
from threading import Lock

import torch
from PIL import Image
from torch import Tensor

from ...protocols import RewardBatch
from ..clip import eight_bit

NOT_NUMBERS = "the image has pixels that are not numbers"


class Picture:
    """An image as a file, made when it is first read, by whatever thread does it."""

    def __init__(self, image: Tensor, readers: int):
        self.image, self.readers = image, readers
        self.file: bytes | None = None
        self.lock = Lock()

    def read(self) -> bytes | None:
        """The PNG file, or None when the image's pixels are not all numbers.

        The last of the readers takes it away: memory holds those files only that are under way.
        """
        with self.lock:
            file = png_file(self.image) if self.file is None else self.file
            self.readers -= 1
            self.file = file if self.readers else None
            return file


def png_file(image: Tensor) -> bytes | None:
    """[3, H, W] in 0..1 -> a PNG file of 8 bits per colour, rounded; None when its pixels are not all numbers."""
    if not image.isfinite().all():
        return None
    pixels = eight_bit(image[None])[0].byte().movedim(0, -1).cpu().contiguous().numpy()
    file = io.BytesIO()
    # Fast rather than small, most servers are near: of PNG's ways to compress this one is the fastest, and its files
    # are not larger than those of zlib's level 1.
    Image.fromarray(pixels).save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
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
