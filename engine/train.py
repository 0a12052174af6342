"""The training loop: data flows top to bottom."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

import torch
from torch import Tensor

from .data import Advantages, Plan, Prompt, Stats, StepRewards, join
from .distributed import Solo, World
from .knobs import Knob, flag
from .learner import Learner
from .probe import score
from .protocols import FlowModel
from .randomness import Purpose, rng
from .recipes import Recipe
from .rewards import Panel, Scored
from .rollout import rollout
from .update import learn


class RewardError(RuntimeError):
    """No image could be scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Size and length of a run."""

    iterations: Annotated[int, Knob(0, 1_000_000, "how often to sample, score and update")] = 100
    groups: Annotated[int, Knob(1, 4096, "prompts per iteration, one group each")] = 4
    num_steps: Annotated[int, Knob(2, 100, "denoising steps while training")] = 10
    seed: Annotated[int, Knob(0, 2**31 - 1, "seed of everything random")] = 0
    sample_batch: Annotated[int, Knob(1, 65536, "most latents in one sampling call; lower it when memory runs out")] = (
        64
    )
    train_batch: Annotated[int, Knob(1, 65536, "most latents in one call with gradient; the first to lower")] = 16
    shuffle_rewards: Annotated[bool, flag("control experiment: shuffle rewards inside each group")] = False


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one iteration hands to its caller."""

    number: int
    """Counted from 1."""
    stats: Stats
    images: Tensor
    """[B, 3, H, W] of this process's chains, on the CPU."""
    prompts: Sequence[str]
    """[B]"""
    rewards: StepRewards
    """Of this process's chains."""
    errors: Sequence[str]
    """Why images got no score."""


def train(
    model: FlowModel,
    cond: Any,
    prompts: Sequence[Prompt],
    panel: Panel,
    recipe: Recipe,
    learner: Learner,
    settings: TrainSettings,
    world: World | None = None,
) -> Iterator[Iteration]:
    """Yield after each iteration; the caller saves, draws, reports or stops.

    ``cond`` is ``model.encode`` of the texts of ``prompts``. When it ends by an exception, Ctrl-C included,
    ``learner`` is as it was after the last whole iteration. Raises RewardError when no image of an
    iteration could be scored.
    """
    world = world or Solo()
    counted = Counted(model)
    model = cast(FlowModel, counted)
    sigmas = model.schedule(settings.num_steps)
    while learner.iteration < settings.iterations:
        clock, counted.evaluations = Clock(model.device), 0
        plan = make_plan(model, recipe, sigmas, settings, len(prompts), learner.iteration, world)
        with clock("rollout"):
            traj, finals = rollout(model, cond, plan, sigmas, recipe.noise.step, recipe.probe, settings.sample_batch)
        rewards, scored, images = score(model, finals, prompts, panel, settings.sample_batch, clock)
        if settings.shuffle_rewards:
            rewards = shuffled(rewards, plan)
        complain_if_unscored(world, rewards, scored, learner.iteration + 1)
        credit, advantages = assign(recipe, rewards, plan, world)
        with clock("update"), learner.all_or_nothing():
            stats = learn(model, cond, traj, advantages, recipe, learner, world, settings.train_batch)
            learner.iteration += 1
        stats = reward_stats(rewards, credit, advantages, plan, world) | stats | clock.stats()
        stats["evaluations"] = float(world.sum(torch.tensor(counted.evaluations, device=model.device)))
        stats["processes"] = float(world.size)
        texts = [prompts[i].text for i in plan.prompt.tolist()]
        yield Iteration(learner.iteration, stats, images, texts, rewards, scored.errors)


class Counted:
    """A model that counts its evaluations: one latent through the network once, with or without gradient."""

    def __init__(self, model: FlowModel):
        self.model, self.evaluations = model, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Any, rows: Tensor) -> Tensor:
        """Count and pass on."""
        self.evaluations += len(x)
        return self.model.velocity(x, sigma, cond, rows)


def make_plan(
    model: FlowModel,
    recipe: Recipe,
    sigmas: Tensor,
    settings: TrainSettings,
    num_prompts: int,
    iteration: int,
    world: World,
) -> Plan:
    """The groups of an iteration that belong to this process: every ``world.size``-th prompt slot."""
    picks = pick_prompts(num_prompts, settings.groups, settings.seed, iteration)
    slots = range(world.rank, settings.groups, world.size)
    if not slots:
        raise ValueError(f"{settings.groups} groups cannot be shared by {world.size} processes; raise groups")
    plans = [recipe.plan(model.latent_shape, sigmas, (settings.seed, iteration, slot)) for slot in slots]
    chosen = [
        replace(plan, prompt=torch.full_like(plan.prompt, picks[slot])) for plan, slot in zip(plans, slots, strict=True)
    ]
    return join(chosen)


def pick_prompts(num_prompts: int, groups: int, seed: int, iteration: int) -> list[int]:
    """The prompts of an iteration: a new random order each time all have been used."""
    places = range(iteration * groups, (iteration + 1) * groups)
    orders = {e: rng(Purpose.PROMPTS, seed, e).permutation(num_prompts) for e in {p // num_prompts for p in places}}
    return [int(orders[p // num_prompts][p % num_prompts]) for p in places]


def assign(recipe: Recipe, rewards: StepRewards, plan: Plan, world: World) -> tuple[Tensor, Advantages]:
    """Credit [V, B', T] of all processes' chains, and the advantages of this process's own.

    A step is ranked among all chains that are noisy there; which of them are trained is another matter.
    """
    slot = torch.tensor([key[2] for key in plan.key])
    slots = world.gather(slot)
    # In the order of prompt slots, as one process has them: where turning points tie, order decides.
    order = slots.argsort(stable=True)
    # Processes number their groups alike; with its slot, which only one of them has, a group is unmistakable.
    names = torch.stack([slots, world.gather(plan.group)], 1)[order]
    group = names.unique(dim=0, return_inverse=True)[1]
    everyone = replace(rewards, values=world.gather(rewards.values, 1)[:, order])
    train, noisy = world.gather(plan.train)[order], world.gather(plan.rate > 0)[order]
    credit = recipe.credit(everyone, group, noisy)
    found = recipe.normalise(credit, everyone, group, noisy)
    mask = found.mask & train
    back = order.argsort()
    counts = world.gather(torch.tensor([len(slot)])).tolist()
    start = sum(counts[: world.rank])
    mine = back[start : start + len(slot)]
    return credit[:, back], Advantages(found.values.masked_fill(~mask, 0)[mine], mask[mine])


def shuffled(rewards: StepRewards, plan: Plan) -> StepRewards:
    """The same rewards, each group's handed to its chains at random: nothing can be learnt from them."""
    values = rewards.values.clone()
    for g in plan.group.unique():
        chains = (plan.group == g).nonzero().flatten()
        order = rng(Purpose.SHUFFLE, *plan.key[int(chains[0])], chain=int(g)).permutation(len(chains))
        values[:, chains] = rewards.values[:, chains[torch.from_numpy(order)]]
    return replace(rewards, values=values)


def complain_if_unscored(world: World, rewards: StepRewards, scored: Scored, number: int) -> None:
    """Raise RewardError when nothing in this iteration got a score."""
    usable = world.sum(rewards.values.isfinite().all(0).sum())
    if int(usable) == 0:
        reason = scored.errors[0] if scored.errors else "a reward gave NaN to every image"
        raise RewardError(
            f"iteration {number}: none of the {len(scored.scores[0])} images could be scored ({reason}); "
            "fix the reward, then resume the run"
        )


def reward_stats(rewards: StepRewards, credit: Tensor, advantages: Advantages, plan: Plan, world: World) -> Stats:
    """Numbers of the iteration over all processes, whose ``credit`` this is; views are added with their weights."""
    values = world.gather(rewards.values, 1)
    train, mask = world.gather(plan.train), world.gather(advantages.mask)
    slot = world.gather(torch.tensor([key[2] for key in plan.key]))
    weights = rewards.weights / rewards.weights.abs().sum().clamp(min=1e-12)
    final = torch.einsum("v,vb->b", weights, values[..., -1])
    inside = [final[slot == s].std(correction=0) for s in slot.unique() if final[slot == s].isfinite().all()]
    gains = torch.einsum("v,vbt->bt", weights, credit).masked_fill(~train, torch.nan)
    return {
        "reward": final.nanmean().item(),
        "reward_std": (final - final.nanmean()).square().nanmean().sqrt().item(),
        "group_std": torch.stack(inside).mean().item() if inside else 0.0,
        "unscored": final.isnan().float().mean().item(),
        "masked": 1 - mask.sum().item() / max(train.sum().item(), 1),
        "step_credit": nan_to_zero(gains.nanmean(0)),
        "step_credit_std": nan_to_zero((gains - gains.nanmean(0)).square().nanmean(0).sqrt()),
        "step_credit_positive": nan_to_zero((gains > 0).float().where(gains.isfinite(), torch.nan).nanmean(0)),
    }


def nan_to_zero(values: Tensor) -> list[float]:
    """Steps without credit count 0, so that the record stays plain JSON."""
    return values.nan_to_num(0).tolist()


class Clock:
    """Seconds spent per part of an iteration."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, time.monotonic()
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add what happens within it to ``part``."""
        start = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part] += time.monotonic() - start

    def stats(self) -> Stats:
        """Seconds per part and in all."""
        stats: Stats = {f"seconds_{part}": value for part, value in self.seconds.items()}
        return stats | {"seconds": time.monotonic() - self.start}


PARTS = ("rollout", "decode", "reward", "update")
