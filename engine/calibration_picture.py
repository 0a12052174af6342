"""The picture of a noise table, with Pillow alone: matplotlib is not part of ComfyUI."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from .checkpoint import SaveError
from .noise_table import NoiseTable, write_table

WIDTH, LEFT, RIGHT = 720, 64, 16
BARS, RATES = (40, 280), (340, 520)
"""Top and bottom of the two charts in pixels."""
HEIGHT = 560
GAINED, LOST, FADED = ("#a6d8a8", "#2ca02c"), ("#f0b0b0", "#d62728"), ("#888888", "#1f77b4")
"""Colours before and after."""


def save_table(path: Path, table: NoiseTable) -> None:
    """Write the table to ``path`` and its picture, a .png, beside it. Raises SaveError."""
    write_table(path, table)
    picture = path.with_suffix(".png")
    try:
        draw_table(table).save(picture)
    except OSError as problem:
        raise SaveError(f"could not save {picture}: {problem}; the table itself is in {path}") from problem


def draw_table(table: NoiseTable) -> Image.Image:
    """Above, the share of images that gained (up) and lost (down) at each step; below, the noise, on a log scale.

    Pale is before, strong is after. A table made by hand has no measurements, so only its noise is drawn.
    """
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    sides = [table[name] for name in ("before", "after") if name in table]
    num_noisy = len(table["rates"]) - 1
    places = [LEFT + (t + 0.5) * (WIDTH - LEFT - RIGHT) / num_noisy for t in range(num_noisy)]
    draw.text((LEFT, 12), "images that gained (up) and lost (down): before (pale), after (strong)", fill="black")
    draw_shares(draw, sides, places)
    draw.text((LEFT, BARS[1] + 36), f"noise (kernel {table['kernel']}): before (grey), after (blue)", fill="black")
    draw_rates(draw, [side["rates"] for side in sides] or [table["rates"]], places)
    for t, x in enumerate(places):
        for bottom in (BARS[1], RATES[1]):
            draw.text((x, bottom + 4), str(t), fill="black", anchor="ma")
    draw.text((LEFT, RATES[1] + 18), "denoising step", fill="black")
    return sheet


def draw_shares(draw: ImageDraw.ImageDraw, sides: Sequence[Mapping[str, Sequence[float]]], places: list[float]) -> None:
    """Bars up and down from the middle; the dotted lines are one half."""
    top, bottom = BARS
    middle, unit = (top + bottom) / 2, (bottom - top) / 2
    for share in (-1, -0.5, 0, 0.5, 1):
        y = middle - share * unit
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill="#999999" if share == 0 else "#dddddd")
        draw.text((LEFT - 8, y), f"{abs(share):.0%}", fill="black", anchor="rm")
    half = 0.4 * (WIDTH - LEFT - RIGHT) / len(places)
    for i, side in enumerate(sides):
        for t, x in enumerate(places):
            left, right = x - half + i * half, x + i * half - 1
            draw.rectangle([left, middle - side["positive"][t] * unit, right, middle], fill=GAINED[i])
            draw.rectangle([left, middle, right, middle + side["negative"][t] * unit], fill=LOST[i])


def draw_rates(draw: ImageDraw.ImageDraw, lines: Sequence[Sequence[float]], places: list[float]) -> None:
    """The rates of the noisy steps."""
    top, bottom = RATES
    values = [rate for line in lines for rate in line[: len(places)]]
    low, high = (math.log10(max(v, 1e-3)) for v in (min(values) / 1.2, max(values) * 1.2))
    high = max(high, low + 0.2)

    def place(rate: float) -> float:
        return bottom - (math.log10(max(rate, 1e-3)) - low) / (high - low) * (bottom - top)

    for i in range(5):
        value = 10 ** (low + (high - low) * i / 4)
        y = place(value)
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill="#dddddd")
        draw.text((LEFT - 8, y), f"{value:.2g}", fill="black", anchor="rm")
    for line, colour in zip(lines, FADED[-len(lines) :], strict=True):
        points = [(x, place(rate)) for x, rate in zip(places, line, strict=False)]
        draw.line(points, fill=colour, width=2)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
