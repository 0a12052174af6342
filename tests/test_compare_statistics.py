"""Means, intervals and differences over seeds."""

import math

import numpy as np
import pytest
from densegrpo.engine.compare_statistics import (
    Curve,
    Estimate,
    band,
    differences,
    equal_cost,
    estimate,
    holm,
    t_quantile,
    t_test,
    verdict,
)


def curve(evaluations, reward, seed=0, seconds=None):
    columns = {"evaluations": evaluations, "seconds": seconds or evaluations, "reward": reward}
    return Curve("a method", seed, {name: np.array(values, dtype=float) for name, values in columns.items()})


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042)]
)
def test_quantiles_are_those_of_the_printed_table(freedom, quantile):
    assert t_quantile(0.95, freedom) == pytest.approx(quantile, abs=6e-4)
    assert t_test(quantile, freedom) == pytest.approx(0.05, abs=1e-4)


def test_an_interval_of_known_numbers():
    found = estimate([1, 2, 3, 4, 5, math.nan])
    assert (found.mean, found.num_runs) == (3, 5)
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5 / 5), abs=1e-3)
    assert found.p == pytest.approx(0.01324, abs=1e-4)


def test_one_seed_has_no_interval():
    found = estimate([4.0])
    assert found.mean == 4
    assert math.isnan(found.half)
    assert verdict(found, math.nan) == "too few seeds to tell"


def test_an_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    covered = [abs(found.mean - 3.0) <= found.half for found in map(estimate, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_values_between_measurements_are_interpolated_and_none_are_invented_after_the_end():
    run = curve([0, 100, 300], [0.2, 0.4, 0.8], seconds=[0, 1, 2])
    assert run.at("evaluations", 200, "reward") == pytest.approx(0.6)
    assert run.at("seconds", 0.5, "reward") == pytest.approx(0.3)
    assert math.isnan(run.at("evaluations", 301, "reward"))


def test_the_cost_of_a_level_is_where_the_curve_first_crosses_it():
    run = curve([0, 100, 200, 300], [0.2, 0.6, 0.4, 0.8])
    assert run.cost_of("evaluations", 0.5, "reward") == pytest.approx(75)
    assert run.cost_of("evaluations", 0.7, "reward") == pytest.approx(275)
    assert math.isnan(run.cost_of("evaluations", 0.9, "reward"))
    assert run.cost_of("evaluations", 0.1, "reward") == 0


def test_runs_are_compared_at_the_budget_or_where_the_shortest_ends():
    runs = [curve([0, 120], [0, 1]), curve([0, 90], [0, 1])]
    assert equal_cost(runs, "evaluations", 50) == 50
    assert equal_cost(runs, "evaluations", 100) == 90
    assert equal_cost(runs, "evaluations", 0) == 90


def test_differences_are_taken_seed_by_seed():
    """Seeds differ far more than methods do, so only pairs show the effect."""
    baseline = [curve([0, 100], [0, reward], seed) for seed, reward in enumerate((1.0, 2.0, 3.0, 4.0))]
    method = [curve([0, 100], [0, reward], seed) for seed, reward in ((2, 3.15), (0, 1.1), (1, 2.2), (9, 100))]
    found = differences(method, baseline, "evaluations", 100, "reward")
    assert (found.mean, found.num_runs) == (pytest.approx(0.15), 3)
    assert found.half == pytest.approx(4.303 * 0.05 / math.sqrt(3), abs=1e-3)
    assert found.excludes_zero()


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    assert holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)


@pytest.mark.parametrize(
    ("half", "corrected", "words"),
    [(0.5, 0.01, "significant"), (0.5, 0.06, "not after correction"), (1.5, 0.2, "within noise")],
)
def test_a_verdict_follows_from_the_interval_and_the_correction(half, corrected, words):
    assert verdict(Estimate(-1.0, half, 5, 0.01), corrected) == words


def test_a_band_is_the_interval_at_each_cost_as_far_as_all_runs_go():
    found = band([curve([0, 100], [0, 1], 0), curve([0, 80], [0, 1.6], 1)], "evaluations", "reward", 0, num_points=3)
    assert found.cost.tolist() == [0, 40, 80]
    assert found.mean == pytest.approx([0, 0.6, 1.2])
    assert found.half[1] == pytest.approx(estimate([0.4, 0.8]).half)
