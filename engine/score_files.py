"""``densegrpo rewards`` and ``densegrpo score``: what rewards there are, and what they say of image files."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .data import Prompt
from .knobs import Option
from .prompts import parse
from .protocols import Reward, RewardBatch
from .rewards import (
    COMMON,
    MODEL_REWARDS,
    OTHER_REWARDS,
    REWARDS,
    VARIANTS,
    ask,
    make_panel,
    reward_class,
    reward_options,
)
from .rewards.files import ROOTS_VARIABLE, described, listed, missing, roots

PART = 32
"""Images that are read and scored at once."""


@dataclass(frozen=True, slots=True)
class FileScores:
    """Scores of N files."""

    files: Sequence[str]
    scores: Mapping[str, Sequence[float]]
    """Reward, or reward/detail -> [N]; NaN = no score."""
    reasons: Sequence[str]
    """Why scores are missing."""

    def table(self) -> str:
        """One line per file, one column per score."""
        rows = [["image", *self.scores]]
        rows += [[file, *(f"{v[i]:.4f}" for v in self.scores.values())] for i, file in enumerate(self.files)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )


def reward_list() -> str:
    """Every reward: its meaning, options and files, and whether they are installed."""
    folders = f"Reward models are looked for in {listed(roots())}; add folders with {ROOTS_VARIABLE} (environment)."
    return "\n\n".join([folders, *(reward_entry(name) for name in (*REWARDS, *MODEL_REWARDS, *OTHER_REWARDS))])


def reward_entry(name: str) -> str:
    """The lines of one reward."""
    kind = reward_class(name)
    lines = [f"{name}: {(kind.__doc__ or '').strip().splitlines()[0]}"]
    if reward_options(name):
        lines.append(f"    options: {', '.join(reward_options(name))}")
    if name in REWARDS or getattr(kind, "interactive", False):
        return "\n".join([*lines, "    installed: it needs no files"])
    if getattr(kind, "remote", False):
        return "\n".join([*lines, "    installed: it needs a server, whose address is an option"])
    reward = kind()
    lines += [f"    needs {need.folder}: {described(need)}" for need in reward.needs() if not missing(need)]
    gaps = [gap for need in reward.needs() if (gap := missing(need))] or reward.validate([], [])
    return "\n".join([*lines, *([f"    not installed: {gap}" for gap in gaps] or ["    installed"])])


def parse_reward(text: str) -> dict[str, Any]:
    """``name:option=value,...`` -> the configuration of a reward; the name may be a label of the menu.

    A comma belongs to the value unless ``option=`` follows it. What cannot be written so can be a JSON object, as in a
    configuration. Raises ValueError for what cannot be read; wrong names and values are refused when it is made.
    """
    if text.startswith("{"):
        return object_of(text)
    name, _, rest = text.partition(":")
    entry = dict(VARIANTS.get(name, {"name": name}))
    known = reward_options(entry["name"])
    for part in filter(None, (p.strip(", ") for p in re.split(r",(?=\s*[a-z]\w*\s*=)", rest))):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(
                f"--reward {text}: {part!r} must be OPTION=VALUE; {name} has: {', '.join(known) or 'none'}"
            )
        entry[key.strip()] = typed(value.strip(), known.get(key.strip()))
    return entry


def object_of(text: str) -> dict[str, Any]:
    """The configuration of a reward that is a JSON object. Raises ValueError."""
    try:
        entry = json.loads(text)
    except ValueError as problem:
        raise ValueError(
            f"--reward {text} is not JSON: {problem}; where the shell takes quotation marks away, as Windows' does, "
            'write "{\\"name\\": \\"brightness\\"}"'
        ) from None
    if not isinstance(entry.get("name"), str):
        raise ValueError(f'--reward {text} must have a "name", such as {{"name": "brightness"}}')
    return entry


def typed(value: str, option: Option | None) -> Any:
    """The text as the option's type where that is possible."""
    if option is None or option.kind is str:
        return value
    if option.kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    try:
        return option.kind(value)
    except ValueError:
        return value


def score_files(files: Sequence[Path], prompts: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> FileScores:
    """Score image files with one prompt for all, or one for each.

    A file that cannot be read, or a reward that fails, gives NaN and a reason. Raises ValueError when prompts do not
    fit the files or a reward cannot use them. A prompt may be a line of a .jsonl file, with metadata.
    """
    if len(prompts) not in (1, len(files)):
        raise ValueError(f"{len(files)} images need one --prompt, or {len(files)} of them; got {len(prompts)}")
    texts = [parse(text, "--prompt") if text.startswith("{") else Prompt(text, {}) for text in prompts]
    texts *= len(files) if len(prompts) == 1 else 1
    refuse_what_runs_have(entries)
    panel = make_panel(entries)
    members = [(one.label, one.reward) for one in panel.members]
    if panel.interactive:
        raise ValueError("people's votes are asked for in training only; score images with another reward")
    panel.validate(texts)
    scores: dict[str, Tensor] = {label: torch.full((len(files),), torch.nan) for label, _ in members}
    reasons: list[tuple[int, str]] = []
    for rows, images in parts(files, reasons):
        batch = RewardBatch(images, [texts[i].text for i in rows], [texts[i].metadata for i in rows])
        for label, reward in members:
            score_part(label, reward, batch, rows, scores, reasons)
    columns = [column for label, _ in members for column in scores if f"{column}/".startswith(f"{label}/")]
    named = [f"{files[i]}: {reason}" for i, reason in sorted(reasons)]
    return FileScores([str(file) for file in files], {c: scores[c].tolist() for c in columns}, named)


def refuse_what_runs_have(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for options that only mean something in training."""
    wrong = [name for entry in entries for name in entry if name in COMMON]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} belongs to the rewards of a run; scores of files are shown as they are")


def score_part(
    label: str,
    reward: Reward,
    batch: RewardBatch,
    rows: Sequence[int],
    scores: dict[str, Tensor],
    reasons: list[tuple[int, str]],
) -> None:
    """Write one reward's scores of a few files into ``scores`` and ``reasons``."""
    found = ask(label, reward, batch)
    for column, values in {label: found.scores, **{f"{label}/{k}": v for k, v in found.details.items()}}.items():
        empty = torch.full_like(scores[label], torch.nan)
        scores.setdefault(column, empty)[list(rows)] = values.detach().float().cpu()
    reasons += [(rows[i], f"{label}: {reason}") for i, reason in found.errors.items()]


def parts(files: Sequence[Path], reasons: list[tuple[int, str]]) -> Iterator[tuple[list[int], Tensor]]:
    """Neighbours of equal size, ``PART`` at most: (their numbers, images [B, 3, H, W]); says which are unreadable."""
    rows: list[int] = []
    images: list[Tensor] = []
    for number, file in enumerate(files):
        try:
            image = read_image(file)
        except ValueError as problem:
            reasons.append((number, str(problem)))
            continue
        if rows and (image.shape != images[0].shape or len(rows) == PART):
            yield rows, torch.stack(images)
            rows, images = [], []
        rows.append(number)
        images.append(image)
    if rows:
        yield rows, torch.stack(images)


def read_image(file: Path) -> Tensor:
    """[3, H, W] in 0..1, upright. Raises ValueError for a file that is no image, or one whose colours are unclear."""
    if file.is_dir():
        raise ValueError(f"it is a folder; name the files in it, such as {file / '*.png'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I") or image.mode == "F":
                    raise ValueError(f"it has more than 8 bits per colour (mode {image.mode}); save it with 8 bits")
                if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                    raise ValueError("it is transparent in places; put it on a background first")
                pixels = np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise ValueError(f"cannot be read as an image ({problem})") from None
    return torch.from_numpy(pixels.copy()).movedim(-1, 0).float() / 255
