"""Noise levels and noise rates: those of the papers' code, of diffusers, and a few laws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from densegrpo.engine.schedule import (
    constant_rate,
    flow_rate,
    flux_shifted,
    sd3_twice_shifted,
    shifted_linear,
    table_rate,
)
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st

GOLDEN = json.loads((Path(__file__).parent / "golden" / "kernels.json").read_text())
STD_OF_FLOW_GRPO = [0.7000, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063]
"""rate * sqrt(step) at a = 0.7, 10 steps of the twice shifted schedule, worked out by hand from the formula."""


def test_the_twice_shifted_schedule_is_that_of_the_authors_runs():
    torch.testing.assert_close(sd3_twice_shifted(10), torch.tensor(GOLDEN["schedule"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_steps", [2, 10, 28, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.5])
def test_the_twice_shifted_schedule_is_that_of_the_sd3_pipeline(num_steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(sd3_twice_shifted(num_steps, shift), scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_steps", [2, 10, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_shifted_schedule_is_diffusers_with_given_sigmas(num_steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    torch.testing.assert_close(shifted_linear(num_steps, shift), scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_steps", [4, 16, 28])
@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
def test_the_flux_schedule_is_that_of_the_flux_pipeline(num_steps, num_tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=calculate_shift(num_tokens))
    torch.testing.assert_close(flux_shifted(num_steps, num_tokens), scheduler.sigmas, atol=1e-6, rtol=0)


@given(num_steps=st.integers(2, 60), shift=st.floats(0.2, 12.0), num_tokens=st.integers(64, 8192))
@settings(max_examples=50, deadline=None)
def test_every_schedule_falls_from_noise_to_image(num_steps, shift, num_tokens):
    schedules = [shifted_linear(num_steps, shift), sd3_twice_shifted(num_steps, shift)]
    for sigmas in [*schedules, flux_shifted(num_steps, num_tokens)]:
        assert sigmas.dtype == torch.float32
        assert (len(sigmas), sigmas[0], sigmas[-1]) == (num_steps + 1, 1, 0)
        assert (sigmas.diff() < 0).all()


def test_a_larger_shift_spends_more_steps_at_high_noise():
    assert (shifted_linear(10, 5.0)[1:-1] > shifted_linear(10, 3.0)[1:-1]).all()
    torch.testing.assert_close(shifted_linear(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_the_injected_noise_of_flow_grpo():
    sigmas = sd3_twice_shifted(10)
    std = flow_rate(0.7)(sigmas) * (-sigmas.diff()).sqrt()
    torch.testing.assert_close(std, torch.tensor(STD_OF_FLOW_GRPO), atol=6e-5, rtol=0)


@given(a=st.floats(0.01, 2.0), num_steps=st.integers(2, 40))
@settings(max_examples=30, deadline=None)
def test_the_flow_rate_follows_its_formula_and_is_finite_at_pure_noise(a, num_steps):
    sigmas = shifted_linear(num_steps).double()
    rate, s = flow_rate(a)(sigmas), sigmas[1:-1]
    torch.testing.assert_close(rate[1:], a * (s / (1 - s)).sqrt())
    assert rate[0].item() == pytest.approx(a / (1 - sigmas[1].item()) ** 0.5)


def test_a_constant_rate_is_constant():
    assert constant_rate(0.3)(shifted_linear(4)).tolist() == pytest.approx([0.3] * 4)


def test_a_table_of_rates_belongs_to_its_number_of_steps():
    table = torch.tensor([0.5, 0.4, 0.3, 0.0])
    assert torch.equal(table_rate(table, shifted_linear(4))(shifted_linear(4)), table)
    with pytest.raises(ValueError, match="4 rates but the schedule has 10 steps; calibrate again"):
        table_rate(table, shifted_linear(4))(shifted_linear(10))
