"""Held-out evaluation: ODE samples from fixed noise, the same for every method and iteration."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Prompt
from .distributed import World, gather_texts
from .image_statistics import image_statistics
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
    statistics: dict[str, float]
    """Mean statistics of all images, see ``image_statistics.py``: they drift when a reward is gamed."""
    reasons: Mapping[str, str]
    """Label of each reward that could not score some images -> why, of one of them."""

    @property
    def missing(self) -> dict[str, float]:
        """Label of each of those -> share of images without a score."""
        return {label: self.scores[label].isnan().float().mean().item() for label in self.reasons}


@torch.no_grad()
def evaluate(
    model: FlowModel,
    cond: Any,
    prompts: Sequence[Prompt],
    panel: Panel | None,
    world: World,
    *,
    num_steps: int,
    images_per_prompt: int,
    batch: int,
    keep: int = 16,
) -> Evaluation:
    """Score ``images_per_prompt`` images of each prompt; noise depends on prompt and image number only.

    Without a ``panel`` the images are made all the same.
    Raises ValueError when there are fewer prompts than processes.
    """
    if len(prompts) < world.size:
        raise ValueError(f"{len(prompts)} held-out prompts cannot be shared by {world.size} processes; add some")
    sigmas = model.schedule(num_steps)
    mine = range(world.rank, len(prompts), world.size)
    shown = sorted({mine[i * len(mine) // keep] for i in range(keep)})
    work = [(p, i) for p in mine for i in range(images_per_prompt)]
    numbers, facts, kept = [], [], []
    with panel.scoring() if panel else nullcontext() as scoring:
        for start in range(0, len(work), batch):
            part = work[start : start + batch]
            noise = torch.stack([normal(model.latent_shape, Purpose.EVALUATION, 0, slot=p, chain=i) for p, i in part])
            numbers.append(torch.tensor([p for p, _ in part]))
            latents = finish_by_ode(model, cond, noise.to(model.device), sigmas, numbers[-1], batch)
            images = model.decode(latents).cpu()
            if scoring:
                scoring.add(images, [prompts[p] for p, _ in part], numbers[-1])
            facts.append(image_statistics(images))
            kept += [image for image, (p, i) in zip(images, part, strict=True) if i == 0 and p in shown]
        scored = scoring.collect() if scoring else None
    by_reward = scored.by_reward if scored else {}
    order = world.gather(torch.cat(numbers)).argsort(stable=True)
    nothing = torch.full((len(work),), torch.nan)
    # A reward that failed here has no sub-scores; all processes must gather the same names, or they wait forever.
    names = gather_texts(world, by_reward)
    scores = {name: world.gather(by_reward.get(name, nothing).float())[order] for name in names}
    statistics = {name: world.gather(torch.cat([f[name] for f in facts])).nanmean().item() for name in facts[0]}
    means = {name: values.nanmean().item() for name, values in scores.items()}
    failed = {label: gather_texts(world, own[:1]) for label, own in scored.reasons.items()} if scored else {}
    reasons = {label: found[0] for label, found in failed.items() if found}
    return Evaluation(means, scores, torch.stack(kept), shown, len(order), statistics, reasons)


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
