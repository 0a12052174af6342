"""What every method must hold: costs as derived by hand, batches that do not matter, weights of steps, options."""

from itertools import pairwise

import pytest
import torch
from densegrpo.engine.kernels import CPS, EULER_MARUYAMA
from densegrpo.engine.loss import WEIGHTS, PolicyUpdate
from densegrpo.engine.noise import StepNoise
from densegrpo.engine.recipes import RECIPES, make_recipe
from densegrpo.engine.schedule import flow_rate, sd3_twice_shifted, shifted_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from method_variants import NAMES, VARIANTS, one_iteration, small

every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=NAMES)


def cost(name, num_steps, *, iteration=0, train_batch=8, **options):
    """What one group costs: evaluations of the rollout with its probes, images, and evaluations of the update.

    ``trained`` carry gradient, ``old`` are the densities of later updates before the first, ``reference`` the
    untrained model's: as many as ``trained`` where the KL pulls, else one batch of at most ``train_batch``.
    """
    found = one_iteration(
        make_recipe(name, **options), 1, num_steps, train_batch=train_batch, iteration=iteration
    ).costs
    return tuple(found[part] for part in ("rollout", "images", "trained", "old", "reference"))


def test_the_cost_of_flow_grpo():
    """G T; trained G (T - 1), half of it in a second update."""
    assert cost("flow_grpo", 10) == (240, 24, 216, 108, 216)


def test_the_cost_of_flow_grpo_fast():
    """G T, and G w trained. Started alike, the group shares what comes before its noise, and the state it starts at."""
    assert cost("flow_grpo_fast", 10) == (240, 24, 24 * 3, 24 * 3 // 2, 8)
    for first in range(3):
        options = {"shared_noise": True, "window": "fixed", "window_first": first, "window_end": 0}
        rollout = first + 1 + 24 * (10 - first - 1)
        trained = 2 * (1 + 12 * 2)
        assert cost("flow_grpo_fast", 10, **options) == (rollout, 24, trained, trained // 2, 8)
        assert rollout < first + 24 * (10 - first)


def test_the_cost_of_dance_grpo():
    """G T, and 0.6 G (T - 1) trained in 4 updates. Started alike: G - 1 less, and the first step's state is shared."""
    assert cost("dance_grpo", 16, shared_noise=False) == (192, 12, 108, 81, 8)
    found = one_iteration(make_recipe("dance_grpo"), 1, 16, train_batch=8)
    train = found.traj.plan.train
    assert train.sum(1).tolist() == [int(0.6 * 15)] * 12
    apart = [max(0, int(train[part::4, 0].sum()) - 1) for part in range(4)]
    parts = [int(train[part::4].sum()) - saved for part, saved in enumerate(apart)]
    assert sum(apart) > 0
    expected = {"rollout": 192 - 11, "images": 12, "trained": sum(parts), "old": sum(parts[1:]), "reference": 8}
    assert found.costs == expected


@pytest.mark.parametrize("first", [0, 5])
def test_the_cost_of_mix_grpo(first):
    """G T, or what the group shares up to its first noise plus G times the rest; trained G w in 4 updates."""
    at = {"iteration": 25 * first}
    assert cost("mix_grpo", 25, shared_noise=False, **at) == (300, 12, 48, 36, 8)
    rollout, trained = first + 1 + 12 * (25 - first - 1), 4 * (1 + 3 * 3)
    assert rollout < first + 12 * (25 - first)
    assert cost("mix_grpo", 25, **at) == (rollout, 12, trained, trained * 3 // 4, 8)


@pytest.mark.parametrize(("first", "tail"), [(0, 8), (5, 6), (20, 1)])
def test_the_cost_of_mix_grpo_flash(first, tail):
    """G T~ with T~ = l + w + 0.4 (T - l - w): the tail starts with a velocity the chain has."""
    at = {"iteration": 25 * first}
    assert tail == max(1, round(0.4 * (25 - first - 4)))
    assert cost("mix_grpo_flash", 25, shared_noise=False, **at)[:2] == (12 * (first + 4 + tail), 12)
    shared = first + 1 + 12 * (4 - 1 + tail)
    assert cost("mix_grpo_flash", 25, **at) == (shared, 12, 40, 30, 8)


def test_flash_star_stays_at_the_start():
    assert cost("mix_grpo_flash", 25, iteration=500, window="fixed") == cost("mix_grpo_flash", 25)


def test_the_cost_of_dense_grpo():
    """G (T + T (T - 1) / 2): a probe's first step is the chain's own. R_T-1 = R_T: its last step is an ODE step.

    Started alike, the first probe, its velocity and its image are there once: (G - 1) (T - 1) + (G - 1) less.
    """
    assert cost("dense_grpo", 10) == (1320, 240, 216, 108, 216)
    trained = 2 * (1 + 12 * 8)
    assert cost("dense_grpo", 10, shared_noise=True) == (1320 - 207 - 23, 1 + 24 * 9, trained, trained // 2, trained)


@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["dense_grpo", "tp_grpo"])
def test_the_cost_of_short_probes(name, most):
    """T + sum of min(n, steps left) - 1 for each chain; no images less."""
    per_chain = {1: 10, 2: 19, 3: 27, 5: 40}[most]
    assert per_chain == 10 + sum(min(most, left) - 1 for left in range(1, 11))
    assert cost(name, 10, probe_evaluations=most)[:2] == (24 * per_chain, 240)


def test_the_cost_of_dense_credit_in_a_window():
    """States before the window have one tail per start, those after it are their chain's: w - 1 probes in between."""
    first, size, steps = 2, 3, 10
    options = {"window": "fixed", "window_first": first, "window_size": size}
    # The tail of the states up to the first noisy one, then those of the states inside the window.
    probes = [steps - first - 1, *(steps - k - 1 for k in range(first + 1, first + size))]
    assert cost("dense_grpo", steps, **options)[:2] == (24 * (steps + sum(probes)), 24 * (1 + size - 1 + 1))


def test_the_cost_of_tp_grpo():
    """That of DenseGRPO; the authors' code takes 64 instead of 55 evaluations per chain."""
    assert cost("tp_grpo", 10) == (1320, 240, 216, 108, 216)


def test_the_cost_of_tempflow_grpo():
    """N (T - 1) for the trunks, whose velocities are also the branches' means, and NK T (T - 1) / 2 after them.

    An update needs each trunk state once: N (T - 1) instead of NK (T - 1). Two updates, each on half of the
    children of every state, need it twice.
    """
    trunk, after = 4 * 9, 4 * 6 * 10 * 9 // 2
    assert cost("tempflow_grpo", 10, num_updates=1) == (trunk + after, 216, 36, 0, 36)
    assert cost("tempflow_grpo", 10) == (1116, 216, 72, 36, 72)


G2RPO_TAILS = {1: (15, 14, 13, 12, 11, 10, 9, 8), 2: (8, 7, 7, 6, 6, 5, 5, 4), 3: (5, 5, 5, 4, 4, 4, 3, 3)}
"""Steps that finish a branch of step 0..7 of 16, by stride."""


@pytest.mark.parametrize(("strides", "published"), [("1, 2", 1704), ("1, 2, 3", 2100)])
def test_the_cost_of_g2rpo(strides, published):
    """M + G (tails, of which those with a stride save their first step, which is that of stride 1).

    The trunk is needed up to the last branch, and its velocity is also the branch's mean: M evaluations where the
    published count has T + M. An update for each of M steps needs its trunk state once; all but the first need
    their old density, and one state reports the KL.
    """
    tails = [sum(G2RPO_TAILS[int(stride)]) for stride in strides.split(",")]
    derived = 8 + 12 * (sum(tails) - 8 * (len(tails) - 1))
    assert derived == {"1, 2": 1592, "1, 2, 3": 1892}[strides]
    assert derived < published == 16 + 8 + 12 * sum(tails)
    assert cost("g2rpo", 16, strides=strides) == (derived, 12 * 8 * len(tails), 8, 7, 1)


def test_the_cost_of_g2rpo_without_the_finest_granularity():
    """The chain itself rests after its branch, but its velocity there is the first step of both tails."""
    tails = sum(G2RPO_TAILS[2]) + sum(G2RPO_TAILS[3])
    assert cost("g2rpo", 16, strides="2, 3")[:2] == (8 + 12 * (tails - 8), 12 * 8 * 2)


def test_two_prompts_cost_twice_as_much():
    """Not DanceGRPO, whose groups draw which of their steps are trained."""
    for name in sorted(set(RECIPES) - {"dance_grpo"}):
        one, two = (one_iteration(small(name, {}), num_prompts=n, num_steps=8).costs for n in (1, 2))
        assert two == {part: 2 * number for part, number in one.items()}, name


@every_variant
@pytest.mark.parametrize(("sample_batch", "train_batch"), [(1, 1), (5, 3)])
def test_results_do_not_depend_on_batch_sizes(name, options, sample_batch, train_batch):
    recipe = small(name, options)
    whole, parts = one_iteration(recipe), one_iteration(recipe, sample_batch=sample_batch, train_batch=train_batch)
    for field in ("states", "std", "log_prob"):
        torch.testing.assert_close(getattr(parts.traj, field), getattr(whole.traj, field), atol=1e-5, rtol=0)
    assert torch.equal(parts.finals.index, whole.finals.index)
    torch.testing.assert_close(parts.finals.latents, whole.finals.latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.rewards.values, whole.rewards.values, atol=1e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(parts.advantages.values, whole.advantages.values, atol=1e-2, rtol=1e-2)
    assert torch.equal(parts.advantages.mask, whole.advantages.mask)
    assert len(parts.gradients) == len(whole.gradients)
    for found, expected in zip(parts.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)
    assert parts.costs == whole.costs


@every_variant
def test_the_ratio_is_one_and_nothing_is_clipped_before_the_weights_change(name, options):
    stats = one_iteration(small(name, options), train_batch=5).stats
    assert stats["ratio"] == pytest.approx(1, abs=1e-6)
    assert stats["clip_fraction"] == 0
    assert stats["sampling_gap"] < 1e-5


@every_variant
def test_the_last_step_is_clean_and_what_is_trained_has_credit(name, options):
    recipe = small(name, options)
    found = one_iteration(recipe)
    plan, mask = found.traj.plan, found.advantages.mask
    assert not plan.rate[:, -1].any()
    assert not (plan.train & (plan.rate == 0)).any()
    assert not (mask & ~plan.train).any()
    if getattr(recipe.explore, "train_fraction", 1) == 1:
        assert torch.equal(mask, plan.train)
        for g in plan.group.unique():
            assert found.advantages.values[plan.group == g].sum(0).abs().max() < 1e-3
    assert (found.finals.index[..., -1] >= 0).all()


def test_dance_grpo_compares_each_image_with_its_whole_group():
    """Its authors draw steps to train after the advantage: one number per image, whichever steps it trains."""
    found = one_iteration(make_recipe("dance_grpo"), num_steps=16)
    final = found.rewards.values[..., -1].view(2, 2, 12)
    score = (final - final.mean(2, keepdim=True)) / (final.std(2, correction=0, keepdim=True) + 1e-8)
    expected = (score * found.rewards.weights[:, None, None]).sum(0).flatten()
    advantages = found.advantages.values
    assert torch.equal(found.advantages.mask, found.traj.plan.train)
    torch.testing.assert_close(advantages, expected[:, None] * found.traj.plan.train, atol=1e-4, rtol=1e-4)


LISTED = [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508]
"""2.25 * std over its mean, from the standard deviations of SD3.5's schedule at a = 0.7."""


def test_noise_weights_are_those_of_tempflows_code_on_its_schedule():
    sigmas = sd3_twice_shifted(10)
    rates = flow_rate(0.7)(sigmas)
    found = PolicyUpdate(step_weight="noise").weights(EULER_MARUYAMA, sigmas, rates)
    std = rates * (-sigmas.diff()).sqrt()
    torch.testing.assert_close(found[:-1], 2.25 * std[:-1], atol=1e-2, rtol=0)
    torch.testing.assert_close(found[:-1], torch.tensor(LISTED), atol=2e-3, rtol=0)
    assert found[-1] == 0


@pytest.mark.parametrize("form", sorted(WEIGHTS))
@pytest.mark.parametrize("kernel", [EULER_MARUYAMA, CPS], ids=["sde", "cps"])
@given(num_steps=st.integers(3, 30), noise=st.floats(0.05, 1.0))
@settings(max_examples=30, deadline=None)
def test_weights_of_the_steps_of_any_schedule_have_mean_one(form, kernel, num_steps, noise):
    sigmas = shifted_linear(num_steps)
    rates = StepNoise(noise=noise, kernel="cps" if kernel is CPS else "sde").rates(sigmas)
    found = PolicyUpdate(step_weight=form).weights(kernel, sigmas, rates)
    assert found[:-1].mean().item() == pytest.approx(1, abs=1e-5)
    assert (found[:-1] > 0).all()
    assert found[-1] == 0


def test_inverse_step_weights_make_short_steps_count_more():
    sigmas = sd3_twice_shifted(10)
    found = PolicyUpdate(step_weight="inverse_step").weights(EULER_MARUYAMA, sigmas, flow_rate(0.7)(sigmas))
    steps = -sigmas.diff()[:-1]
    torch.testing.assert_close(found[:-1] * steps, (found[0] * steps[0]).expand(9))
    assert all((a > b) == (c < d) for (a, b), (c, d) in zip(pairwise(found[:-1]), pairwise(steps), strict=True))


def test_noise_weights_follow_the_kernel():
    """With CPS the injected noise is sigma_next times the sine of the share."""
    sigmas = shifted_linear(8)
    found = PolicyUpdate(step_weight="noise").weights(CPS, sigmas, torch.full((8,), 0.7))
    torch.testing.assert_close(found[:-1], sigmas[1:-1] / sigmas[1:-1].mean())


def test_the_weight_of_a_step_multiplies_its_advantages_and_not_its_kl():
    """One optimizer step for each denoising step: the gradient of the policy times its weight, plus that of the KL."""
    options = {"group_size": 4, "num_seeds": 2, "update_per": "step", "num_updates": 1}

    def gradients(step_weight, kl_weight):
        recipe = make_recipe("tempflow_grpo", step_weight=step_weight, kl_weight=kl_weight, **options)
        return torch.stack(one_iteration(recipe).gradients)

    policy, with_kl = (gradients("uniform", kl_weight) for kl_weight in (0.0, 0.5))
    sigmas = shifted_linear(6)
    weights = PolicyUpdate(step_weight="noise").weights(EULER_MARUYAMA, sigmas, flow_rate(0.7)(sigmas))
    expected = weights[:-1, None] * policy + (with_kl - policy)
    torch.testing.assert_close(gradients("noise", 0.5), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("num_updates", [1, 2])
def test_updates_per_step_train_one_step_at_a_time_the_noisiest_first(num_updates):
    plan = one_iteration(small("g2rpo", {})).traj.plan
    parts = list(PolicyUpdate(update_per="step", num_updates=num_updates).updates(plan.train, plan))
    trained = [part.any(0).nonzero().flatten().tolist() for part in parts]
    assert trained == [[t] if plan.train[:, t].any() else [] for t in range(6) for _ in range(num_updates)]
    assert torch.equal(sum(part.int() for part in parts), plan.train.int())
