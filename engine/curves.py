"""Learning curves with Pillow alone: matplotlib is not part of ComfyUI."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[float, float]]
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd")
WIDTH, ROOM, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 64, 16, 34, 36
LETTERS, LINE = 17, 24
"""Pixels; a node shows the picture at about half its size. ``ROOM`` is the height of the chart itself."""


def plot(title: str, lines: Mapping[str, Points]) -> Image.Image:
    """A chart of named lines of (iteration, value); their names stand above it."""
    font = ImageFont.load_default(LETTERS)
    corners = legend([font.getlength(name) for name in lines])
    top = corners[-1][1] + LINE + 8 if corners else TOP
    height = top + ROOM + BOTTOM
    sheet = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.font = font
    draw.text((LEFT, 8), title, fill="black")
    points = [point for line in lines.values() for point in line]
    if not points:
        draw.text((LEFT, height / 2), "nothing yet", fill="gray")
        return sheet
    low_x, high_x = bounds([x for x, _ in points])
    low_y, high_y = bounds([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        return across, top + (high_y - y) / (high_y - low_y) * ROOM

    for i in range(5):
        value = low_y + (high_y - low_y) * i / 4
        y = place(low_x, value)[1]
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill="#dddddd")
        draw.text((LEFT - 8, y), f"{value:.3g}", fill="black", anchor="rm")
    draw.text((LEFT, top + ROOM + 8), f"iteration {low_x:.0f}", fill="black")
    draw.text((WIDTH - RIGHT, top + ROOM + 8), f"{high_x:.0f}", fill="black", anchor="ra")
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        draw.text(corners[i], name, fill=colour)
        places = [place(x, y) for x, y in line]
        if len(places) > 1:
            draw.line(places, fill=colour, width=2)
        for x, y in places[:: max(1, len(places) // 50)]:
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
    return sheet


def legend(widths: Sequence[float]) -> list[tuple[float, int]]:
    """Where names of these widths begin, in as many lines as they need."""
    found: list[tuple[float, int]] = []
    x, y = float(LEFT), TOP
    for width in widths:
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, y = float(LEFT), y + LINE
        found.append((x, y))
        x += width + 28
    return found


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, never equal."""
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)
