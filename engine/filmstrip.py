"""One prompt as training sees it: which images are compared, what they are worth, where the turning points are.

Axes as in ``data.py``; S grids of the probe.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .credit import TurningPoints
from .data import Finals, Plan, Prompt, StepRewards, join
from .explore import Branches
from .knobs import whole_numbers
from .pictures import grid, to_tensor
from .probe import Granularities, score
from .protocols import FlowModel
from .recipes import Recipe
from .rewards import Panel
from .rollout import rollout

ROWS, BRANCH_ROWS, COLUMNS = 8, 12, 8
UP, DOWN = (0.1, 0.65, 0.2), (0.85, 0.1, 0.1)
"""Frames after turning points: green when the reward rises from there to the end, red when it falls."""
FRAME = 1 / 24
"""Width of a frame, as a share of the picture's."""


class Filmstrip(NamedTuple):
    """What was sampled for one prompt."""

    picture: Tensor
    """[1, H, W, 3] (ComfyUI's IMAGE). Chains: a row for each, a column per scored state. Branches: a row per step."""
    rewards: Tensor
    """[S, B, T+1] weighted sum of the rewards of each state; NaN where it was not scored."""
    report: str
    """Mean rewards as text, and how many turning points there are."""


class Cell(NamedTuple):
    """One image of the picture."""

    latent: int
    caption: str
    frame: tuple[float, float, float] | None = None


def look(
    model: FlowModel, cond: Any, prompt: Prompt, panel: Panel, recipe: Recipe, *, num_steps: int, seed: int, batch: int
) -> Filmstrip:
    """Sample one prompt as training would, without any update; ``cond`` is that of ``prompt``."""
    sigmas = model.schedule(num_steps)
    plan = join([recipe.plan(model.latent_shape, sigmas, (seed, 0, 0))])
    _, finals = rollout(model, cond, plan, sigmas, recipe.noise.step, recipe.probe, batch)
    panel.validate([prompt])
    rewards, _, _ = score(model, finals, [prompt], panel, batch, untimed)
    values = rewards.values.unflatten(0, (len(finals.index), -1))
    values = torch.einsum("m,smbk->sbk", panel.weights, values)
    if isinstance(recipe.explore, Branches):
        rows, lines = branch_rows(recipe, plan, finals, values)
    else:
        rows, lines = chain_rows(recipe, plan, finals, values, rewards)
    cells = [cell for row in rows for cell in row]
    shown = finals.latents[[cell.latent for cell in cells]]
    images = torch.cat([model.decode(part).cpu() for part in shown.split(batch)])
    framed = torch.stack([with_frame(*pair) for pair in zip(images, (cell.frame for cell in cells), strict=True)])
    picture = grid(framed, [cell.caption for cell in cells], columns=len(rows[0]), smallest=96)
    return Filmstrip(to_tensor(picture).movedim(0, -1)[None], values, "\n".join(lines))


def chain_rows(
    recipe: Recipe, plan: Plan, finals: Finals, values: Tensor, rewards: StepRewards
) -> tuple[list[list[Cell]], list[str]]:
    """A row for each chain, a column for each scored state; and the mean reward of each state.

    When only one state is scored, chains stand side by side.
    """
    states = recipe.probe.states(plan)[0].nonzero().flatten().tolist()
    table, turns = values[0], turning_points(recipe, rewards, plan)
    rows = [
        [chain_cell(states, i, table[b], turns[b], finals.index[0, b]) for i in range(len(states))]
        for b in range(min(ROWS, len(table)))
    ]
    if len(states) == 1:
        rows = [[row[0] for row in rows[i : i + 4]] for i in range(0, len(rows), 4)]
    num_steps = plan.rate.shape[1]
    lines = [f"state {k} of {num_steps}: mean reward {table[:, k].nanmean():.3f}" for k in states]
    if isinstance(recipe.credit, TurningPoints):
        rest = table[:, -1:] - table[:, :-1]
        up, down = (int((turns & side).sum()) for side in (rest > 0, rest < 0))
        lines.insert(0, f"turning points: {turns.sum()} of {plan.train.sum()} noisy steps ({up} up, {down} down)")
    return rows, lines


def chain_cell(states: Sequence[int], i: int, reward: Tensor, turns: Tensor, index: Tensor) -> Cell:
    """The ``i``-th scored state of a chain: its reward, and what the step before it is paid."""
    k = states[i]
    text, latent = f"{k}: {reward[k]:.2f}", int(index[k])
    if i == 0:
        return Cell(latent, text)
    if not turns[k - 1]:
        return Cell(latent, f"{text} ({reward[k] - reward[states[i - 1]]:+.2f})")
    rest = float(reward[-1] - reward[k - 1])
    return Cell(latent, f"{text} agg {rest:+.2f}", UP if rest > 0 else DOWN)


def turning_points(recipe: Recipe, rewards: StepRewards, plan: Plan) -> Tensor:
    """[B, T] bool: marked by at least one reward; none for other ways to assign credit."""
    if isinstance(recipe.credit, TurningPoints):
        return recipe.credit.mark(rewards, plan.group, plan.rate > 0).any(0)
    return torch.zeros(plan.rate.shape, dtype=torch.bool)


def branch_rows(recipe: Recipe, plan: Plan, finals: Finals, values: Tensor) -> tuple[list[list[Cell]], list[str]]:
    """A row for each branching step and grid, siblings in it; and how far the rewards of siblings spread.

    Draws the first starting noise, and steps spread from the first to the last when not all have room. The number in
    brackets is the difference from the mean of all siblings, which is what training learns from.
    """
    step = plan.rate.gt(0).int().argmax(1)
    state = recipe.probe.states(plan).int().argmax(1)[None, :, None].expand(len(values), -1, 1)
    found, latent = (table.gather(2, state)[..., 0] for table in (values, finals.index))
    strides = whole_numbers(recipe.probe.strides) if isinstance(recipe.probe, Granularities) else ()
    names = [f", stride {n}" for n in strides] or [""]
    rows, lines = [], []
    for k in step.unique().tolist():
        groups = [plan.group == g for g in plan.group[step == k].unique()]
        siblings = groups[0].nonzero().flatten()[:COLUMNS].tolist()
        for name, reward, place in zip(names, found, latent, strict=True):
            mean = reward[groups[0]].nanmean()
            title = f"{k}{name.replace(', stride ', '/')}"
            rows.append([Cell(int(place[b]), f"{title}: {reward[b]:.2f} ({reward[b] - mean:+.2f})") for b in siblings])
            spread = torch.stack([reward[group].std(correction=0) for group in groups]).mean()
            lines.append(f"branches at step {k}{name}: mean {reward[step == k].nanmean():.3f}, spread {spread:.3f}")
    return spread_over(rows, len(names)), lines


def spread_over(rows: Sequence[list[Cell]], per_step: int) -> list[list[Cell]]:
    """At most BRANCH_ROWS of the rows, whole steps of ``per_step`` rows, the first and the last step among them."""
    num_steps = len(rows) // per_step
    room = max(1, min(num_steps, BRANCH_ROWS // per_step))
    chosen = torch.linspace(0, num_steps - 1, room).round().int().tolist()
    return [row for k in chosen for row in rows[k * per_step : (k + 1) * per_step]]


def with_frame(image: Tensor, colour: tuple[float, float, float] | None) -> Tensor:
    """[3, H, W] -> the same with a coloured edge, if any."""
    if colour is None:
        return image
    width = max(1, round(FRAME * image.shape[-1]))
    framed = torch.tensor(colour)[:, None, None].expand_as(image).clone()
    framed[:, width:-width, width:-width] = image[:, width:-width, width:-width]
    return framed


def untimed(part: str) -> AbstractContextManager[None]:
    """Nobody asks for the time."""
    return nullcontext()
