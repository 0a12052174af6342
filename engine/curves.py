"""Learning curves with Pillow alone: matplotlib is not part of ComfyUI."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

Points = Sequence[tuple[float, float]]
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 16, 34, 36


def plot(title: str, lines: Mapping[str, Points]) -> Image.Image:
    """A chart of named lines of (iteration, value)."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((LEFT, 8), title, fill="black")
    points = [point for line in lines.values() for point in line]
    if not points:
        draw.text((LEFT, HEIGHT / 2), "nothing yet", fill="gray")
        return sheet
    low_x, high_x = bounds([x for x, _ in points])
    low_y, high_y = bounds([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    for i in range(5):
        value = low_y + (high_y - low_y) * i / 4
        y = place(low_x, value)[1]
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill="#dddddd")
        draw.text((6, y - 6), f"{value:.3g}", fill="black")
    draw.text((LEFT, HEIGHT - BOTTOM + 8), f"iteration {low_x:.0f}", fill="black")
    draw.text((WIDTH - 60, HEIGHT - BOTTOM + 8), f"{high_x:.0f}", fill="black")
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [place(x, y) for x, y in line]
        if len(places) > 1:
            draw.line(places, fill=colour, width=2)
        for x, y in places[:: max(1, len(places) // 50)]:
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
        draw.text((LEFT + 8 + 220 * (i % 3), TOP + 4 + 14 * (i // 3)), name, fill=colour)
    return sheet


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, never equal."""
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)
