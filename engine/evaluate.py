"""Held-out evaluation: ODE samples from fixed noise, the same for every method and iteration."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Prompt
from .distributed import World
from .protocols import FlowModel
from .randomness import Purpose, normal
from .rewards import Panel
from .rollout import finish_by_ode


class Evaluation(NamedTuple):
    """Scores of held-out images."""

    means: dict[str, float]
    """Label of each reward -> mean over scored images."""
    scores: dict[str, Tensor]
    """Label -> [N], prompt by prompt."""
    images: Tensor
    """[K, 3, H, W] the first image of some prompts, spread over this process's list."""
    shown: list[int]
    """[K] which prompts they are of."""
    num_images: int


@torch.no_grad()
def evaluate(
    model: FlowModel,
    cond: Any,
    prompts: Sequence[Prompt],
    panel: Panel,
    world: World,
    *,
    num_steps: int,
    images_per_prompt: int,
    batch: int,
    keep: int = 16,
) -> Evaluation:
    """Score ``images_per_prompt`` images of each prompt; noise depends on prompt and image number only.

    Raises ValueError when there are fewer prompts than processes.
    """
    if len(prompts) < world.size:
        raise ValueError(f"{len(prompts)} held-out prompts cannot be shared by {world.size} processes; add some")
    sigmas = model.schedule(num_steps)
    mine = range(world.rank, len(prompts), world.size)
    shown = sorted({mine[i * len(mine) // keep] for i in range(keep)})
    work = [(p, i) for p in mine for i in range(images_per_prompt)]
    names: list[str] = []
    rows, kept = [], []
    for start in range(0, len(work), batch):
        part = work[start : start + batch]
        noise = torch.stack([normal(model.latent_shape, Purpose.EVALUATION, 0, slot=p, chain=i) for p, i in part])
        numbers = torch.tensor([p for p, _ in part])
        images = model.decode(finish_by_ode(model, cond, noise.to(model.device), sigmas, numbers, batch)).cpu()
        scored = panel(images, [prompts[p] for p, _ in part])
        names = list(scored.by_reward)
        rows.append(torch.cat([numbers[None].float(), torch.stack([scored.by_reward[n] for n in names])]))
        kept += [image for image, (p, i) in zip(images, part, strict=True) if i == 0 and p in shown]
    table = world.gather(torch.cat(rows, 1), 1)
    table = table[:, table[0].argsort(stable=True)]
    scores = dict(zip(names, table[1:], strict=True))
    means = {name: values.nanmean().item() for name, values in scores.items()}
    return Evaluation(means, scores, torch.stack(kept), shown, table.shape[1])


@torch.no_grad()
def drift(model: FlowModel, cond: Any, num_prompts: int, num_steps: int, batch: int) -> float:
    """How far the model has moved: mean squared velocity difference to the untrained one, the velocity form of KL.

    Along ODE paths of the trained model, one for each of ``num_prompts`` encoded prompts, from the same noise always:
    so methods with different steps and KL options can be compared.
    """
    sigmas, found = model.schedule(num_steps).to(model.device), []
    for prompts in torch.arange(num_prompts).split(batch):
        starts = [normal(model.latent_shape, Purpose.EVALUATION, 0, slot=p, chain=0) for p in prompts.tolist()]
        x = torch.stack(starts).to(model.device)
        for t in range(num_steps):
            sigma = sigmas[t].expand(len(x))
            velocity = model.velocity(x, sigma, cond, prompts)
            with model.lora.disabled():
                found.append((velocity - model.velocity(x, sigma, cond, prompts)).square().flatten(1).mean(1))
            x = x + velocity * (sigmas[t + 1] - sigmas[t])
    return torch.cat(found).mean().item()
