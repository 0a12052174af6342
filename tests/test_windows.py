"""Windows of noisy steps (Flow-GRPO-Fast, MixGRPO), and what follows them in fewer steps (MixGRPO-Flash)."""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from densegrpo.engine.data import join
from densegrpo.engine.explore import Chains
from densegrpo.engine.probe import EveryState, FasterTail, FinalImage, share
from densegrpo.engine.recipes import make_recipe
from densegrpo.engine.rollout import finish_by_ode, rollout
from densegrpo.engine.schedule import flow_rate, shifted_linear
from densegrpo.engine.wave import SOLVERS
from diffusers import DPMSolverMultistepScheduler
from gaussian_flow import GaussianFlow
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPE = (3, 4, 4)


def window_of(explore, num_steps=10, iteration=0, slot=0, seed=0):
    """The noisy steps of a group as a list; all of them, and nothing else, are trained."""
    rates = flow_rate(0.7)(shifted_linear(num_steps))
    plan = explore((1, 1, 1), rates, (seed, iteration, slot))
    noisy = plan.rate > 0
    assert (noisy == noisy[0]).all(), "a group shares its window"
    assert torch.equal(plan.train, noisy)
    assert torch.equal(plan.rate[0, noisy[0]], rates[noisy[0]])
    steps = noisy[0].nonzero().flatten().tolist()
    assert steps == list(range(steps[0], steps[-1] + 1))
    return steps


def starts(iterations, **options):
    """First noisy step in each iteration; the window always has its size."""
    explore = Chains(group_size=2, **options)
    windows = [window_of(explore, iteration=i) for i in iterations]
    assert {len(w) for w in windows} == {options["window_size"]}
    return [w[0] for w in windows]


def test_a_sliding_window_moves_one_step_each_few_iterations():
    options = {"window": "sliding", "window_size": 4, "window_every": 3}
    assert starts(range(9), **options) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_at_the_end_a_sliding_window_starts_over_or_stays():
    """Of 10 steps 9 can be noisy: a window of 6 has the places 0..3."""
    options = {"window": "sliding", "window_size": 6, "window_every": 1}
    assert starts(range(9), roll_back=True, **options) == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert starts(range(9), roll_back=False, **options) == [0, 1, 2, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("roll_back", [False, True])
def test_a_sliding_window_stays_inside_its_range(roll_back):
    options = {"window": "sliding", "window_size": 2, "window_every": 1, "window_first": 3, "window_end": 7}
    after = [3, 4, 5] if roll_back else [5, 5, 5]
    assert starts(range(6), roll_back=roll_back, **options) == [3, 4, 5, *after]


def test_mix_grpos_window_moves_one_step_every_25_iterations():
    explore = make_recipe("mix_grpo").explore
    assert [window_of(explore, 25, i) for i in (0, 24, 25, 50)] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, 5],
    ]
    last = 25 - 1 - 4
    assert window_of(explore, 25, 25 * last)[0] == last
    assert window_of(explore, 25, 25 * (last + 1))[0] == 0


def test_a_fixed_window_never_moves():
    assert starts(range(0, 100, 7), window="fixed", window_size=3, window_first=2) == [2] * 15
    flash_star = make_recipe("mix_grpo_flash", window="fixed").explore
    assert {tuple(window_of(flash_star, 25, i)) for i in (0, 30, 1000)} == {(0, 1, 2, 3)}


def test_a_random_window_reaches_every_place_inside_its_range_and_no_other():
    options = {"window": "random", "window_size": 2, "window_first": 1, "window_end": 6}
    found = starts(range(100), **options)
    assert set(found) == {1, 2, 3, 4}
    assert all(found.count(place) > 10 for place in (1, 2, 3, 4))


def test_a_random_window_without_an_end_reaches_the_last_step_that_can_be_noisy():
    assert set(starts(range(100), window="random", window_size=6)) == {0, 1, 2, 3}


@pytest.mark.parametrize("other", ["iteration", "slot", "seed"])
def test_groups_draw_their_random_windows_independently(other):
    explore = Chains(group_size=2, window="random", window_size=1)
    found = [window_of(explore, **{other: i})[0] for i in range(40)]
    assert len(set(found)) > 5
    assert found == [window_of(explore, **{other: i})[0] for i in range(40)], "the same group, the same window"


def test_flow_grpo_fast_draws_three_of_the_first_five_steps():
    explore = make_recipe("flow_grpo_fast").explore
    assert {tuple(window_of(explore, iteration=i)) for i in range(40)} == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}


@given(
    kind=st.sampled_from(["fixed", "sliding", "random"]),
    size=st.integers(1, 12),
    first=st.integers(0, 12),
    end=st.integers(0, 14),
    num_steps=st.integers(2, 12),
    iteration=st.integers(0, 60),
)
@settings(max_examples=200, deadline=None)
def test_a_window_lies_where_it_was_asked_for_or_is_refused(kind, size, first, end, num_steps, iteration):
    explore = Chains(
        group_size=2, window=kind, window_size=size, window_first=first, window_end=end, window_every=2, roll_back=True
    )
    limit = min(end or num_steps, num_steps - 1) if kind != "fixed" else num_steps - 1
    if first + size > limit:
        with pytest.raises(ValueError, match="does not fit"):
            explore((1, 1, 1), flow_rate(0.7)(shifted_linear(num_steps)), (0, iteration, 0))
    else:
        steps = window_of(explore, num_steps, iteration)
        assert len(steps) == size
        assert first <= steps[0]
        assert steps[-1] < limit


@pytest.mark.parametrize("kind", ["fixed", "sliding", "random"])
def test_a_window_longer_than_the_schedule_is_refused(kind):
    explore = Chains(group_size=2, window=kind, window_size=4, window_first=3)
    assert window_of(explore, num_steps=8) == [3, 4, 5, 6]
    message = "reaches to step 7 does not fit: of 7 denoising steps 6 can be noisy; raise num_steps or lower"
    with pytest.raises(ValueError, match=message):
        window_of(explore, num_steps=7)


@pytest.mark.parametrize("kind", ["sliding", "random"])
def test_a_window_longer_than_its_range_is_refused(kind):
    explore = Chains(group_size=2, window=kind, window_size=3, window_first=2, window_end=4)
    with pytest.raises(ValueError, match="3 steps does not fit between steps 2 and 4; lower window_size or raise"):
        window_of(explore)


def test_a_recipe_whose_window_does_not_fit_the_schedule_is_refused():
    recipe = make_recipe("mix_grpo")
    with pytest.raises(ValueError, match="of 4 denoising steps 3 can be noisy"):
        recipe.plan(SHAPE, shifted_linear(4), (0, 0, 0))


class Sampled(NamedTuple):
    model: "Levels"
    cond: torch.Tensor
    traj: object
    finals: object


class Levels(GaussianFlow):
    """Writes down how many latents were evaluated at each noise level."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def velocity(self, x, sigma, cond, rows):
        for level in sigma.tolist():
            self.rows[level] = self.rows.get(level, 0) + 1
        return super().velocity(x, sigma, cond, rows)


def sample(explore, probe, num_steps, num_prompts=2):
    """Two prompts."""
    model, sigmas = Levels(), shifted_linear(num_steps)
    model.lora.up[0].data.fill_(0.5)
    cond = model.encode(["a", "bbbbbbbbbbbbbbbb"])
    plans = [explore(SHAPE, flow_rate(0.7)(sigmas), (0, 0, slot)) for slot in range(num_prompts)]
    plan = join([replace(p, prompt=torch.full_like(p.prompt, i)) for i, p in enumerate(plans)])
    return Sampled(model, cond, *rollout(model, cond, plan, sigmas, make_recipe("flow_grpo").noise.step, probe))


def after_window(first, size, group_size=3, shared_noise=True):
    options = {"window": "fixed", "window_first": first, "window_size": size}
    return Chains(group_size=group_size, shared_noise=shared_noise, **options)


def test_a_tail_as_long_as_the_chain_is_the_chain():
    explore = after_window(1, 3)
    plain, whole = (sample(explore, p, 9) for p in (FinalImage(), FasterTail(tail_share=1.0, tail_solver="euler")))
    assert torch.equal(whole.finals.latents, plain.finals.latents)
    assert torch.equal(whole.finals.index[..., -1], plain.finals.index[..., -1])
    assert whole.model.rows == plain.model.rows


def test_a_faster_tail_takes_its_share_of_the_steps_after_the_window():
    """Euler steps over the evenly spread levels, from the state after the window; it is each chain's image."""
    model, cond, traj, finals = sample(after_window(1, 3), FasterTail(tail_share=0.5, tail_solver="euler"), 12)
    route = [4, 6, 8, 10, 12]
    assert share(0.5)(4, 12) == route
    expected = finish_by_ode(model, cond, traj.states[:, 4], traj.sigmas[route], traj.plan.prompt)
    torch.testing.assert_close(finals.latents[finals.index[0, :, -1]], expected, atol=1e-6, rtol=0)
    assert torch.equal(finals.index[0, :, 4], finals.index[0, :, -1])


@pytest.mark.parametrize(("part", "steps"), [(0.01, 1), (0.2, 2), (0.4, 4), (0.47, 5), (0.5, 5), (1.0, 10)])
def test_a_share_of_ten_steps_is_rounded_and_at_least_one(part, steps):
    assert len(share(part)(5, 15)) == steps + 1


@pytest.mark.parametrize("solver", ["euler", "dpm2m"])
def test_chains_that_rest_are_never_evaluated_again(solver):
    """10 steps, noisy at 2, 3, 4; 5 are left, of which 2 are taken: 5 -> 7 -> 10. Two groups of 3."""
    probe = FasterTail(tail_share=0.4, tail_solver=solver)
    model, _, traj, _ = sample(after_window(2, 3), probe, 10)
    assert share(0.4)(5, 10) == [5, 7, 10]
    expected = {0: 2, 1: 2, 2: 2, 3: 6, 4: 6, 5: 6, 7: 6}
    assert model.rows == {float(traj.sigmas[t]): rows for t, rows in expected.items()}


def test_resting_chains_are_in_no_way_in_the_trajectory_that_is_trained():
    plain, fast = (sample(after_window(1, 3), p, 9) for p in (FinalImage(), FasterTail()))
    trained = plain.traj.plan.train
    for name in ("std", "log_prob"):
        assert torch.equal(getattr(fast.traj, name), getattr(plain.traj, name))
    assert torch.equal(fast.traj.states[:, :5], plain.traj.states[:, :5])
    assert trained.any(0).nonzero().flatten().tolist() == [1, 2, 3]


def exact(x, here, there, mean, spread):
    """The ODE of a Gaussian flow keeps (x - mean of the marginal) / its standard deviation."""
    deviations = [(((1 - sigma) * spread) ** 2 + sigma**2) ** 0.5 for sigma in (here, there)]
    return (1 - there) * mean + deviations[1] / deviations[0] * (x - (1 - here) * mean)


def solve(solver, sigmas, x, velocity):
    """States [len(sigmas), ...] of one ODE, as a tail takes its steps."""
    states, before, sigma_before = [x], x, sigmas.new_ones(len(x))
    for here, there in pairwise(sigmas):
        v = velocity(x, here.expand(len(x)))
        after = SOLVERS[solver](x, v, before, sigma_before, here.expand(len(x)), there.expand(len(x)))
        before, sigma_before, x = x - here * v, here.expand(len(x)), after
        states.append(x)
    return torch.stack(states)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm2m", 2)])
@pytest.mark.parametrize(("here", "there"), [(0.9, 0.4), (0.6, 0.1)])
def test_the_error_of_a_solver_falls_with_its_order_when_steps_double(here, there, solver, order):
    model, errors = GaussianFlow(), []
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    for steps in (10, 20, 40):
        sigmas = torch.linspace(here, there, steps + 1)
        end = solve(solver, sigmas, x, flow_of(model))[-1]
        errors.append((end - exact(x, here, there, 0.01, model.spread)).abs().max().item())
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(ratio == pytest.approx(2**order, rel=0.2) for ratio in ratios), (errors, ratios)


def test_a_second_order_tail_is_closer_to_the_end_of_its_ode():
    """From the state after one noisy step, 32 steps instead of 64."""
    error = {}
    for solver in SOLVERS:
        probe = FasterTail(tail_share=0.5, tail_solver=solver)
        model, cond, traj, finals = sample(after_window(0, 1, group_size=8), probe, 65)
        mean = model.mean + cond[traj.plan.prompt][:, None, None, None]
        expected = exact(traj.states[:, 1], traj.sigmas[1], 0.0, mean, model.spread)
        error[solver] = (finals.latents[finals.index[0, :, -1]] - expected).abs().max().item()
    assert error["dpm2m"] < error["euler"] / 10


@pytest.mark.parametrize(("part", "route"), [(0.5, [4, 6, 8, 10, 12]), (1.0, list(range(4, 13)))])
def test_a_second_order_tail_takes_the_steps_of_its_solver(part, route):
    """In the wave, beside others: each tail's history is its own, and the chain, which goes by Euler, is none."""
    model, cond, traj, finals = sample(after_window(1, 3), FasterTail(tail_share=part), 12)
    velocity = lambda x, sigma: model.velocity(x, sigma, cond, traj.plan.prompt)  # noqa: E731
    expected = solve("dpm2m", traj.sigmas[route], traj.states[:, 4], velocity)[-1]
    torch.testing.assert_close(finals.latents[finals.index[0, :, -1]], expected, atol=1e-6, rtol=0)


def flow_of(model):
    cond = model.encode(["a"])
    return lambda x, sigma: model.velocity(x, sigma, cond, torch.zeros(len(x), dtype=torch.long))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("num_steps", [3, 8, 20])
def test_the_second_order_solver_is_diffusers(num_steps):
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(num_steps)
    velocity = flow_of(GaussianFlow())
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = solve("dpm2m", scheduler.sigmas, x, velocity)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, scheduler.sigmas[i].expand(4)), t, x).prev_sample
        torch.testing.assert_close(found[i + 1], x, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("here", "there"), [(1.0, 0.7), (0.7, 0.4), (0.4, 0.0), (1.0, 0.0)])
def test_the_first_step_and_those_at_infinite_log_snr_are_eulers(here, there):
    """First step; from sigma 1; into sigma 0, with a history too."""
    generator = torch.Generator().manual_seed(0)
    x, v, before = torch.randn(3, 2, *SHAPE, generator=generator).double()
    sigmas = [torch.tensor([level] * 2).double() for level in (here, there)]
    histories = [1.0] if there > 0 else [1.0, 0.9]
    for sigma_before in histories if here < 1 else [1.0]:
        known = torch.full((2,), sigma_before).double()
        first, second = (SOLVERS[s](x, v, before, known, *sigmas) for s in ("euler", "dpm2m"))
        torch.testing.assert_close(second, first)


@pytest.mark.parametrize("shared_noise", [False, True])
@pytest.mark.parametrize("first", [0, 2, 4])
def test_probed_states_before_a_window_share_one_tail(first, shared_noise):
    """They lie on one ODE path; each state still gets what its own ODE would give."""
    explore = after_window(first, 3, group_size=4, shared_noise=shared_noise)
    model, cond, traj, finals = sample(explore, EveryState(), 8)
    for k in range(9):
        expected = finish_by_ode(model, cond, traj.states[:, k], traj.sigmas[k:], traj.plan.prompt)
        torch.testing.assert_close(finals.latents[finals.index[0, :, k]], expected, atol=1e-6, rtol=1e-6)
    assert (finals.index[..., : first + 1] == finals.index[..., :1]).all()
    assert (finals.index[..., first + 3 :] == finals.index[..., -1:]).all()
    # Of each group: the start, shared or not, two states inside the window, and the end.
    assert len(finals.latents) == 2 * ((1 if shared_noise else 4) + 4 * 3)


class ChosenStates(NamedTuple):
    """Probes any states."""

    wanted: torch.Tensor
    grids: tuple = EveryState().grids
    tail_solver: str = "euler"

    def states(self, plan):
        return self.wanted


@given(seed=st.integers(0, 2**16), share_of=st.floats(0.1, 0.9), first=st.integers(0, 3), size=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_any_choice_of_states_is_probed_and_no_other(seed, share_of, first, size):
    wanted = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed)) < share_of
    model, cond, traj, finals = sample(after_window(first, size), ChosenStates(wanted), 7)
    for k in range(7):
        assert torch.equal(finals.index[0, :, k] >= 0, wanted[:, k])
        expected = finish_by_ode(model, cond, traj.states[:, k], traj.sigmas[k:], traj.plan.prompt)
        chains = wanted[:, k]
        found = finals.latents[finals.index[0, chains, k]]
        torch.testing.assert_close(found, expected[chains], atol=1e-6, rtol=1e-6)
