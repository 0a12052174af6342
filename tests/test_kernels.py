"""One denoising step: the same as other people's code, and right by itself."""

import json
import math
from pathlib import Path

import pytest
import torch
from densegrpo.engine.data import Gaussian
from densegrpo.engine.kernels import CPS, EULER_MARUYAMA, cps, euler_maruyama, log_prob, unscaled_log_prob
from densegrpo.engine.schedule import constant_rate, flow_rate, sd3_twice_shifted, shifted_linear
from diffusers import FlowMatchEulerDiscreteScheduler
from gaussian_flow import GaussianFlow
from hypothesis import given, settings
from hypothesis import strategies as st

GOLDEN = json.loads((Path(__file__).parent / "golden" / "kernels.json").read_text())
SIGMAS = torch.tensor(GOLDEN["schedule"])
KINDS = {"flow": (EULER_MARUYAMA, flow_rate), "dance": (EULER_MARUYAMA, constant_rate), "cps": (CPS, constant_rate)}
golden = pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: f"{c['kind']}-{c['noise_level']}-step{c['step']}"
)
levels = st.tuples(st.floats(0.05, 1.0), st.floats(0.0, 0.95)).filter(lambda pair: pair[1] < pair[0] - 0.01)


def tensor(numbers):
    return torch.tensor(numbers).view(GOLDEN["shape"])


def distribution(case):
    """Our next state for a golden case, and the kernel that made it."""
    kernel, table = KINDS[case["kind"]]
    t, state = case["step"], GOLDEN["states"][case["step"]]
    sigma, sigma_next, rate = (v.expand(2) for v in (SIGMAS[t], SIGMAS[t + 1], table(case["noise_level"])(SIGMAS)[t]))
    return kernel, kernel.step(tensor(state["x"]), tensor(state["v"]), sigma, sigma_next, rate)


def golden_noise(step):
    """The noise the authors drew at a step, the same for all their kernels."""
    case = next(c for c in GOLDEN["cases"] if (c["kind"], c["step"]) == ("flow", step))
    dist = distribution(case)[1]
    return (tensor(case["x_next"]) - tensor(case["mean"])) / dist.std


def run(kernel, rate, model, x, sigmas, noises=None):
    """Sample a whole schedule by hand; ``noises`` [T, ...] or fresh ones."""
    rates, cond, rows = rate(sigmas), model.encode([""]), torch.zeros(len(x), dtype=torch.long)
    with torch.no_grad():
        for t in range(len(sigmas) - 1):
            sigma, sigma_next, step_rate = (a.expand(len(x)) for a in (sigmas[t], sigmas[t + 1], rates[t]))
            mean, std = kernel(x, model.velocity(x, sigma, cond, rows), sigma, sigma_next, step_rate)
            x = mean + std * (torch.randn_like(x) if noises is None else noises[t])
    return x


@golden
def test_the_mean_is_that_of_the_authors_code(case):
    _, dist = distribution(case)
    if "mean" in case:
        torch.testing.assert_close(dist.mean, tensor(case["mean"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(dist.std, torch.full((2, 1, 1, 1), dist.std.mean().item()))


@golden
def test_the_same_noise_leads_where_the_authors_code_leads(case):
    _, (mean, std) = distribution(case)
    torch.testing.assert_close(mean + std * golden_noise(case["step"]), tensor(case["x_next"]), atol=1e-6, rtol=0)


@golden
def test_the_density_is_that_of_the_authors_code(case):
    kernel, dist = distribution(case)
    expected = torch.tensor(case["log_prob"])
    torch.testing.assert_close(kernel.log_prob(tensor(case["x_next"]), dist), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", [euler_maruyama, cps])
@given(levels=levels, seed=st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_without_noise_every_kernel_is_the_euler_step(kernel, levels, seed):
    x, velocity = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sigma, sigma_next = (torch.full((2,), s, dtype=torch.float64) for s in levels)
    mean, std = kernel(x, velocity, sigma, sigma_next, torch.zeros(2))
    torch.testing.assert_close(mean, x + velocity * (levels[1] - levels[0]))
    assert (std == 0).all()


@given(levels=levels, rate=st.floats(0.0, 1.0), seed=st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_cps_keeps_the_noise_level_of_the_schedule(levels, rate, seed):
    """Coefficients: 1 - sigma' of the image; sigma'^2 = old noise^2 + fresh noise^2."""
    x0, noise = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sigma, sigma_next, share = (torch.tensor([v], dtype=torch.float64) for v in (*levels, rate))
    mean, std = cps(x0 * (1 - sigma) + noise * sigma, noise - x0, sigma, sigma_next, share)
    kept = (sigma_next**2 - std.flatten() ** 2).sqrt()
    torch.testing.assert_close(mean, (1 - sigma_next) * x0 + kept * noise)
    assert std.item() == pytest.approx(levels[1] * math.sin(rate * math.pi / 2))


def diffusers_scheduler(**options):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **options)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("kernel", [euler_maruyama, cps])
def test_without_noise_a_whole_run_equals_that_of_diffusers(kernel):
    scheduler, model, x = diffusers_scheduler(), GaussianFlow(), torch.randn(4, 3, 4, 4)
    cond, rows, expected = model.encode([""]), torch.zeros(4, dtype=torch.long), x
    for t, timestep in enumerate(scheduler.timesteps):
        velocity = model.velocity(expected, scheduler.sigmas[t].expand(4), cond, rows).detach()
        expected = scheduler.step(velocity, timestep, expected).prev_sample
    found = run(kernel, constant_rate(0.0), model, x, sd3_twice_shifted(10), torch.zeros(10, *x.shape))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_all_fresh_noise_equals_stochastic_sampling_of_diffusers():
    scheduler, model, x = diffusers_scheduler(stochastic_sampling=True), GaussianFlow(), torch.randn(4, 3, 4, 4)
    noises = torch.stack([torch.randn(x.shape, generator=torch.Generator().manual_seed(t)) for t in range(10)])
    cond, rows, expected = model.encode([""]), torch.zeros(4, dtype=torch.long), x
    for t, timestep in enumerate(scheduler.timesteps):
        velocity = model.velocity(expected, scheduler.sigmas[t].expand(4), cond, rows).detach()
        generator = torch.Generator().manual_seed(t)
        expected = scheduler.step(velocity, timestep, expected, generator=generator).prev_sample
    found = run(cps, constant_rate(1.0), model, x, sd3_twice_shifted(10), noises)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "rate"),
    [
        (euler_maruyama, flow_rate(0.7)),
        (euler_maruyama, constant_rate(0.3)),
        (cps, constant_rate(0.05)),
        (cps, constant_rate(0.0)),
    ],
)
def test_noise_keeps_the_marginals(kernel, rate):
    """Many small noisy steps still end at the data distribution N(mean, spread^2)."""
    torch.manual_seed(0)
    model = GaussianFlow(spread=0.5, latent_shape=(1, 1, 1))
    model.lora.up[0].data.fill_(1.0)
    mean = model.mean
    assert abs(mean) > 0.1
    x = run(kernel, rate, model, torch.randn(20_000, 1, 1, 1), torch.linspace(0.999, 0.001, 400))
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


def test_the_log_density_is_the_normal_one():
    torch.manual_seed(0)
    mean, sample, std = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.rand(3, 1, 1, 1) + 0.1
    expected = torch.distributions.Normal(mean, std).log_prob(sample).flatten(1).mean(1)
    torch.testing.assert_close(log_prob(sample, Gaussian(mean, std)), expected)


def test_the_unscaled_density_is_the_normal_one_times_its_variance():
    """Both rise in the same direction; only the factor 1 / (2 std^2) and the constants are gone."""
    torch.manual_seed(0)
    mean, sample, std = torch.randn(3, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 4, 4), torch.tensor(0.3)
    dist = Gaussian(mean, std.expand(3, 1, 1, 1))
    (scaled,) = torch.autograd.grad(log_prob(sample, dist).sum(), mean)
    (unscaled,) = torch.autograd.grad(unscaled_log_prob(sample, dist).sum(), mean)
    torch.testing.assert_close(unscaled, scaled * 2 * std**2)


@pytest.mark.parametrize("density", [log_prob, unscaled_log_prob])
def test_a_noiseless_step_has_no_density_and_a_finite_gradient(density):
    mean = torch.zeros(2, 1, 2, 2, requires_grad=True)
    dist = Gaussian(mean, torch.tensor([0.0, 0.5]).view(2, 1, 1, 1))
    values = density(torch.ones(2, 1, 2, 2), dist)
    assert values[0] == 0
    values.sum().backward()
    assert mean.grad[0].eq(0).all()
    assert mean.grad[1].isfinite().all()
    assert mean.grad[1].ne(0).all()


@pytest.mark.parametrize(("kernel", "rate"), [(euler_maruyama, flow_rate(0.7)), (cps, constant_rate(0.7))])
@pytest.mark.parametrize("schedule", [shifted_linear, sd3_twice_shifted])
def test_every_step_is_finite_even_from_pure_noise_and_to_the_image(kernel, rate, schedule):
    sigmas = schedule(10)
    x, velocity = torch.randn(2, 10, 3, 4, 4)
    mean, std = kernel(x, velocity, sigmas[:-1], sigmas[1:], rate(sigmas))
    assert mean.isfinite().all()
    assert std.isfinite().all()


def test_kernels_work_on_latents_of_any_rank():
    x, velocity = torch.randn(2, 3, 4, 5, 6, 6)
    sigma, sigma_next, rate = torch.tensor([[0.9, 0.5, 0.3], [0.5, 0.3, 0.0], [0.7, 0.0, 0.2]])
    for kernel in (EULER_MARUYAMA, CPS):
        whole = kernel.step(x, velocity, sigma, sigma_next, rate)
        one = [kernel.step(*(a[b : b + 1] for a in (x, velocity, sigma, sigma_next, rate))) for b in range(3)]
        torch.testing.assert_close(whole.mean, torch.cat([d.mean for d in one]))
        assert kernel.log_prob(x, whole).shape == (3,)
