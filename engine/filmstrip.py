"""One group, step by step: what each state becomes when it is finished by ODE, and what that is worth."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Prompt, join
from .pictures import grid, to_tensor
from .probe import score
from .protocols import FlowModel
from .recipes import Recipe
from .rewards import Panel
from .rollout import rollout


class Filmstrip(NamedTuple):
    """A group of G chains with K scored states each."""

    picture: Tensor
    """[1, H, W, 3] one row per chain, one column per scored state (ComfyUI's IMAGE)."""
    rewards: Tensor
    """[G, K]"""
    report: str
    """The rewards as text."""


def look(
    model: FlowModel,
    cond: Any,
    prompt: Prompt,
    panel: Panel,
    recipe: Recipe,
    *,
    num_steps: int,
    seed: int,
    batch: int,
    chains: int = 8,
) -> Filmstrip:
    """Sample one group as training would, without any update; ``cond`` is that of ``prompt``.

    Draws at most ``chains`` chains. Under each picture stands its reward and what the step before added.
    """
    sigmas = model.schedule(num_steps)
    plan = join([recipe.plan(model.latent_shape, sigmas, (seed, 0, 0))])
    _, finals = rollout(model, cond, plan, sigmas, recipe.noise.step, recipe.probe, batch)
    panel.validate([prompt])
    rewards, _, _ = score(model, finals, [prompt], panel, batch, untimed)
    weights = rewards.weights[: len(panel.weights)]
    values = torch.einsum("m,mbk->bk", weights, rewards.values[: len(weights)])
    scored = finals.index[0, 0] >= 0
    states = scored.nonzero().flatten().tolist()
    table = values[:, scored]
    shown = finals.index[0, :chains][:, scored].flatten()
    images = torch.cat([model.decode(part).cpu() for part in finals.latents[shown].split(batch)])
    captions = [caption(row, i, states) for row in table[:chains] for i in range(len(states))]
    picture = to_tensor(grid(images, captions, columns=len(states), smallest=96)).movedim(0, -1)[None]
    lines = [f"state {k} of {num_steps}: mean reward {table[:, i].nanmean():.3f}" for i, k in enumerate(states)]
    return Filmstrip(picture, table, "\n".join(lines))


def caption(row: Tensor, column: int, states: Sequence[int]) -> str:
    """Reward of a state, and its gain over the state before."""
    text = f"{states[column]}: {row[column]:.2f}"
    return text if column == 0 else f"{text} ({row[column] - row[column - 1]:+.2f})"


def untimed(part: str) -> AbstractContextManager[None]:
    """Nobody asks for the time."""
    return nullcontext()
