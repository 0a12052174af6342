"""Numbers of a comparison: values at equal cost, confidence intervals, differences seed by seed.

With a handful of seeds the normal distribution is too narrow, so intervals are Student's t.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
"""Of every confidence interval."""
AXES = ("evaluations", "seconds")
"""What a run costs, both counted from 0 at its start."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The measurements of one run."""

    method: str
    seed: int
    columns: Mapping[str, np.ndarray]
    """Name -> [N], oldest first; those of ``AXES`` grow."""

    def at(self, axis: str, cost: float, name: str) -> float:
        """Column ``name`` when the run had cost that much, linear between measurements; NaN after its end."""
        return float(np.interp(cost, self.columns[axis], self.columns[name], right=np.nan))

    def cost_of(self, axis: str, level: float, name: str) -> float:
        """What the run had cost when column ``name`` first reached ``level``, linear between; NaN if it never did."""
        cost, values = self.columns[axis], self.columns[name]
        reached = np.flatnonzero(values >= level)
        if len(reached) == 0:
            return math.nan
        i = int(reached[0])
        if i == 0 or not math.isfinite(values[i - 1]):
            return float(cost[i])
        share = (level - values[i - 1]) / (values[i] - values[i - 1])
        return float(cost[i - 1] + share * (cost[i] - cost[i - 1]))

    def end(self, name: str) -> float:
        """The last value of a column."""
        return float(self.columns[name][-1])


class Estimate(NamedTuple):
    """A mean over runs and how sure it is."""

    mean: float
    half: float
    """Half the width of the 95 % confidence interval; NaN for a single run."""
    num_runs: int
    """Of runs; those without a value are left out."""
    p: float
    """Probability of a mean this far from 0 if the true one were 0 (two-sided t test); NaN for a single run."""

    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.mean) > self.half


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean, Student's t interval and test of independent values; NaNs are left out."""
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    count = len(found)
    if count == 0:
        return Estimate(math.nan, math.nan, 0, math.nan)
    mean = float(found.mean())
    if count == 1:
        return Estimate(mean, math.nan, 1, math.nan)
    error = float(found.std(ddof=1)) / math.sqrt(count)
    t = mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
    return Estimate(mean, t_quantile(LEVEL, count - 1) * error, count, t_test(t, count - 1))


def t_test(t: float, freedom: int) -> float:
    """Probability that Student's t is at least as far from 0 as ``t``.

    Exact for whole degrees of freedom: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    theta = math.atan2(abs(t), math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(theta) ** 2
        total += term
    inside = math.sin(theta) * total
    return max(0.0, 1 - (2 / math.pi * (theta + inside) if odd else inside))


def t_quantile(level: float, freedom: int) -> float:
    """How far from 0 Student's t stays with probability ``level``, e.g. 0.95."""
    low, high = 0.0, 1.0
    while t_test(high, freedom) > 1 - level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_test(middle, freedom) > 1 - level else (low, middle)
    return (low + high) / 2


def holm(ps: Sequence[float]) -> list[float]:
    """Corrected p values of several tests (Holm 1979): taking all below 0.05 for effects, the chance of even one
    false alarm is at most 5 %. NaNs are no tests and stay NaN.
    """
    order = sorted((i for i, p in enumerate(ps) if math.isfinite(p)), key=lambda i: ps[i])
    corrected, largest = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


def differences(curves: Sequence[Curve], baseline: Sequence[Curve], axis: str, cost: float, name: str) -> Estimate:
    """Method minus baseline at equal cost, over the seeds that both have."""
    partners = {curve.seed: curve for curve in baseline}
    pairs = [(curve, partners[curve.seed]) for curve in curves if curve.seed in partners]
    return estimate([curve.at(axis, cost, name) - partner.at(axis, cost, name) for curve, partner in pairs])


def verdict(found: Estimate, corrected: float) -> str:
    """What a difference and its p value after Holm's correction mean, in words."""
    if found.num_runs < 2:
        return "too few seeds to tell"
    if not found.excludes_zero():
        return "within noise"
    return "significant" if corrected < 1 - LEVEL else "not after correction"


def equal_cost(curves: Sequence[Curve], axis: str, budget: float) -> float:
    """The cost at which runs are compared: the budget, or the end of the shortest run if that comes first."""
    shortest = min(curve.end(axis) for curve in curves)
    return min(budget, shortest) if budget else shortest


class Band(NamedTuple):
    """A mean curve and its 95 % confidence band."""

    cost: np.ndarray
    """[N]"""
    mean: np.ndarray
    """[N]"""
    half: np.ndarray
    """[N] half of its width; NaN for a single run."""


def band(curves: Sequence[Curve], axis: str, name: str, budget: float, num_points: int = 61) -> Band:
    """Over the runs of one method, as far as all of them go and not beyond the budget."""
    cost = np.linspace(0, equal_cost(curves, axis, budget), num_points)
    found = [estimate([curve.at(axis, x, name) for curve in curves]) for x in cost]
    return Band(cost, np.array([e.mean for e in found]), np.array([e.half for e in found]))
