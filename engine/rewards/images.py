"""What every reward can rely on: images are RGB, and a picture that no one can see has no score."""

from torch import Tensor


def check_rgb(images: Tensor) -> None:
    """Raise ValueError for anything but float [B, 3, H, W]."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be float [B, 3, H, W] in 0..1 (RGB), got {images.dtype} {list(images.shape)}; "
            "convert grey or transparent images to RGB"
        )


def broken(images: Tensor) -> dict[int, str]:
    """Index of each image that no model can see -> reason."""
    bad = ~images.flatten(1).isfinite().all(1)
    return dict.fromkeys(bad.nonzero().flatten().tolist(), "the image has pixels that are not numbers")
