"""TP-GRPO's credit: where a chain turns for good, what that is worth, and as many good turns as bad ones."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from densegrpo.engine.advantage import GroupNorm
from densegrpo.engine.credit import TurningPoints, aggregate, balanced, gain
from densegrpo.engine.data import StepRewards
from densegrpo.engine.recipes import make_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

GOLDEN = json.loads((Path(__file__).parent / "golden" / "turning_points.json").read_text())
OPTIONS = [
    {"consistent": consistent, "balance": balance, "balance_by": by}
    for consistent in (True, False)
    for balance in ("off", "group", "batch")
    for by in ("aggregate", "trend")
]
every_variant = pytest.mark.parametrize("consistent", [True, False], ids=["consistent", "unconstrained"])
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(str(v) for v in o.values()))
random_rewards = given(seed=st.integers(0, 2**16), ties=st.booleans())
quick = settings(max_examples=40, deadline=None)
GROUP = torch.tensor([0, 1, 0, 2, 1, 0, 0, 2])


def rewards_of(*rows):
    """One view, [1, B, T+1]."""
    return StepRewards(torch.tensor([rows], dtype=torch.float32), torch.ones(1))


def random_table(seed, ties):
    """Two views of eight chains with seven states; with ``ties`` in steps of a half, which leaves many gains 0."""
    values = torch.randn(2, 8, 7, generator=torch.Generator().manual_seed(seed))
    return StepRewards((values * 2).round() / 2 if ties else values, torch.ones(2))


def credit_of(*rows, group=None, **options):
    """[B][T] of one view."""
    group = torch.zeros(len(rows), dtype=torch.long) if group is None else torch.tensor(group)
    return TurningPoints(**options)(rewards_of(*rows), group)[0].tolist()


def marks_of(*rows, group=None, **options):
    """[(chain, step)] of one view."""
    group = torch.zeros(len(rows), dtype=torch.long) if group is None else torch.tensor(group)
    return [tuple(place) for place in TurningPoints(**options).mark(rewards_of(*rows), group)[0].nonzero().tolist()]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['seed']} {c['consistent']} {c['balanced']}")
def test_step_rewards_equal_those_of_the_authors_code(case):
    balance = "batch" if case["balanced"] else "off"
    found = credit_of(*case["rewards"], consistent=case["consistent"], balance=balance, balance_by="trend")
    assert torch.equal(torch.tensor(found), torch.tensor(case["step_rewards"]))


def test_the_golden_cases_have_both_variants_both_balancings_and_ties():
    kinds = {(case["consistent"], case["balanced"]) for case in GOLDEN}
    assert (len(GOLDEN), kinds) == (23, {(True, False), (True, True), (False, False)})
    assert any((torch.tensor(case["rewards"]).diff() == 0).any() for case in GOLDEN)


@pytest.mark.parametrize("consistent", [True, False])
def test_the_first_noisy_step_has_no_step_before_it(consistent):
    """In a window that starts later, the ODE steps before it gain nothing and go against no trend."""
    rewards, group = rewards_of([0.0, 0.0, 0.0, 1.0, 3.0, 3.0]), torch.zeros(1, dtype=torch.long)
    method, noisy = (
        TurningPoints(consistent=consistent, balance="off"),
        torch.tensor([[False, False, True, True, False]]),
    )
    assert method.mark(rewards, group, noisy)[0].nonzero().tolist() == [[0, 2]]
    assert method(rewards, group, noisy)[0].tolist() == [[0.0, 0.0, 3.0, 2.0, 0.0]]
    assert not method.mark(rewards, group).any()


def sign(value):
    return (value > 0) - (value < 0)


def is_turning_point(reward, k, consistent):
    """Definitions 4.1 and 5.1 and the rule of the first step, for one chain: ``reward`` is a list of T+1 numbers."""
    gains, trend = [b - a for a, b in pairwise(reward)], reward[-1] - reward[0]
    follows = [sign(g) * sign(trend) for g in gains]
    if consistent and sign(gains[k]) * sign(reward[-1] - reward[k + 1]) <= 0:
        return False
    return follows[k] > 0 and (k == 0 or follows[k - 1] < 0)


@every_variant
@random_rewards
@quick
def test_turning_points_are_those_of_the_definition(consistent, seed, ties):
    table = random_table(seed, ties)
    found = TurningPoints(consistent=consistent, balance="off").mark(table, GROUP)
    rows = table.values.double().tolist()
    expected = [[[is_turning_point(row, k, consistent) for k in range(6)] for row in view] for view in rows]
    assert found.tolist() == expected


def test_a_turning_point_gets_the_whole_gain_to_the_end():
    """Down, then up twice: the second step turns, and is paid 2 - (-1) = 3 instead of 1."""
    assert credit_of([0.0, -1.0, 0.0, 2.0]) == [[-1.0, 3.0, 2.0]]
    assert credit_of([0.0, 1.0, 0.0, -2.0]) == [[1.0, -3.0, -2.0]]


def test_the_first_step_turns_when_it_follows_the_trend():
    assert credit_of([0.0, 1.0, 3.0]) == [[3.0, 2.0]]
    assert credit_of([0.0, -1.0, -3.0]) == [[-3.0, -2.0]]
    assert marks_of([0.0, -1.0, 3.0]) == []


def test_under_the_constraint_the_first_step_must_not_overshoot():
    assert credit_of([0.0, 2.0, 1.0], consistent=False) == [[1.0, -1.0]]
    assert credit_of([0.0, 2.0, 1.0], consistent=True) == [[2.0, -1.0]]


def test_the_last_step_turns_only_without_the_constraint_and_then_nothing_changes():
    chain = [0.0, -1.0, 1.0]
    assert marks_of(chain, consistent=True) == []
    assert marks_of(chain, consistent=False) == [(0, 1)]
    assert credit_of(chain, consistent=False) == [[-1.0, 2.0]]


@every_variant
@pytest.mark.parametrize(
    "chain",
    [
        [0.0, 0.0, 1.0, 2.0],  # nothing happened before the rise
        [0.0, -1.0, -1.0, 1.0, 2.0],  # the fall and the rise are not neighbours
        [0.0, -1.0, 1.0, 0.0],  # it ends where it began
        [1.0, 1.0, 1.0, 1.0],
    ],
)
def test_a_step_that_changed_nothing_makes_no_turning_point(chain, consistent):
    assert marks_of(chain, consistent=consistent) == []
    assert torch.equal(torch.tensor(credit_of(chain, consistent=consistent)), torch.tensor([chain]).diff())


@every_option
@random_rewards
@quick
def test_a_step_without_turning_point_gets_its_own_gain(options, seed, ties):
    table, method = random_table(seed, ties), TurningPoints(**options)
    marks, found = method.mark(table, GROUP), method(table, GROUP)
    assert torch.equal(found[~marks], gain(table, GROUP)[~marks])
    assert torch.equal(found[marks], aggregate(table)[marks])


@random_rewards
@quick
def test_the_constraint_only_removes_turning_points(seed, ties):
    """Definition 5.1 is 4.1 with one more condition; for the first step it implies that of 4.1."""
    table = random_table(seed, ties)
    strict, loose = (TurningPoints(consistent=c, balance="off").mark(table, GROUP) for c in (True, False))
    assert not (strict & ~loose).any()


@random_rewards
@quick
def test_under_the_constraint_a_turning_point_gets_more_of_the_same_sign(seed, ties):
    """Appendix C.2."""
    table = random_table(seed, ties)
    marks = TurningPoints().mark(table, GROUP)
    whole, own = aggregate(table)[marks], gain(table, GROUP)[marks]
    assert torch.equal(whole.sign(), own.sign())
    assert (whole.abs() > own.abs()).all()


@every_variant
@random_rewards
@quick
def test_turned_upside_down_a_chain_turns_at_the_same_steps(consistent, seed, ties):
    table, method = random_table(seed, ties), TurningPoints(consistent=consistent)
    upside_down = StepRewards(-table.values, table.weights)
    assert torch.equal(
        TurningPoints(consistent=consistent, balance="off").mark(table, GROUP),
        TurningPoints(consistent=consistent, balance="off").mark(upside_down, GROUP),
    )
    if not ties:
        assert torch.equal(method.mark(table, GROUP), method.mark(upside_down, GROUP))


@every_option
@given(seed=st.integers(0, 2**16), state=st.integers(0, 6))
@quick
def test_an_unscored_state_makes_no_turning_point_and_masks_its_gains(options, seed, state):
    table = random_table(seed, False)
    table.values[0, 3, state] = torch.nan
    marks, found = TurningPoints(**options).mark(table, GROUP), TurningPoints(**options)(table, GROUP)
    beside = [k for k in (state - 1, state) if 0 <= k < 6]
    assert not marks[0, 3, beside].any()
    assert found[0, 3].isnan().nonzero().flatten().tolist() == beside
    if state in (0, 6):
        assert not marks[0, 3].any()
    if state < 5 and state > 0:
        assert not marks[0, 3, state + 1], "what happened before it is unknown"
    others = found[0, torch.arange(8) != 3], found[1]
    assert all(part.isfinite().all() for part in others)


def test_an_unscored_state_is_not_trained():
    recipe = make_recipe("tp_grpo")
    table, train = random_table(0, False), torch.ones(8, 6, dtype=torch.bool)
    table.values[0, 0, 2] = torch.nan
    mask = recipe.normalise(recipe.credit(table, GROUP), table, GROUP, train).mask
    assert mask[0].tolist() == [True, False, False, True, True, True]
    assert mask.sum() == 8 * 6 - 2


SMALL_LATE = [0.0, 6.0, 4.0, 4.5, 5.0]
"""Turns at step 2: 1 to the end, 5 in all."""
LARGE_EARLY = [0.0, -3.0, -1.0, 0.0, 2.0]
"""Turns at step 1: 5 to the end, 2 in all."""
DOWN = [0.0, 1.0, -1.0, -2.0, -3.0]
"""Turns at step 1: -4 to the end, -3 in all."""


def test_the_largest_of_the_larger_side_stay():
    three = (SMALL_LATE, LARGE_EARLY, DOWN)
    assert marks_of(*three, balance="off") == [(0, 2), (1, 1), (2, 1)]
    assert marks_of(*three, balance="batch", balance_by="aggregate") == [(1, 1), (2, 1)]
    assert marks_of(*three, balance="batch", balance_by="trend") == [(0, 2), (2, 1)]


def test_a_turning_point_that_was_one_too_many_gets_its_own_gain():
    assert credit_of(SMALL_LATE, LARGE_EARLY, DOWN) == [
        [6.0, -2.0, 0.5, 0.5],
        [-3.0, 5.0, 1.0, 2.0],
        [1.0, -4.0, -1.0, -1.0],
    ]


def test_the_larger_side_may_be_the_bad_one():
    upside_down = ([-r for r in chain] for chain in (SMALL_LATE, LARGE_EARLY, DOWN))
    assert marks_of(*upside_down) == [(1, 1), (2, 1)]


def test_balancing_looks_at_the_whole_batch_or_at_each_group():
    """In its own group the small one has no rival, and a side that is empty removes nothing."""
    three = (SMALL_LATE, LARGE_EARLY, DOWN)
    assert marks_of(*three, group=[0, 1, 1], balance="group") == [(0, 2), (1, 1), (2, 1)]
    assert marks_of(*three, group=[0, 1, 1], balance="batch") == [(1, 1), (2, 1)]
    assert marks_of(*three, group=[0, 0, 0], balance="group") == [(1, 1), (2, 1)]


def test_one_side_alone_stays():
    assert marks_of(SMALL_LATE, LARGE_EARLY) == [(0, 2), (1, 1)]
    assert marks_of(DOWN, DOWN) == [(0, 1), (1, 1)]


def test_each_view_is_balanced_by_itself():
    views = [rewards_of(SMALL_LATE, LARGE_EARLY, DOWN).values, rewards_of(SMALL_LATE, DOWN, DOWN).values]
    rewards = StepRewards(torch.cat(views), torch.ones(2))
    alone = [TurningPoints().mark(StepRewards(view, torch.ones(1)), torch.zeros(3)) for view in views]
    assert torch.equal(TurningPoints().mark(rewards, torch.zeros(3)), torch.cat(alone))


@every_variant
@pytest.mark.parametrize("by", ["aggregate", "trend"])
@random_rewards
@quick
def test_after_balancing_there_are_as_many_good_as_bad_turning_points(consistent, by, seed, ties):
    table = random_table(seed, ties)
    size = aggregate(table) if by == "aggregate" else (table.values[..., -1:] - table.values[..., :1]).expand(2, 8, 6)
    before = TurningPoints(consistent=consistent, balance="off").mark(table, GROUP)
    for balance in ("batch", "group"):
        after = TurningPoints(consistent=consistent, balance=balance, balance_by=by).mark(table, GROUP)
        assert not (after & ~before).any(), "balancing only removes"
        for chains in [torch.ones(8, dtype=torch.bool)] if balance == "batch" else [GROUP == g for g in range(3)]:
            for view in range(2):
                was, now, sizes = before[view, chains], after[view, chains], size[view, chains]
                good, bad = ((was & (sizes > 0)).sum(), (was & (sizes < 0)).sum())
                kept = [int((now & side).sum()) for side in (sizes > 0, sizes < 0)]
                assert kept == ([min(good, bad)] * 2 if min(good, bad) else [good, bad])
                removed = was & ~now
                for side in (sizes > 0, sizes < 0):
                    if (removed & side).any():
                        assert sizes[removed & side].abs().max() <= sizes[now & side].abs().min()


def test_a_turning_point_worth_nothing_is_on_neither_side():
    """Possible without the constraint: R_2 = R_T. It is paid 0, whoever else there is."""
    level = [0.0, 3.0, 2.0, 4.0, 2.0]
    assert marks_of(level, consistent=False, balance="off") == [(0, 0), (0, 2)]
    for others in ([], [DOWN], [DOWN, LARGE_EARLY]):
        assert (0, 2) in marks_of(level, *others, consistent=False)
        assert credit_of(level, *others, consistent=False)[0][2] == 0


def test_nothing_to_balance_changes_nothing():
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert not balanced(nothing, torch.randn(3, 4)).any()


def test_every_step_is_compared_with_the_same_step_of_its_prompt():
    """The recipe: turning points over the batch, then a z-score per prompt and step."""
    recipe = make_recipe("tp_grpo", std_eps=0.0)
    assert recipe.normalise == GroupNorm(std_eps=0.0)
    table, train = random_table(3, False), torch.ones(8, 6, dtype=torch.bool)
    credit = recipe.credit(table, GROUP)
    found = recipe.normalise(credit, table, GROUP, train).values
    for g in range(3):
        own = credit[:, GROUP == g]
        score = (own - own.mean(1, keepdim=True)) / own.std(1, correction=0, keepdim=True)
        torch.testing.assert_close(found[GROUP == g], score.sum(0).clamp(-5, 5), atol=1e-5, rtol=1e-5)
