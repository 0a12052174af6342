"""Policy losses, ratios, KL forms and the split into optimizer steps, each against its formula."""

import pytest
import torch
from densegrpo.engine.data import Gaussian, Prompt
from densegrpo.engine.kernels import log_prob, unscaled_log_prob
from densegrpo.engine.loss import KLS, RATIOS, Move, PolicyUpdate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

PROMPTS = [Prompt("a", {}), Prompt("bbbbbbbbbb", {})]
NUM_STEPS = 5


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, -1.0, False), (-0.5, 1.0, True), (0.0, 1.0, True), (0.0, -1.0, True)],
)
def test_clipping_stops_only_what_has_gone_far_enough(log_ratio, advantage, moves):
    update, new = PolicyUpdate(clip_range=0.2), torch.tensor([log_ratio], requires_grad=True)
    update.policy_loss(new.exp(), torch.tensor([advantage])).sum().backward()
    assert (new.grad != 0).item() is moves
    assert update.is_clipped(new.exp(), torch.tensor([advantage])).item() is not moves


@given(ratio=st.floats(0.2, 5), advantage=st.floats(-5, 5), clip_range=st.floats(1e-5, 0.9))
@settings(max_examples=100, deadline=None)
def test_the_policy_loss_is_ppos(ratio, advantage, clip_range):
    update = PolicyUpdate(clip_range=clip_range)
    clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
    found = update.policy_loss(torch.tensor([ratio]).double(), torch.tensor([advantage]).double()).item()
    assert found == pytest.approx(-min(ratio * advantage, clipped * advantage), rel=1e-6, abs=1e-9)


def test_a_gradient_step_goes_against_the_sign_of_the_loss():
    ratio = torch.tensor([1.0, 1.0], requires_grad=True)
    PolicyUpdate().policy_loss(ratio, torch.tensor([2.0, -3.0])).sum().backward()
    assert ratio.grad.tolist() == [-2.0, 3.0]


def moves(kernel=log_prob, seed=0, same_std=True, std=None):
    """(new, old, sample) of three transitions; their distributions differ in the mean."""
    generator = torch.Generator().manual_seed(seed)
    mean, shift, noise, velocity, other = torch.randn(5, 3, 2, 4, 4, generator=generator).double()
    std = torch.tensor([0.1, 0.7, 2.0]).double().view(3, 1, 1, 1) if std is None else std
    old, new = Gaussian(mean, std), Gaussian((mean + 0.1 * shift).requires_grad_(), std)
    sample = mean + std * noise
    return Move(velocity, new, kernel(sample, new)), Move(other, old, kernel(sample, old)), sample


def test_the_exact_kl_is_that_of_the_two_gaussians_per_element():
    new, reference, _ = moves()
    both = [Independent(Normal(m.dist.mean, m.dist.std.expand_as(m.dist.mean)), 3) for m in (new, reference)]
    expected = kl_divergence(*both) / (2 * 4 * 4)
    torch.testing.assert_close(KLS["exact"](new, reference, torch.ones(3).double()), expected)


def test_flow_grpos_kl_divides_by_the_squared_rate():
    """Their code divides by 2 rate^2 where std = rate * sqrt(step): the exact KL times the step size."""
    new, reference, _ = moves()
    step = torch.tensor([0.04, 0.1, 0.3]).double()
    rate = new.dist.std.flatten() / step.sqrt()
    expected = ((new.dist.mean - reference.dist.mean) ** 2).flatten(1).mean(1) / (2 * rate**2)
    torch.testing.assert_close(KLS["flow_grpo"](new, reference, step), expected)
    torch.testing.assert_close(KLS["flow_grpo"](new, reference, step), KLS["exact"](new, reference, step) * step)


def test_the_velocity_kl_is_the_mean_squared_difference():
    new, reference, _ = moves()
    expected = torch.stack(
        [nn.functional.mse_loss(a, b) for a, b in zip(new.velocity, reference.velocity, strict=True)]
    )
    torch.testing.assert_close(KLS["velocity"](new, reference, torch.ones(3)), expected)


@pytest.mark.parametrize("form", sorted(KLS))
@pytest.mark.parametrize("ratio", sorted(RATIOS))
@pytest.mark.parametrize("density", [log_prob, unscaled_log_prob])
def test_ode_rows_have_finite_gradients(form, ratio, density):
    """Masking after dividing by 0 would still give NaN."""
    new, old, sample = moves(density, std=torch.tensor([0.0, 0.7, 2.0]).double().view(3, 1, 1, 1))
    kl = KLS[form](new, old, torch.ones(3).double())
    (kl.sum() + RATIOS[ratio](new, old, sample).sum()).backward()
    assert new.dist.mean.grad.isfinite().all()
    assert form == "velocity" or kl[0] == 0
    assert RATIOS["plain"](new, old, sample)[0] == 1


def test_the_plain_ratio_is_a_geometric_mean_over_elements():
    new, old, sample = moves()
    densities = [Normal(m.dist.mean, m.dist.std).log_prob(sample).flatten(1).sum(1) for m in (new, old)]
    expected = ((densities[0] - densities[1]) / (2 * 4 * 4)).exp()
    torch.testing.assert_close(RATIOS["plain"](new, old, sample), expected)


@given(seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_guards_ratio_takes_the_drift_away_and_evens_the_scale(seed):
    """exp(std * (log ratio + |mean shift|^2 / (2 std^2))) with the full Gaussian density."""
    new, old, sample = moves(seed=seed)
    std = new.dist.std.flatten()
    drift = ((new.dist.mean - old.dist.mean) ** 2).flatten(1).mean(1) / (2 * std**2)
    expected = (std * (new.log_prob - old.log_prob + drift)).exp()
    torch.testing.assert_close(RATIOS["guard"](new, old, sample), expected)


def test_guards_ratio_needs_no_density_so_it_serves_cps_too():
    full, constants_removed = moves(log_prob), moves(unscaled_log_prob)
    torch.testing.assert_close(RATIOS["guard"](*full), RATIOS["guard"](*constants_removed))
    assert not torch.allclose(RATIOS["plain"](*full), RATIOS["plain"](*constants_removed))
