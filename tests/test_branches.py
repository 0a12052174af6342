"""Branches of an ODE trunk: TempFlow-GRPO and G2RPO, against brute force."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from densegrpo.engine.data import Advantages, Prompt, StepRewards
from densegrpo.engine.distributed import Solo
from densegrpo.engine.explore import Branches
from densegrpo.engine.kernels import CPS, EULER_MARUYAMA
from densegrpo.engine.lora import LoraSettings
from densegrpo.engine.models import load_model
from densegrpo.engine.probe import EveryState, FinalImage, Granularities, every_nth
from densegrpo.engine.randomness import Purpose, normal
from densegrpo.engine.recipes import make_recipe
from densegrpo.engine.rollout import finish_by_ode, rollout
from densegrpo.engine.schedule import constant_rate, flow_rate, shifted_linear
from densegrpo.engine.train import assign
from densegrpo.engine.update import batches, learn
from gaussian_flow import GaussianFlow
from hypothesis import given, settings
from hypothesis import strategies as st
from method_variants import Recording, one_iteration, small

SHAPE, KEY = (3, 4, 4), (5, 1, 2)


def branches_of(num_steps=6, rate=None, **options):
    """(plan of one prompt, sigmas)."""
    sigmas = shifted_linear(num_steps)
    return Branches(**options)(SHAPE, (rate or flow_rate(0.7))(sigmas), KEY), sigmas


def sample(probe, kernel=EULER_MARUYAMA, num_steps=6, **options):
    """(model, cond, trajectory, finals)."""
    model = GaussianFlow()
    model.lora.up[0].data.fill_(0.5)
    # With CPS a rate is a share.
    plan, sigmas = branches_of(num_steps, constant_rate(0.7) if kernel is CPS else None, **options)
    cond = model.encode(["abc"])
    return model, cond, *rollout(model, cond, plan, sigmas, kernel, probe)


def by_brute_force(model, cond, plan, sigmas, kernel, b, stride=1):
    """(state it branches from, state after its noise, image) of chain ``b``, all by itself."""
    prompt = plan.prompt[b : b + 1]
    (k,) = plan.rate[b].nonzero().flatten().tolist()
    trunk = finish_by_ode(model, cond, plan.noise[b : b + 1], sigmas[: k + 1], prompt)
    velocity = model.velocity(trunk, sigmas[k : k + 1], cond, prompt)
    mean, std = kernel.step(trunk, velocity, sigmas[k : k + 1], sigmas[k + 1 : k + 2], plan.rate[b, k : k + 1])
    child = mean + std * normal(SHAPE, Purpose.STEP, *KEY, chain=b, step=k)
    route = [*range(k + 1, len(sigmas) - 1, stride), len(sigmas) - 1]
    return trunk[0], child[0], finish_by_ode(model, cond, child, sigmas[route], prompt)[0]


def test_every_seed_branches_at_every_first_step_into_a_group():
    """3 seeds, 2 of 5 steps, 4 children: in this order."""
    plan, sigmas = branches_of(5, group_size=4, num_seeds=3, branch_share=0.4)
    assert len(plan.root) == 3 * 2 * 4
    assert plan.root.tolist() == [seed for seed in range(3) for _ in range(8)]
    steps = plan.rate.gt(0).int().argmax(1)
    assert steps.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 3
    assert plan.rate.gt(0).sum(1).tolist() == [1] * 24
    assert torch.equal(plan.rate.amax(1), flow_rate(0.7)(sigmas)[steps])
    assert torch.equal(plan.train, plan.rate > 0)
    assert [len(plan.noise[plan.root == seed].flatten(1).unique(dim=0)) for seed in range(3)] == [1, 1, 1]
    assert len(plan.noise.flatten(1).unique(dim=0)) == 3


@given(
    num_steps=st.integers(2, 20),
    share=st.floats(0.01, 1.0),
    num_seeds=st.integers(1, 4),
    group_size=st.integers(2, 5),
    across=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_branches_of_one_step_are_compared_in_one_seed_or_across_all(num_steps, share, num_seeds, group_size, across):
    """Group keys: prompt, seed and step; or prompt and step."""
    plan, _ = branches_of(
        num_steps, group_size=group_size, num_seeds=num_seeds, branch_share=share, across_seeds=across
    )
    steps = plan.rate.gt(0).int().argmax(1).tolist()
    places = min(max(1, int(share * num_steps)), num_steps - 1)
    assert set(steps) == set(range(places))
    keys = list(zip(steps, [0] * len(steps) if across else plan.root.tolist(), strict=True))
    assert len(set(zip(keys, plan.group.tolist(), strict=True))) == len(set(keys)) == len(plan.group.unique())
    sizes = plan.group.bincount()
    assert (sizes == group_size * (num_seeds if across else 1)).all()
    assert len(plan.seed.unique()) == len(plan.seed), "every branch has its own noise"


@pytest.mark.parametrize("kernel", [EULER_MARUYAMA, CPS], ids=["sde", "cps"])
def test_every_branch_is_what_it_would_be_alone(kernel):
    model, cond, traj, finals = sample(FinalImage(), kernel, group_size=3, num_seeds=2)
    for b in range(len(traj.plan.root)):
        trunk, child, image = by_brute_force(model, cond, traj.plan, traj.sigmas, kernel, b)
        k = int(traj.plan.rate[b].argmax())
        torch.testing.assert_close(traj.states[b, k], trunk, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(traj.states[b, k + 1], child, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(finals.latents[finals.index[0, b, -1]], image, atol=1e-6, rtol=1e-6)
    assert len(finals.latents) == len(traj.plan.root)


@pytest.mark.parametrize("strides", ["1, 2, 3", "2", "3, 1"])
def test_every_granularity_is_what_it_would_be_alone(strides):
    """Of each branch only the state after its noise is finished, once on each grid."""
    probe = Granularities(strides=strides)
    model, cond, traj, finals = sample(probe, num_steps=9, group_size=2, num_seeds=2, branch_share=0.5)
    for b in range(len(traj.plan.root)):
        k = int(traj.plan.rate[b].argmax())
        for g, stride in enumerate(map(int, strides.split(","))):
            *_, image = by_brute_force(model, cond, traj.plan, traj.sigmas, EULER_MARUYAMA, b, stride)
            torch.testing.assert_close(finals.latents[finals.index[g, b, k + 1]], image, atol=1e-6, rtol=1e-6)
    scored = torch.zeros(traj.plan.rate.shape[0], 10, dtype=torch.bool)
    scored[:, 1:] = traj.plan.rate > 0
    assert torch.equal((finals.index[..., :-1] >= 0).all(0), scored[:, :-1])


def test_siblings_share_their_trunk_and_nothing_else():
    _, _, traj, _ = sample(EveryState(), group_size=3, num_seeds=2)
    plan = traj.plan
    for g in plan.group.unique():
        (rows,) = (plan.group == g).nonzero(as_tuple=True)
        k = int(plan.rate[rows[0]].argmax())
        assert (traj.states[rows, : k + 1] == traj.states[rows[:1], : k + 1]).all()
        assert len(traj.states[rows, k + 1].flatten(1).unique(dim=0)) == 3


def test_every_state_of_a_branch_can_be_probed():
    """States before its noise lie on the trunk: one image per seed serves them all."""
    model, cond, traj, finals = sample(EveryState(), group_size=3, num_seeds=2)
    for k in range(7):
        expected = finish_by_ode(model, cond, traj.states[:, k], traj.sigmas[k:], traj.plan.prompt)
        torch.testing.assert_close(finals.latents[finals.index[0, :, k]], expected, atol=1e-5, rtol=1e-5)


TAILS = {
    1: [15, 14, 13, 12, 11, 10, 9, 8],
    2: [8, 7, 7, 6, 6, 5, 5, 4],
    3: [5, 5, 5, 4, 4, 4, 3, 3],
}


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_strided_grids_take_as_many_steps_as_in_the_authors_code(stride):
    """After branches at steps 0..7 of 16; in all 92, 48 and 33."""
    lengths = [len(every_nth(stride)(k + 1, 16)) - 1 for k in range(8)]
    assert lengths == TAILS[stride]
    assert sum(lengths) == {1: 92, 2: 48, 3: 33}[stride]


@given(stride=st.integers(1, 16), num_steps=st.integers(1, 40), k=st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_strided_grids_start_at_their_state_and_end_at_the_image(stride, num_steps, k):
    k = min(k, num_steps)
    route = every_nth(stride)(k, num_steps)
    assert (route[0], route[-1]) == (k, num_steps)
    hops = [b - a for a, b in pairwise(route)]
    assert all(hop == stride for hop in hops[:-1])
    assert all(0 < hop <= stride for hop in hops[-1:])


def test_each_granularity_and_reward_is_normalised_by_itself_and_then_added():
    """A = sum over granularities and rewards of weight * z, clipped after the sum."""
    recipe = small("g2rpo", {"strides": "1, 2"})
    found = one_iteration(recipe)
    plan, rewards = found.traj.plan, found.rewards
    assert rewards.values.shape[0] == 2 * 2
    for b in range(len(plan.root)):
        k = int(plan.rate[b].argmax())
        siblings = ((plan.group == plan.group[b]) & (plan.rate[:, k] > 0)).nonzero().flatten()
        assert len(siblings) == 4
        total = 0.0
        for view in range(4):
            scores = [float(rewards.values[view, i, k + 1]) for i in siblings.tolist()]
            mean = sum(scores) / 4
            std = (sum((s - mean) ** 2 for s in scores) / 4) ** 0.5
            total += float(rewards.weights[view]) * (float(rewards.values[view, b, k + 1]) - mean) / (std + 1e-8)
        assert float(found.advantages.values[b, k]) == pytest.approx(max(-5, min(5, total)), abs=2e-3)


def test_a_granularity_with_large_rewards_does_not_drown_the_others():
    recipe = make_recipe("g2rpo", group_size=4, strides="1, 2", branch_share=0.34)
    plan = recipe.plan(SHAPE, shifted_linear(6), KEY)
    values = torch.full((2, len(plan.root), 7), torch.nan)
    scores = torch.randn(2, len(plan.root), generator=torch.Generator().manual_seed(0))
    steps = plan.rate.argmax(1)
    for view in range(2):
        values[view, torch.arange(len(steps)), steps + 1] = scores[view]
    loud = values * torch.tensor([1.0, 1000.0])[:, None, None]
    found = [assign(recipe, StepRewards(v, torch.ones(2)), plan, Solo())[1].values for v in (values, loud)]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("across_seeds", [False, True])
def test_tempflow_compares_branches_of_one_step_in_one_seed_or_across_all(across_seeds):
    recipe = small("tempflow_grpo", {"across_seeds": across_seeds, "std_eps": 0.0})
    found = one_iteration(recipe, num_prompts=1)
    plan, final = found.traj.plan, found.rewards.values[..., -1]
    for b in range(len(plan.root)):
        k = int(plan.rate[b].argmax())
        same = (plan.rate[:, k] > 0) & ((plan.root == plan.root[b]) | across_seeds)
        assert same.sum() == (8 if across_seeds else 4)
        peers = final[:, same]
        score = (final[:, b] - peers.mean(1)) / peers.std(1, correction=0)
        expected = float((score * found.rewards.weights).sum().clamp(-5, 5))
        assert float(found.advantages.values[b, k]) == pytest.approx(expected, abs=1e-3)
        assert found.advantages.values[b].nonzero().flatten().tolist() in ([k], [])


PROMPTS = [Prompt("a red circle", {}), Prompt("two blue squares", {})]


@pytest.mark.parametrize("name", ["tempflow_grpo", "g2rpo"])
def test_sharing_the_training_forward_of_siblings_changes_no_gradient(name):
    """Against one evaluation per child: the same states, but every chain has its own root number."""
    gradients, evaluated = [], []
    for shared in (True, False):
        model = load_model("demo", LoraSettings(rank=2, alpha=4.0), 0)
        for i, up in enumerate(model.lora.up):
            up.data = torch.randn(up.shape, generator=torch.Generator().manual_seed(i)) * 0.05
        recipe = small(name, {})
        sigmas, cond = model.schedule(4), model.encode([p.text for p in PROMPTS])
        plan = recipe.plan(model.latent_shape, sigmas, KEY)
        traj, _ = rollout(model, cond, plan, sigmas, recipe.noise.step, FinalImage())
        if not shared:
            traj = replace(traj, plan=replace(plan, root=torch.arange(len(plan.root))))
        evaluated.append(sum(len(b.state_chain) for b in batches(traj, plan.train, 8)))
        values = torch.randn(plan.train.shape, generator=torch.Generator().manual_seed(0)) * plan.train
        learner = Recording(model)
        learn(model, cond, traj, Advantages(values, plan.train), recipe, learner, Solo(), 8)
        gradients.append(torch.cat(learner.gradients))
    assert evaluated[1] == 4 * evaluated[0]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert gradients[0].abs().max() > 1e-3
