"""Try a reward on images, without any training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .data import Prompt
from .pictures import annotated
from .prompts import parse
from .rewards import VARIANTS, make_panel, make_reward


def score_images(
    images: Tensor, prompt: str, entries: Sequence[Mapping[str, Any]], mode: str
) -> tuple[Tensor, list[float], str]:
    """Score images [N, H, W, C] in 0..1 (ComfyUI's IMAGE): (the same with scores written below, scores, a report).

    ``prompt``: one for all images, or one line per image, plain or as in a .jsonl file. Raises ValueError when the
    lines do not fit the images, or a reward cannot use a prompt.
    """
    texts = [line.strip() for line in prompt.splitlines() if line.strip()] or [""]
    if len(texts) not in (1, len(images)):
        raise ValueError(f"{len(images)} images need one prompt or {len(images)} lines, got {len(texts)} lines")
    known = [parse(text, "prompt") if text.startswith("{") else Prompt(text, {}) for text in texts]
    prompts = known * (len(images) if len(known) == 1 else 1)
    panel = make_panel(entries, mode)
    panel.validate(prompts)
    pixels = images[..., :3].movedim(-1, 1).float().cpu()
    scored = panel(pixels, prompts)
    total = (panel.weights[:, None] * scored.scores).sum(0)
    rows = [
        ", ".join(f"{label} {values[i]:.3f}" for label, values in scored.by_reward.items()) for i in range(len(images))
    ]
    means = [f"{label} {values.nanmean():.3f}" for label, values in scored.by_reward.items()]
    lines = [f"mean of {len(images)}: {', '.join(means)}"] if len(images) > 1 else []
    lines += [f"{i + 1}: {row}" for i, row in enumerate(rows)]
    report = "\n".join([*lines, *dict.fromkeys(scored.errors)])
    return annotated(pixels, rows).movedim(1, -1), torch.where(total.isfinite(), total, torch.nan).tolist(), report


def missing(label: str) -> str:
    """What a reward of the menu lacks before it can be used, and how to get it; nothing when it is ready."""
    options = dict(VARIANTS[label])
    return "; ".join(make_reward(options.pop("name"), **options).validate([], []))
