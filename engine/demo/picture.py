"""The README's picture: ``python -m densegrpo.engine.demo.picture RUN docs/demo.png``."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw


def side_by_side(run: Path, target: Path) -> None:
    """The held-out samples of a run before and after training."""
    sheets = [Image.open(run / "samples" / f"{name}.png") for name in ("before", "after")]
    width, height = sheets[0].size
    picture = Image.new("RGB", (2 * width + 24, height + 26), "white")
    draw = ImageDraw.Draw(picture)
    for x, title, sheet in zip((0, width + 24), ("before", "after"), sheets, strict=True):
        picture.paste(sheet, (x, 26))
        draw.text((x + 4, 6), title, fill="black", font_size=16)
    picture.quantize(128).save(target, optimize=True)


if __name__ == "__main__":
    side_by_side(Path(sys.argv[1]), Path(sys.argv[2]))
