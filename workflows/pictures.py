"""Draws the pictures that stand for methods and tasks in the template browser: ``python workflows/pictures.py``.

Those of methods: time runs from left (noise) to right (image). Red zigzags are noisy steps, grey lines exact ones,
dotted blue lines probes; squares are images that are scored, a green frame is a turning point. Needs Pillow.
"""

from collections.abc import Callable
from math import sin
from pathlib import Path

from methods import METHODS, Method
from PIL import Image, ImageDraw, ImageFont
from training import MODELS

FOLDER = Path(__file__).resolve().parent
SIZE, STEPS = (640, 400), 8
LEFT, RIGHT, TOP, BOTTOM = 60, 560, 120, 350
BACK, GREY, RED, BLUE, GREEN, WHITE = "#1e1e22", "#8a8f98", "#ff6b5e", "#5aa9ff", "#4fd06b", "#f2f2f2"


class Canvas:
    """Lines in units of steps and rows."""

    def __init__(self, rows: float):
        self.image = Image.new("RGB", SIZE, BACK)
        self.draw = ImageDraw.Draw(self.image)
        self.rows = rows

    def at(self, step: float, row: float) -> tuple[float, float]:
        """Pixels of a place."""
        return LEFT + (RIGHT - LEFT) * step / STEPS, TOP + (BOTTOM - TOP) * (row + 0.5) / self.rows

    def exact(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """An ODE step."""
        self.draw.line([self.at(*start), self.at(*end)], GREY, 3)

    def noisy(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """A noisy step."""
        (x0, y0), (x1, y1) = self.at(*start), self.at(*end)
        heights = (0, -7, 6, -5, 7, -6, 0)
        places = [i / (len(heights) - 1) for i in range(len(heights))]
        line = [(x0 + (x1 - x0) * p, y0 + (y1 - y0) * p + h) for p, h in zip(places, heights, strict=True)]
        self.draw.line(line, RED, 3, joint="curve")

    def probe(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """A tail, dotted."""
        (x0, y0), (x1, y1) = self.at(*start), self.at(*end)
        dots = max(2, int(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5 / 8))
        for i in range(dots):
            x, y = x0 + (x1 - x0) * i / dots, y0 + (y1 - y0) * i / dots
            self.draw.ellipse([x - 1.5, y - 1.5, x + 1.5, y + 1.5], BLUE)

    def state(self, step: float, row: float) -> None:
        """A latent."""
        x, y = self.at(step, row)
        self.draw.ellipse([x - 5, y - 5, x + 5, y + 5], WHITE)

    def scored(self, step: float, row: float, side: float = 14, frame: str = BLUE) -> None:
        """An image with a reward."""
        x, y = self.at(step, row)
        self.draw.rectangle([x - side, y - side, x + side, y + side], BACK, frame, 3)
        self.draw.polygon([(x - side + 5, y + side - 5), (x, y - 3), (x + side - 5, y + side - 5)], frame)


def chains(canvas: Canvas, method: Method) -> None:
    """Whole chains, noisy in a window or everywhere."""
    window = method.sampler.get("window", "all")
    first, end = {"all": (0, STEPS - 1), "random": (2, 5), "sliding": (2, 5)}[window]
    stride = 2 if method.probe and "tail_share" in method.probe else 1
    for row in range(int(canvas.rows)):
        trunk = canvas.rows / 2 - 0.5 if method.sampler.get("shared_noise") else row
        here = (0, trunk)
        for step in [*range(end), *range(end, STEPS, stride)]:
            there = (min(STEPS, step + (stride if step >= end else 1)), trunk if step < first else row)
            skipped = method.sampler.get("train_fraction", 1) < 1 and (step * 3 + row * 2) % 5 > 2
            noisy = first <= step < end
            (canvas.noisy if noisy else canvas.exact)(here, there)
            if noisy and skipped:
                canvas.draw.line([canvas.at(*here), canvas.at(*there)], GREY, 1)
            canvas.state(*here)
            here = there
        canvas.scored(STEPS, row)
    if window == "sliding":
        (x0, y0), (x1, y1) = canvas.at(first, -0.5), canvas.at(end, canvas.rows - 0.5)
        canvas.draw.rectangle([x0, y0, x1, y1], outline=GREEN, width=2)
        canvas.draw.line([(x1 + 6, y0 + 6), (x1 + 46, y0 + 6)], GREEN, 3)
        canvas.draw.polygon([(x1 + 56, y0 + 6), (x1 + 42, y0 - 2), (x1 + 42, y0 + 14)], GREEN)


def probed(canvas: Canvas, method: Method) -> None:
    """One chain, all of whose states are finished and scored."""
    heights = [2.2, 2.6, 3.1, 2.4, 2.8, 2.0, 2.3, 1.9, 1.9]
    for step in range(STEPS):
        kind = canvas.noisy if step < STEPS - 1 else canvas.exact
        kind((step, heights[step]), (step + 1, heights[step + 1]))
        turning = method.credit and step in (3, 5)
        if step < STEPS - 1:
            canvas.probe((step, heights[step]), (step + 0.55, 0.35))
            canvas.scored(step + 0.55, 0.2, 12, GREEN if turning else BLUE)
        canvas.state(step, heights[step])
    canvas.scored(STEPS, heights[STEPS])


def branches(canvas: Canvas, method: Method) -> None:
    """One exact trunk, and noisy branches from it."""
    trunk = 3.3
    for step in range(STEPS):
        canvas.exact((step, trunk), (step + 1, trunk))
    for nth, step in enumerate((1, 4) if method.probe else (1, 3, 5)):
        for child in range(3):
            born = (step + 1, trunk - 2.9 + 0.5 * child + 0.3 * nth)
            canvas.noisy((step, trunk), born)
            ends = (1.6, 2.0, 2.4) if method.probe else (1.9,)
            (canvas.probe if method.probe else canvas.exact)(born, (step + ends[0], born[1]))
            for end in ends:
                canvas.scored(step + end, born[1], 9)
    for step in range(STEPS):
        canvas.state(step, trunk)


def picture(method: Method, model: str) -> Image.Image:
    """The picture of one method on one model."""
    branching = "num_seeds" in method.sampler
    every_state = bool(method.probe) and not branching and "tail_share" not in (method.probe or {})
    canvas = Canvas(4)
    draw = branches if branching else probed if every_state else chains
    draw(canvas, method)
    heading(canvas.draw, method.title, model)
    write(canvas.draw, (LEFT - 25, BOTTOM + 18), "noise", 18, GREY)
    write(canvas.draw, (RIGHT - 30, BOTTOM + 18), "image", 18, GREY)
    return canvas.image


def heading(draw: ImageDraw.ImageDraw, title: str, below: str) -> None:
    """What it is, and for which model."""
    write(draw, (30, 22), title, 46, WHITE)
    write(draw, (32, 82), below, 20, GREY)


def write(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: float, colour: str, anchor: str = "la"
) -> None:
    """A line of text."""
    draw.text(place, text, colour, ImageFont.load_default(size), anchor)


def guarded(draw: ImageDraw.ImageDraw) -> None:
    """Two scores rise, the one that is only measured falls, and the run stops."""
    steps = [i / 60 for i in range(61)]
    curves = (
        ("trained", BLUE, lambda t: 300 - 150 * t),
        ("trained", BLUE, lambda t: 335 - 135 * t**1.6),
        ("only measured", GREEN, lambda t: 250 - 40 * t + 260 * max(0, t - 0.4) ** 1.6),
    )
    draw.line([(LEFT, 130), (LEFT, 360), (RIGHT + 20, 360)], GREY, 2)
    for name, colour, height in curves:
        line = [(LEFT + 390 * t, height(t) + 4 * sin(29 * t + len(name))) for t in steps]
        draw.line(line, colour, 4, joint="curve")
        write(draw, (line[-1][0] + 14, line[-1][1]), name, 20, colour, "lm")
    for dot in range(130, 360, 9):
        draw.line([(LEFT + 390, dot), (LEFT + 390, dot + 4)], RED, 3)
    write(draw, (LEFT + 390, 376), "stop", 20, RED, "mm")


def writing(draw: ImageDraw.ImageDraw) -> None:
    """A sign with mistakes and one without, and what is read on them."""
    for left, sign, colour, score in ((60, ("OPEM", "LAT"), RED, "0.75"), (370, ("OPEN", "LATE"), GREEN, "1.00")):
        draw.rectangle([left, 130, left + 210, 310], BACK, BLUE, 4)
        draw.line([(left + 55, 134), (left + 55, 165), (left + 155, 165), (left + 155, 134)], GREY, 3)
        draw.rounded_rectangle([left + 28, 165, left + 182, 280], 10, "#e9e2d0")
        for row, word in enumerate(sign):
            write(draw, (left + 105, 200 + 46 * row), word, 44, BACK, "mm")
        write(draw, (left + 105, 345), f"read: {score}", 28, colour, "mm")
    draw.line([(290, 220), (340, 220)], WHITE, 4)
    draw.polygon([(354, 220), (336, 210), (336, 230)], WHITE)


def composition(draw: ImageDraw.ImageDraw) -> None:
    """What a detector finds, and what it is checked for."""
    draw.rectangle([60, 130, 330, 360], "#d9d4c8", BLUE, 4)
    draw.rectangle([95, 230, 165, 315], "#d6403a")
    draw.arc([135, 245, 192, 295], -90, 90, "#d6403a", 9)
    boxes = [(85, 215, 202, 325, "cup")]
    for x, y in ((262, 205), (278, 302)):
        draw.ellipse([x - 30, y - 28, x + 30, y + 28], "#3f9d4a")
        draw.line([(x, y - 26), (x + 8, y - 40)], "#6b4a2f", 5)
        boxes.append((x - 38, y - 44, x + 38, y + 36, "apple"))
    for left, top, right, bottom, name in boxes:
        draw.rectangle([left, top, right, bottom], None, BACK, 2)
        draw.rectangle([left, top - 18, left + 10 + 8 * len(name), top], BACK)
        write(draw, (left + 5, top - 9), name, 15, WHITE, "lm")
    for row, text in enumerate(("a cup", "two apples", "red", "green", "left of")):
        y = 150 + 48 * row
        draw.line([(375, y), (384, y + 10), (402, y - 14)], GREEN, 5, joint="curve")
        write(draw, (425, y), text, 28, WHITE, "lm")


TASKS: dict[str, tuple[str, str, Callable[[ImageDraw.ImageDraw], None]]] = {
    "reward_mix_with_holdout": ("Two rewards, one guard", MODELS["demo"], guarded),
    "ocr_text_rendering": ("Writing", MODELS["sd35"], writing),
    "geneval_composition": ("Composition", MODELS["sd35"], composition),
}
"""Workflow -> title, model, what is drawn."""


def task_picture(title: str, model: str, draw_on: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    """The picture of a task."""
    image = Image.new("RGB", SIZE, BACK)
    draw = ImageDraw.Draw(image)
    draw_on(draw)
    heading(draw, title, model)
    return image


def main() -> None:
    """Write the pictures."""
    for key, method in METHODS.items():
        for model, title in MODELS.items():
            if model != "flux" or method.flux:
                picture(method, title).save(FOLDER / f"{key}_{model}.jpg", quality=88)
    for name, task in TASKS.items():
        task_picture(*task).save(FOLDER / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
