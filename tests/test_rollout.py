"""Sampling and probing in one wave: the same numbers as one by one, no evaluation wasted, independent noise."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from densegrpo.engine.data import Prompt, distinct, join
from densegrpo.engine.explore import Chains
from densegrpo.engine.kernels import CPS, EULER_MARUYAMA
from densegrpo.engine.probe import EveryState, FinalImage, at_most, full, score
from densegrpo.engine.randomness import Purpose, normal, rng
from densegrpo.engine.recipes import RECIPES, make_recipe
from densegrpo.engine.rewards import Panel, make_reward
from densegrpo.engine.rollout import finish_by_ode, rollout
from densegrpo.engine.schedule import constant_rate, flow_rate, shifted_linear
from gaussian_flow import GaussianFlow
from hypothesis import given, settings
from hypothesis import strategies as st

PROMPTS = [Prompt("a", {}), Prompt("bbbbbbbbbbbbbbbbbbbb", {})]
every_recipe = pytest.mark.parametrize("name", sorted(RECIPES))


FINAL = FinalImage()


class EveryGrid(NamedTuple):
    """Probes every state on chosen grids."""

    grids: tuple
    tail_solver: str = "euler"

    def states(self, plan):
        return EveryState().states(plan)


def make_plan(explore, num_steps, num_prompts=2, shape=(3, 4, 4)):
    """One group for each prompt."""
    plans = [explore(shape, shifted_linear(num_steps), (0, 0, slot)) for slot in range(num_prompts)]
    return join([replace(p, prompt=torch.full_like(p.prompt, i)) for i, p in enumerate(plans)])


def sample(explore, probe=FINAL, num_steps=6, num_prompts=2, kernel=EULER_MARUYAMA, chunk=10_000):
    """(model, cond, trajectory, finals) with a LoRA that is not zero."""
    model = GaussianFlow()
    model.lora.up[0].data.fill_(0.5)
    cond = model.encode([p.text for p in PROMPTS])
    plan = make_plan(explore, num_steps, num_prompts)
    traj, finals = rollout(model, cond, plan, shifted_linear(num_steps), kernel, probe, chunk)
    return model, cond, traj, finals


def chains(group_size=3, rate=None, **options):
    """Chains with their noise rates: (latent shape, noise levels, key) -> plan."""
    explore = Chains(group_size=group_size, **options)
    return lambda shape, sigmas, key: explore(shape, (rate or flow_rate(0.7))(sigmas), key)


def finished(finals):
    """[S, B, T+1, C, H, W] the latent that finishes each state."""
    return finals.latents[finals.index]


def one_by_one(model, cond, traj, grid):
    """[B, T+1, ...] each state finished by its own ODE."""
    num_steps = len(traj.sigmas) - 1
    prompt = traj.plan.prompt
    routes = [list(grid(k, num_steps)) for k in range(num_steps + 1)]
    ends = [finish_by_ode(model, cond, traj.states[:, k], traj.sigmas[r], prompt) for k, r in enumerate(routes)]
    return torch.stack(ends, 1)


def test_the_trunk_that_chains_share_is_found():
    plan = make_plan(chains(group_size=3, shared_noise=True, window="fixed", window_first=2, window_size=2), 6)
    sizes = [len(distinct(plan, t)[0]) for t in range(7)]
    assert sizes == [2, 2, 2, 6, 6, 6, 6]
    rows, inverse = distinct(plan, 0)
    assert rows.tolist() == [0, 3]
    assert inverse.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("shared_noise", [False, True])
@pytest.mark.parametrize("kernel", [EULER_MARUYAMA, CPS], ids=["sde", "cps"])
@pytest.mark.parametrize("grid", [full, *map(at_most, (1, 2, 3, 5))], ids=["full", "1", "2", "3", "5"])
def test_probing_in_one_wave_gives_what_probing_one_by_one_gives(grid, kernel, shared_noise):
    explore = chains(rate=constant_rate(0.5), shared_noise=shared_noise)
    model, cond, traj, finals = sample(explore, EveryGrid((grid,)), kernel=kernel)
    torch.testing.assert_close(finished(finals)[0], one_by_one(model, cond, traj, grid), atol=1e-6, rtol=1e-6)


def test_several_grids_share_the_wave():
    grids = (full, at_most(2), at_most(1))
    model, cond, traj, finals = sample(chains(), EveryGrid(grids))
    for found, grid in zip(finished(finals), grids, strict=True):
        torch.testing.assert_close(found, one_by_one(model, cond, traj, grid), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("grid", [full, at_most(2), at_most(1)], ids=["full", "2", "1"])
def test_probing_a_window_gives_what_probing_one_by_one_gives(grid):
    """After the last noisy step the chain is its own whole tail, but not a shorter one."""
    explore = chains(shared_noise=True, window="fixed", window_first=1, window_size=2)
    model, cond, traj, finals = sample(explore, EveryGrid((grid,)))
    torch.testing.assert_close(finished(finals)[0], one_by_one(model, cond, traj, grid), atol=1e-6, rtol=1e-6)


def test_the_terminal_probe_scores_each_chains_own_image():
    _, _, traj, finals = sample(chains())
    assert torch.equal(finished(finals)[0, :, -1], traj.states[:, -1])
    assert (finals.index[..., :-1] == -1).all()
    assert torch.equal(finals.prompt, traj.plan.prompt)


def test_every_final_belongs_to_the_prompt_of_its_chain():
    _, _, traj, finals = sample(chains(shared_noise=True), EveryState())
    assert (finals.prompt[finals.index] == traj.plan.prompt[None, :, None]).all()
    assert set(finals.index.flatten().tolist()) == set(range(len(finals.latents)))


@pytest.mark.parametrize(
    "probe", [FinalImage(), EveryState(), EveryState(probe_evaluations=2)], ids=["terminal", "all", "at most 2"]
)
@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_results_do_not_depend_on_the_chunk_size(probe, chunk):
    _, _, whole, all_finals = sample(chains(), probe)
    _, _, parts, finals = sample(chains(), probe, chunk=chunk)
    for name in ("states", "std", "log_prob"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-6, rtol=0)
    torch.testing.assert_close(finals.latents, all_finals.latents, atol=1e-6, rtol=0)
    assert torch.equal(finals.index, all_finals.index)


def test_calls_are_as_large_as_the_chunk_allows():
    """At step t the chains and the tails born before it: 8 (1 + t) rows."""
    model = sample(chains(group_size=4), EveryState(), num_steps=5, chunk=7)[0]
    assert model.calls == sum(math.ceil(8 * (1 + t) / 7) for t in range(5))


G, T = 24, 10


def count(probe, num_prompts=1, **exploration):
    explore = chains(group_size=G, **exploration)
    model, _, _, finals = sample(explore, probe, T, num_prompts)
    return model.evaluations, model.calls, len(finals.latents)


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_flow_grpo_costs_one_evaluation_per_step(num_prompts):
    assert count(FinalImage(), num_prompts=num_prompts) == (num_prompts * G * T, T, num_prompts * G)


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_dense_grpo_costs_what_can_be_derived_by_hand(num_prompts):
    """The first step of a probe is the chain's own velocity, and the last step is an ODE step: R_T-1 = R_T."""
    expected = (num_prompts * G * (T + T * (T - 1) // 2), T, num_prompts * G * T)
    assert expected[0] == num_prompts * 1320
    assert count(EveryState(), num_prompts=num_prompts) == expected


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_chains_that_start_alike_are_probed_once_there(num_prompts):
    """Saves (G - 1)(T - 1) evaluations of the first probe, G - 1 of the first step and G - 1 images."""
    expected = (num_prompts * 1090, T, num_prompts * (1 + G * (T - 1)))
    assert count(EveryState(), shared_noise=True, num_prompts=num_prompts) == expected


@pytest.mark.parametrize(("most", "per_chain"), [(1, 10), (2, 19), (3, 27), (5, 40), (10, 55), (64, 55)])
def test_short_probes_cost_what_can_be_derived_by_hand(most, per_chain):
    """T + sum over states of (min(n, steps left) - 1)."""
    assert per_chain == T + sum(min(most, left) - 1 for left in range(1, T + 1))
    assert count(EveryState(probe_evaluations=most)) == (G * per_chain, T, G * T)


def test_a_window_shares_the_noiseless_beginning():
    """Steps 0..3 run once, then G chains; probes are only needed up to the last noisy step."""
    window = {"shared_noise": True, "window": "fixed", "window_first": 3, "window_size": 3}
    shared = 4 + G * (T - 4)
    assert count(FinalImage(), **window) == (shared, T, G)
    # states 0..3 are on one ODE path, so they have one tail; only states 4 and 5 differ per chain
    probes = 6 + G * (5 + 4)
    assert count(EveryState(), **window) == (shared + probes, T, 1 + 2 * G + G)


def test_score_gives_every_state_the_reward_of_its_image():
    model, cond, traj, finals = sample(chains(), EveryState())
    panel = Panel([("bright", make_reward("brightness"), 1.0), ("dark", make_reward("brightness", target=0.0), 2.0)])
    rewards, scored, images = score(model, finals, PROMPTS, panel, 5, Untimed())
    ends = one_by_one(model, cond, traj, full)
    for k in range(7):
        expected = panel(model.decode(ends[:, k]), [PROMPTS[i] for i in traj.plan.prompt]).scores
        torch.testing.assert_close(rewards.values[..., k], expected, atol=1e-6, rtol=0)
    assert rewards.weights.tolist() == [1.0, 2.0]
    assert scored.scores.shape == (2, len(finals.latents))
    torch.testing.assert_close(images, model.decode(traj.states[:, -1]))


def test_views_are_ordered_grid_by_grid_and_reward_by_reward():
    model, _, _, finals = sample(chains(), EveryGrid((full, at_most(1))))
    panel = Panel([("bright", make_reward("brightness"), 1.0), ("dark", make_reward("brightness", target=0.0), 2.0)])
    rewards = score(model, finals, PROMPTS, panel, 1000, Untimed())[0]
    assert rewards.values.shape == (4, 6, 7)
    assert rewards.weights.tolist() == [1.0, 2.0, 1.0, 2.0]
    scores = panel(model.decode(finals.latents), [PROMPTS[i] for i in finals.prompt]).scores
    for view, (grid, member) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert torch.equal(rewards.values[view], scores[member][finals.index[grid]])


def test_states_that_were_not_probed_have_no_reward():
    model, _, _, finals = sample(chains())
    rewards = score(model, finals, PROMPTS, Panel([("b", make_reward("brightness"), 1.0)]), 4, Untimed())[0]
    assert rewards.values[..., :-1].isnan().all()
    assert rewards.values[..., -1].isfinite().all()


class Untimed:
    def __call__(self, part):
        return self

    def __enter__(self): ...

    def __exit__(self, *_): ...


@every_recipe
def test_the_last_step_is_never_noisy_and_never_trained(name):
    recipe = make_recipe(name, group_size=4)
    plan = make_plan(recipe.plan, 6)
    assert (plan.rate[:, -1] == 0).all()
    assert not plan.train[:, -1].any()
    assert not (plan.train & (plan.rate == 0)).any()
    assert not (plan.train & (plan.rate == 0)).any()


@every_recipe
def test_every_group_has_one_prompt_and_its_size(name):
    plan = make_plan(make_recipe(name, group_size=4).plan, 6)
    for g in plan.group.unique():
        assert (plan.group == g).sum() == 4
        assert len(plan.prompt[plan.group == g].unique()) == 1
    assert len(plan.group.unique()) == 2 * {"tempflow_grpo": 4 * 5, "g2rpo": 3}.get(name, 1)


@pytest.mark.parametrize("kernel", [EULER_MARUYAMA, CPS], ids=["sde", "cps"])
def test_only_noisy_steps_have_a_spread_and_a_density(kernel):
    _, _, traj, _ = sample(
        chains(rate=constant_rate(0.5), window="fixed", window_first=1, window_size=3), kernel=kernel
    )
    noisy = traj.plan.rate > 0
    assert noisy.any(0).tolist() == [False, True, True, True, False, False]
    assert torch.equal(traj.std > 0, noisy)
    assert torch.equal(traj.log_prob != 0, noisy)


def test_the_states_are_what_the_kernel_and_the_noise_of_each_chain_make():
    model, cond, traj, _ = sample(chains())
    plan, sigmas = traj.plan, traj.sigmas
    assert torch.equal(traj.states[:, 0], plan.noise)
    for t in range(6):
        x = traj.states[:, t]
        velocity = model.velocity(x, sigmas[t].expand(6), cond, plan.prompt)
        mean, std = EULER_MARUYAMA.step(x, velocity, sigmas[t].expand(6), sigmas[t + 1].expand(6), plan.rate[:, t])
        noise = [
            normal((3, 4, 4), Purpose.STEP, *plan.key[b], chain=int(plan.seed[b]), step=t) * (t < 5) for b in range(6)
        ]
        torch.testing.assert_close(traj.states[:, t + 1], mean + std * torch.stack(noise), atol=1e-6, rtol=0)
        torch.testing.assert_close(traj.std[:, t], std.flatten())


def test_no_noise_at_all_is_plain_ode_sampling():
    model, cond, traj, finals = sample(chains(rate=constant_rate(0.0)), EveryState())
    expected = finish_by_ode(model, cond, traj.plan.noise, traj.sigmas, traj.plan.prompt)
    torch.testing.assert_close(traj.states[:, -1], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(finished(finals)[0], expected[:, None].expand(-1, 7, -1, -1, -1), atol=1e-6, rtol=0)
    assert not traj.plan.train.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_stay_in_float32(dtype):
    model = GaussianFlow(dtype=dtype)
    plan = make_plan(chains(), 6)
    traj, finals = rollout(model, model.encode(["a", "b"]), plan, shifted_linear(6), EULER_MARUYAMA, EveryState())
    for tensor in (traj.states, traj.std, traj.log_prob, traj.sigmas, finals.latents):
        assert tensor.dtype == torch.float32
    assert not torch.equal(traj.states[:, -1], traj.states[:, -1].bfloat16().float())


def test_rollout_keeps_no_graph():
    _, _, traj, finals = sample(chains(), EveryState())
    assert not any(a.requires_grad for a in (traj.states, traj.std, traj.log_prob, finals.latents))


def test_a_chain_does_not_depend_on_the_others():
    """Bigger groups only add chains: the first ones stay as they are. The same for other prompts beside them."""
    _, _, few, _ = sample(chains(group_size=2), num_prompts=1)
    _, _, many, _ = sample(chains(group_size=5), num_prompts=1)
    _, _, beside, _ = sample(chains(group_size=2), num_prompts=2)
    torch.testing.assert_close(many.states[:2], few.states, atol=1e-6, rtol=0)
    torch.testing.assert_close(beside.states[:2], few.states, atol=1e-6, rtol=0)


def test_chains_prompts_steps_and_iterations_get_different_noise():
    _, _, traj, _ = sample(chains(shared_noise=True))
    starts = traj.plan.noise
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[3])
    assert not torch.equal(traj.states[0, 1], traj.states[1, 1])
    own = make_plan(chains(), 6).noise.flatten(1)
    assert len(own.unique(dim=0)) == 6
    first, later = (chains()((3, 4, 4), shifted_linear(6), (0, iteration, 0)).noise for iteration in (0, 1))
    assert not torch.equal(first, later)


numbers = st.tuples(*[st.integers(0, 3)] * 5)


@given(a=numbers, b=numbers, purpose=st.sampled_from(list(Purpose)), other=st.sampled_from(list(Purpose)))
@settings(max_examples=100, deadline=None)
def test_the_same_numbers_give_the_same_noise_and_others_do_not(a, b, purpose, other):
    first, second = normal((8,), purpose, *a), normal((8,), other, *b)
    assert torch.equal(first, second) == ((purpose, a) == (other, b))
    assert torch.equal(first, normal((8,), purpose, *a))


def test_noise_is_standard_normal_and_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    noise = normal((100_000,), Purpose.STEP, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert noise.dtype == torch.float32
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, 1), abs=0.01)


def test_streams_of_neighbouring_numbers_are_uncorrelated():
    streams = torch.stack([normal((4000,), Purpose.STEP, 0, chain=c, step=s) for c in range(4) for s in range(4)])
    assert (streams.corrcoef() - torch.eye(16)).abs().max() < 0.08
    assert rng(Purpose.PROMPTS, 0).random() != rng(Purpose.START, 0).random()


@given(fraction=st.floats(0.0, 1.0), num_steps=st.integers(2, 12), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_share_of_the_noisy_steps_is_trained(fraction, num_steps, seed):
    explore = chains(group_size=6, train_fraction=fraction)
    plan = explore((1, 1, 1), shifted_linear(num_steps), (seed, 0, 0))
    assert plan.train.sum(1).tolist() == [max(1, int(fraction * (num_steps - 1)))] * 6
    assert not (plan.train & (plan.rate == 0)).any()


def test_each_chain_draws_its_own_trained_steps():
    plan = chains(group_size=60, train_fraction=0.6)((1, 1, 1), shifted_linear(6), (0, 0, 0))
    assert plan.train.sum(1).tolist() == [3] * 60
    assert plan.train.any(0).tolist() == [True] * 5 + [False]
    assert len(plan.train.unique(dim=0)) > 5


def test_a_window_may_move_with_the_iteration():
    explore = chains(window="sliding", window_size=2, window_every=1)
    for iteration in (0, 2):
        plan = explore((1, 1, 1), shifted_linear(6), (0, iteration, 0))
        assert plan.train.any(0).nonzero().flatten().tolist() == [iteration, iteration + 1]


@given(k=st.integers(0, 20), num_steps=st.integers(1, 20), most=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_a_grid_goes_from_its_state_to_the_image_in_few_even_steps(k, num_steps, most):
    k = min(k, num_steps)
    route = list(at_most(most)(k, num_steps))
    assert (route[0], route[-1]) == (k, num_steps)
    assert len(route) - 1 == min(most, num_steps - k)
    hops = [b - a for a, b in pairwise(route)]
    assert all(hop > 0 for hop in hops)
    assert max(hops, default=0) - min(hops, default=0) <= 1
    assert list(full(k, num_steps)) == list(range(k, num_steps + 1))
