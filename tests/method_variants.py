"""Every method and the variants of each that the papers or their code have, small; and one iteration of any of them."""

from typing import Any, NamedTuple

import torch
from densegrpo.engine.data import Advantages, Finals, Prompt, StepRewards, Trajectory, join
from densegrpo.engine.distributed import Solo
from densegrpo.engine.learner import Learner, OptimizerSettings
from densegrpo.engine.probe import score
from densegrpo.engine.recipes import RECIPES, make_recipe
from densegrpo.engine.rewards import Panel, make_reward
from densegrpo.engine.rollout import rollout
from densegrpo.engine.train import Clock, assign
from densegrpo.engine.update import learn
from gaussian_flow import GaussianFlow

VARIANTS = [
    *((name, {}) for name in RECIPES),
    ("flow_grpo", {"std_scope": "global", "train_fraction": 0.6}),
    ("flow_grpo_fast", {"shared_noise": True, "step_weight": "noise"}),
    ("dance_grpo", {"kernel": "cps"}),
    ("mix_grpo", {"kernel": "cps", "roll_back": False}),
    ("mix_grpo_flash", {"window": "fixed", "window_size": 2}),
    ("dense_grpo", {"probe_evaluations": 2, "shared_noise": True, "ratio": "guard", "step_weight": "inverse_step"}),
    ("dense_grpo", {"window": "sliding", "window_first": 1, "window_size": 2}),
    ("tempflow_grpo", {"across_seeds": True}),
    ("g2rpo", {"strides": "1, 2"}),
    ("g2rpo", {"strides": "2, 3", "update_per": "rollout"}),
    ("tp_grpo", {"consistent": False}),
    ("tp_grpo", {"balance": "group", "balance_by": "trend"}),
    ("tp_grpo", {"balance": "batch", "balance_by": "trend"}),
    ("tp_grpo", {"balance": "off"}),
]
NAMES = [" ".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in VARIANTS]
NUM_STEPS = 6
PROMPTS = [Prompt("a", {}), Prompt("bbbbbbbbbb", {}), Prompt("cccccccccccccccccccc", {})]


def small(name: str, options: dict[str, Any]):
    """The recipe with groups of 4. The KL pulls, so that its cost and value do not depend on batches."""
    seeds = {"num_seeds": 2} if name in ("tempflow_grpo", "g2rpo") else {}
    return make_recipe(name, group_size=4, kl_weight=0.01, **seeds, **options)


def panel() -> Panel:
    """Two rewards that pull apart."""
    return Panel([("bright", make_reward("brightness"), 1.0), ("grey", make_reward("brightness", target=0.4), 0.5)])


class Counting(GaussianFlow):
    """Counts evaluations by what they are for."""

    def __init__(self):
        super().__init__()
        self.lora.up[0].data.fill_(0.5)
        self.trained = self.reference = 0

    def velocity(self, x, sigma, cond, rows):
        """Those with gradient are counted when it arrives, those without adapter at once."""
        found = super().velocity(x, sigma, cond, rows)
        self.reference += len(x) * (not self.lora.enabled)
        if found.requires_grad:
            found.register_hook(lambda gradient: setattr(self, "trained", self.trained + len(x)))
        return found


class Recording(Learner):
    """Keeps the gradient of every optimizer step and changes nothing."""

    def __init__(self, model):
        super().__init__(model.lora, OptimizerSettings(lr=1e-8, weight_decay=0.0))
        self.gradients = []

    def step(self):
        """Keep and go on."""
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.lora.parameters()]))
        return super().step()


class Outcome(NamedTuple):
    """What one iteration made, and cost."""

    traj: Trajectory
    finals: Finals
    rewards: StepRewards
    advantages: Advantages
    gradients: list
    stats: dict
    costs: dict


def one_iteration(recipe, num_prompts=2, num_steps=NUM_STEPS, sample_batch=64, train_batch=64, iteration=0) -> Outcome:
    """Sample, score, assign, learn."""
    model = Counting()
    sigmas, cond = model.schedule(num_steps), model.encode([p.text for p in PROMPTS])
    plans = [recipe.plan(model.latent_shape, sigmas, (0, iteration, slot)) for slot in range(num_prompts)]
    for i, plan in enumerate(plans):
        plan.prompt.fill_(i)
    plan = join(plans)
    traj, finals = rollout(model, cond, plan, sigmas, recipe.noise.step, recipe.probe, sample_batch)
    costs = {"rollout": model.evaluations, "images": len(finals.latents)}
    rewards = score(model, finals, PROMPTS, panel(), sample_batch, Clock(model.device))[0]
    advantages = assign(recipe, rewards, plan, Solo())[1]
    learner = Recording(model)
    stats = learn(model, cond, traj, advantages, recipe, learner, Solo(), train_batch)
    again = model.evaluations - costs["rollout"] - model.trained - model.reference
    costs |= {"trained": model.trained, "old": again, "reference": model.reference}
    return Outcome(traj, finals, rewards, advantages, learner.gradients, stats, costs)
