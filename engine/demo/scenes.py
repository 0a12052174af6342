"""Coloured shapes on a light background: the demo model's whole world.

A picture is a 2 x 2 grid of cells; each cell is empty or holds one shape of fixed size at a jittered
place. Prompts carry GenEval's metadata (``include`` clauses of class, count, color, position), so the same
rules judge the demo model and real models.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Generator, Tensor

IMAGE_SIZE = 64
CELL = IMAGE_SIZE // 2
SHAPE_SIZE = 20
JITTER = 4
BACKGROUND = (235, 235, 235)
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 80, 220),
    "yellow": (245, 205, 40),
    "purple": (155, 60, 200),
    "black": (35, 35, 35),
}
SHAPES = ("circle", "square", "triangle")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation -> direction (x, y) from the second object to the first; y points down."""
CELLS = ((0, 0), (1, 0), (0, 1), (1, 1))
"""(column, row) of each cell."""

Record = dict[str, Any]
"""One prompt with GenEval metadata: prompt, tag, include, exclude."""


def clause(shape: str, colour: str | None = None, count: int = 1) -> Record:
    """One ``include`` clause."""
    return {"class": shape, "count": count} | ({"color": colour} if colour else {})


def record(tag: str, prompt: str, *include: Record) -> Record:
    """A prompt whose picture holds exactly what ``include`` says."""
    exclude = [{"class": c["class"], "count": c["count"] + 1} for c in include]
    return {"tag": tag, "prompt": prompt, "include": list(include), "exclude": exclude}


def all_prompts() -> Iterator[Record]:
    """Every prompt of the grammar, 1170 of them, in a fixed order."""
    things = [(c, s) for c in COLOURS for s in SHAPES]
    for s in SHAPES:
        yield record("single_object", f"a {s}", clause(s))
        for n, word in NUMBERS.items():
            yield record("counting", f"{word} {s}s", clause(s, None, n))
    for c, s in things:
        yield record("colors", f"a {c} {s}", clause(s, c))
        for n, word in NUMBERS.items():
            yield record("counting", f"{word} {c} {s}s", clause(s, c, n))
    for a, b in permutations(SHAPES, 2):
        yield record("two_object", f"a {a} and a {b}", clause(a), clause(b))
    for (ca, a), (cb, b) in permutations(things, 2):
        if a == b:
            continue
        first, second = clause(a, ca), clause(b, cb)
        yield record("color_attr", f"a {ca} {a} and a {cb} {b}", first, second)
        for relation in RELATIONS:
            placed = first | {"position": [relation, 1]}
            yield record("position", f"a {ca} {a} {relation} a {cb} {b}", placed, second)


def is_held_out(entry: Record) -> bool:
    """Whether the demo model never sees this prompt, neither in pre-training nor in reinforcement learning."""
    if entry["tag"] in ("single_object", "two_object"):
        return False
    return hashlib.sha256(entry["prompt"].encode()).digest()[0] % 5 == 0


def prompt_lists() -> tuple[list[Record], list[Record]]:
    """(training, held-out) prompts of reinforcement learning: all tags with a colour, relations thinned."""
    coloured = [e for e in all_prompts() if any("color" in c for c in e["include"])]
    seen = [e for e in coloured if not is_held_out(e)]
    held_out = [e for e in coloured if is_held_out(e)]
    return thinned(seen, {"color_attr": 60, "position": 80}), thinned(held_out, {"color_attr": 34, "position": 80})


def thinned(entries: Sequence[Record], most: dict[str, int]) -> list[Record]:
    """At most ``most[tag]`` prompts of a tag, evenly spread over the list."""
    kept = []
    for tag in dict.fromkeys(e["tag"] for e in entries):
        same = [e for e in entries if e["tag"] == tag]
        count = min(len(same), most.get(tag, len(same)))
        kept += [same[i * len(same) // count] for i in range(count)]
    return kept


def layouts(entry: Record) -> list[tuple[int, ...]]:
    """All ways to fill the four cells: 0 empty, 1 the first clause's shape, 2 the second's."""
    include = entry["include"]
    if len(include) == 1:
        return [tuple(int(i in cells) for i in range(4)) for cells in combinations(range(4), include[0]["count"])]
    pairs = permutations(range(4), 2)
    position = include[0].get("position")
    if position:
        dx, dy = RELATIONS[position[0]]
        pairs = [(i, j) for i, j in pairs if (CELLS[i][0] - CELLS[j][0]) * dx + (CELLS[i][1] - CELLS[j][1]) * dy > 0]
    return [tuple({i: 1, j: 2}.get(cell, 0) for cell in range(4)) for i, j in pairs]


def cell_table() -> Tensor:
    """Every picture a cell can show: [7 colours, 3 shapes, 81 offsets, 3, 32, 32]; colour 6 is the background."""
    offsets = [(x, y) for y in range(-JITTER, JITTER + 1) for x in range(-JITTER, JITTER + 1)]
    alpha = torch.stack([torch.stack([_stamp(s, *offset) for offset in offsets]) for s in SHAPES])[None, :, :, None]
    palette = torch.tensor([*COLOURS.values(), BACKGROUND]).view(-1, 1, 1, 3, 1, 1) / 255
    return palette[-1:] * (1 - alpha) + palette * alpha


def _stamp(shape: str, dx: int, dy: int, fine: int = 4) -> Tensor:
    axis = (torch.arange(CELL * fine) + 0.5) / fine - CELL / 2
    x, y = (axis - dx)[None, :], (axis - dy)[:, None]
    r = SHAPE_SIZE / 2
    inside = {
        "circle": x**2 + y**2 <= r**2,
        "square": (x.abs() <= r) & (y.abs() <= r),
        "triangle": (y.abs() <= r) & (x.abs() <= (y + r) / 2),
    }[shape]
    return torch.nn.functional.avg_pool2d(inside.float()[None, None], fine)[0, 0]


class SceneSampler:
    """Random pictures of prompts, thousands a second: gathers cells of ``table``, in pixels or in latents.

    Any linear codec that works cell by cell may be applied to ``table`` beforehand.
    """

    def __init__(self, entries: Sequence[Record], table: Tensor):
        self.table = table
        tables = [layouts(entry) for entry in entries]
        self.num_layouts = torch.tensor([len(t) for t in tables])
        width = int(self.num_layouts.max())
        self.layouts = torch.tensor([t + t[:1] * (width - len(t)) for t in tables])
        rows = [[*e["include"], e["include"][0]][:2] for e in entries]
        names = list(COLOURS)
        self.shapes = torch.tensor([[SHAPES.index(c["class"]) for c in row] for row in rows])
        self.colours = torch.tensor([[names.index(c["color"]) if "color" in c else -1 for c in row] for row in rows])

    def __call__(self, index: Tensor, generator: Generator) -> Tensor:
        """[B] indices into the prompts -> one random picture each, [B, C, H, W]."""
        pick = (torch.rand(len(index), generator=generator) * self.num_layouts[index]).long()
        slot = self.layouts[index, pick]
        chosen = self.colours[index]
        anything = torch.randint(len(COLOURS), chosen.shape, generator=generator)
        chosen = torch.where(chosen < 0, anything, chosen)
        which = (slot - 1).clamp(min=0)
        colours = chosen.gather(1, which).where(slot > 0, len(COLOURS))
        places = torch.randint(self.table.shape[2], slot.shape, generator=generator)
        cells = self.table[colours, self.shapes[index].gather(1, which), places]
        return cells.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
