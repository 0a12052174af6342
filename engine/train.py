"""The training loop: data flows top to bottom."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, cast

import torch
from torch import Tensor

from .advantage import ranked
from .data import Advantages, Finals, Plan, Prompt, Stats, StepRewards, Trajectory, join, join_rollouts
from .distributed import Solo, World, gather_texts
from .knobs import Knob, flag
from .learner import Learner
from .probe import collect, submit
from .protocols import FlowModel
from .randomness import Purpose, rng
from .recipes import Recipe
from .reward_stats import reward_stats
from .rewards import Panel, Scored
from .rollout import rollout
from .update import learn

MOST_SKIPPED = 5
"""Iterations in a row that people may pass over, or miss, before the run ends, to be resumed."""


class RewardError(RuntimeError):
    """Too few images could be scored."""


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
    max_missing: Annotated[
        float, Knob(0.0, 1.0, "end the run, to be resumed, when a larger share of an iteration's images has no score")
    ] = 0.5
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
    """Why images got no score: one reason of each process that has any."""


class Sampled(NamedTuple):
    """The policy's images of one iteration and what they are worth."""

    trajectory: Trajectory
    finals: Finals
    rewards: StepRewards
    scored: Scored
    images: Tensor
    """[B, 3, H, W] of the chains' ends."""


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
    ``learner`` is as it was after the last whole iteration. Raises RewardError when too few images of an
    iteration could be scored.
    """
    world = world or Solo()
    counted = Counted(model)
    model, idle = cast(FlowModel, counted), 0
    sigmas = model.schedule(settings.num_steps)
    while learner.iteration < settings.iterations:
        clock, counted.evaluations = Clock(model.device), 0
        plans = make_plans(model, recipe, sigmas, settings, len(prompts), learner.iteration, world)
        traj, finals, rewards, scored, images = sample(
            model, cond, plans, sigmas, prompts, panel, recipe, settings, clock
        )
        plan, last = traj.plan, finals.index[0, :, -1]
        if settings.shuffle_rewards:
            rewards = shuffled(rewards, plan)
        errors = gather_texts(world, scored.errors[:1])
        complain_if_unscored(world, rewards, scored, errors, settings.max_missing, learner.iteration + 1)
        idle = idle + 1 if bool(scored.skipped.all()) else 0
        if idle == MOST_SKIPPED:
            raise RewardError(f"nobody voted in {idle} iterations in a row; when somebody is there, resume the run")
        credit, advantages = assign(recipe, rewards, plan, world)
        with clock("update"), learner.all_or_nothing():
            stats = learn(model, cond, traj, advantages, recipe, learner, world, settings.train_batch)
            learner.iteration += 1
        ends = {label: scored.by_reward[label][last] for label in panel.labels}
        passed_over = {label: found[last] for label, found in scored.passed_over.items()}
        stats = reward_stats(rewards, credit, advantages, plan, ends, passed_over, world) | stats | clock.stats()
        stats["evaluations"] = float(world.sum(torch.tensor(counted.evaluations, device=model.device)))
        stats["processes"] = float(world.size)
        texts = [prompts[i].text for i in plan.prompt.tolist()]
        yield Iteration(learner.iteration, stats, images, texts, rewards, errors)


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


def sample(
    model: FlowModel,
    cond: Any,
    plans: Sequence[Plan],
    sigmas: Tensor,
    prompts: Sequence[Prompt],
    panel: Panel,
    recipe: Recipe,
    settings: TrainSettings,
    clock: "Clock",
) -> Sampled:
    """Roll out the plans of single groups, together; one by one when somebody else scores them meanwhile."""
    chunk, rollouts, images = settings.sample_batch, [], []
    with panel.scoring() as scoring:
        for part in [[plan] for plan in plans] if panel.remote else [plans]:
            with clock("rollout"):
                rollouts.append(rollout(model, cond, join(part), sigmas, recipe.noise.step, recipe.probe, chunk))
            images.append(submit(model, rollouts[-1][1], prompts, scoring, chunk, clock))
        traj, finals = join_rollouts(join(plans), rollouts)
        with clock("reward"):
            return Sampled(traj, finals, *collect(finals, torch.cat(images), scoring))


def make_plans(
    model: FlowModel,
    recipe: Recipe,
    sigmas: Tensor,
    settings: TrainSettings,
    num_prompts: int,
    iteration: int,
    world: World,
) -> list[Plan]:
    """The groups of an iteration that belong to this process: every ``world.size``-th prompt slot."""
    picks = pick_prompts(num_prompts, settings.groups, settings.seed, iteration)
    slots = range(world.rank, settings.groups, world.size)
    if not slots:
        raise ValueError(f"{settings.groups} groups cannot be shared by {world.size} processes; raise groups")
    plans = [recipe.plan(model.latent_shape, sigmas, (settings.seed, iteration, slot)) for slot in slots]
    return [
        replace(plan, prompt=torch.full_like(plan.prompt, picks[slot])) for plan, slot in zip(plans, slots, strict=True)
    ]


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
    everyone = ranked(replace(rewards, values=world.gather(rewards.values, 1)[:, order]), group)
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


def complain_if_unscored(
    world: World, rewards: StepRewards, scored: Scored, errors: Sequence[str], most: float, number: int
) -> None:
    """Raise RewardError when too many images of this iteration have no score; skipped ones do not count.

    ``errors``: reasons of all processes.
    """
    failed = scored.scores.isnan().any(0) & ~scored.skipped
    usable = rewards.values.isfinite().all(0).sum()
    count = torch.stack([failed.sum(), torch.tensor(len(failed)), scored.skipped.sum(), usable.cpu()])
    num_failed, num_images, num_skipped, num_usable = world.sum(count.to(rewards.values.device)).tolist()
    if num_failed > most * num_images or (num_usable == 0 and num_skipped == 0):
        reason = errors[0] if errors else "a reward gave NaN"
        raise RewardError(
            f"iteration {number}: {num_failed} of {num_images} images could not be scored ({reason}); mend the "
            "reward, then resume the run"
        )


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
