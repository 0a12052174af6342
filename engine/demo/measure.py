"""Measure the demo model on its held-out prompts: ``python -m densegrpo.engine.demo.measure``.

Prints and writes ``base_scores.json``: strict and partial correctness and the dense score, over all prompts and
by tag, of ODE images with the schedule and steps of the demo run.
"""

import json
from pathlib import Path

import torch

from ..distributed import Solo
from ..evaluate import evaluate
from ..lora import LoraSettings
from ..models.tiny import DEMO_FILES, DemoSettings
from ..prompts import load_prompts
from ..rewards import Panel, make_reward

SCORES = ("strict", "partial", "dense")


def measure(images_per_prompt: int = 16, num_steps: int = 8) -> dict[str, dict[str, float]]:
    """Tag (or ``all``) -> mean scores and number of images."""
    prompts = load_prompts("demo:held_out", Path())
    model = DemoSettings().load(LoraSettings(rank=1), 0)
    panel = Panel([(score, make_reward("shapes", score=score), 1.0) for score in SCORES])
    cond = model.encode([p.text for p in prompts])
    result = evaluate(
        model, cond, prompts, panel, Solo(), num_steps=num_steps, images_per_prompt=images_per_prompt, batch=256
    )
    tags = [p.metadata["tag"] for p in prompts for _ in range(images_per_prompt)]
    table = {}
    for tag in ("all", *dict.fromkeys(tags)):
        chosen = torch.tensor([tag in ("all", t) for t in tags])
        table[tag] = {name: round(values[chosen].mean().item(), 3) for name, values in result.scores.items()}
        table[tag]["images"] = int(chosen.sum())
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)
    text = json.dumps(measure(), indent=2)
    (DEMO_FILES / "base_scores.json").write_text(text + "\n", encoding="utf-8")
    print(text)  # noqa: T201
