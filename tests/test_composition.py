"""Several rewards as one advantage: GDPO, ranks, the smallest spread that teaches, and what is recorded of each."""

import pytest
import torch
from densegrpo.engine.advantage import GroupNorm, ranked, win_rate
from densegrpo.engine.config import make_config
from densegrpo.engine.data import StepRewards, ViewRules
from densegrpo.engine.distributed import Solo
from densegrpo.engine.recipes import make_recipe
from densegrpo.engine.reward_stats import correlation, one_reward
from densegrpo.engine.run import Run
from densegrpo.engine.session import Session
from densegrpo.engine.train import assign
from hypothesis import given, settings
from hypothesis import strategies as st

GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
TRAIN = torch.ones(8, 2, dtype=torch.bool)


def credit_of(*views):
    """Each view: 8 numbers, the same at both steps -> [V, 8, 2]."""
    return torch.tensor(views, dtype=torch.float64)[..., None].expand(-1, -1, 2)


def advantages(credit, weights=None, rules=None, **options):
    """[8] advantages at the first step."""
    weights = torch.ones(len(credit)) if weights is None else torch.tensor(weights)
    rewards = StepRewards(torch.zeros(len(credit), 1, 1), weights, rules or ViewRules())
    return GroupNorm(**options)(credit, rewards, GROUP, TRAIN).values[:, 0]


SMALL = [0.80, 0.81, 0.82, 0.83, 0.70, 0.72, 0.71, 0.73]
LARGE = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
gdpo = ViewRules((0.0, 0.0), (False, False), over_batch=True)


def test_gdpo_equals_its_formula():
    """A = (a - mean) / (std + eps) over the batch, a = sum_k w_k (r_k - mean_g) / (std_g + eps)."""
    eps, weights = 1e-4, [2.0, 0.5]
    a = torch.zeros(8, dtype=torch.float64)
    for w, row in zip(weights, (SMALL, LARGE), strict=True):
        r = torch.tensor(row, dtype=torch.float64)
        for g in (0, 1):
            own = r[g == GROUP]
            a[g == GROUP] += w * (own - own.mean()) / (own.std(correction=0) + eps)
    expected = (a - a.mean()) / (a.std(correction=0) + eps)
    found = advantages(credit_of(SMALL, LARGE), weights, gdpo, std_eps=eps)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@given(scale=st.floats(1e-2, 1e3), shift=st.floats(-10, 10), mode=st.sampled_from([ViewRules(), gdpo]))
@settings(max_examples=30, deadline=None)
def test_rescaling_one_reward_changes_nothing(scale, shift, mode):
    before = advantages(credit_of(SMALL, LARGE), rules=mode, std_eps=1e-9)
    after = advantages(credit_of([scale * x + shift for x in SMALL], LARGE), rules=mode, std_eps=1e-9)
    torch.testing.assert_close(after, before, atol=2e-3, rtol=1e-3)


def test_normalising_each_reward_lets_the_quiet_one_be_heard():
    """The numbers of the specification: a sum is deaf to a reward whose spread is a hundredth of the other's."""

    def agreement(found):
        own = torch.tensor(SMALL).view(2, 4)
        return torch.corrcoef(torch.stack([(own - own.mean(1, keepdim=True)).flatten(), found]))[0, 1]

    apart = advantages(credit_of(SMALL, LARGE), rules=gdpo)
    summed = advantages(credit_of([a + b for a, b in zip(SMALL, LARGE, strict=True)]))
    assert agreement(apart) > 0.6
    assert agreement(summed) < 0.3


def test_over_the_batch_the_advantages_have_mean_0_and_spread_1():
    found = advantages(credit_of(SMALL, LARGE), rules=gdpo)
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_a_batch_of_ties_teaches_nothing_even_over_the_batch():
    found = advantages(credit_of([0.3] * 8, [0.1] * 8), rules=gdpo)
    assert torch.equal(found, torch.zeros(8))


def test_masked_steps_do_not_count_over_the_batch():
    credit = credit_of(SMALL, LARGE).clone()
    credit[0, 3, :] = torch.nan
    found = advantages(credit, rules=gdpo)
    assert found[3] == 0
    others = found[torch.arange(8) != 3]
    assert others.mean().item() == pytest.approx(0, abs=1e-6)
    assert others.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_differences_below_min_std_are_noise_and_teach_nothing():
    quiet = [0.5, 0.5001, 0.4999, 0.5, 0.1, 0.9, 0.2, 0.8]
    free = advantages(credit_of(quiet))
    floored = advantages(credit_of(quiet), rules=ViewRules((1e-3,), (False,)))
    assert free[:4].abs().max() > 0.5, "without a floor noise is blown up"
    assert torch.equal(floored[:4], torch.zeros(4))
    assert torch.equal(floored[4:], free[4:])


QUIET = [0.5, 0.5001, 0.4999, 0.5]
OTHERS = {"each": ViewRules((1e-3,), (False,)), "gdpo": ViewRules((1e-3,), (False,), over_batch=True)}


def with_quiet(num_groups, rules, **options):
    """Advantages of a group that is heard, among some that are not."""
    credit = torch.tensor([0.1, 0.9, 0.2, 0.8, *QUIET * num_groups], dtype=torch.float64)
    group = torch.arange(1 + num_groups).repeat_interleave(4)
    rewards = StepRewards(torch.zeros(1, 1, 1), torch.ones(1), rules)
    mask = torch.ones(len(group), 2, dtype=torch.bool)
    return GroupNorm(**options)(credit[None, :, None].expand(-1, -1, 2), rewards, group, mask)


@pytest.mark.parametrize("norm_axis", ["step", "joint"])
@pytest.mark.parametrize(("mode", "std_scope"), [("each", "global"), ("gdpo", "group"), ("gdpo", "global")])
def test_what_a_group_learns_does_not_depend_on_how_many_others_are_silent(mode, std_scope, norm_axis):
    """The spread that divides is 0.3536, that of the one group, and not 0.3536 / 2 for three silent ones."""
    spread = (0.4**2 + 0.3**2) ** 0.5 / 2**0.5
    expected = [x / spread for x in (-0.4, 0.4, -0.3, 0.3)]
    for num_groups in (0, 1, 3):
        found = with_quiet(num_groups, OTHERS[mode], std_scope=std_scope, norm_axis=norm_axis)
        assert found.values[:4, 0].tolist() == pytest.approx(expected, abs=2e-3)
        assert not found.values[4:].any()
        assert found.mask.all(), "the KL penalty still holds them"


def test_groups_that_are_flat_but_have_no_floor_count_over_the_batch_as_the_papers_have_it():
    found = with_quiet(3, ViewRules((0.0,), (False,)), std_scope="global").values[:4, 0]
    assert found.tolist() == pytest.approx([x / (0.125 / 4) ** 0.5 for x in (-0.4, 0.4, -0.3, 0.3)], abs=2e-3)


def test_a_group_that_is_silent_for_one_reward_still_counts_for_the_other():
    """Each is heard in one view: +-2 and +-1 by the weights, divided by the spread of both."""
    rules = ViewRules((0.1, 0.1), (False, False), over_batch=True)
    first, second = [0.0, 1.0, 0.0, 1.0, *QUIET], [*QUIET, 1.0, 0.0, 1.0, 0.0]
    found = advantages(credit_of(first, second), [2.0, 1.0], rules, std_scope="global")
    expected = [x / 2.5**0.5 for x in (-2, 2, -2, 2, 1, -1, 1, -1)]
    assert found.tolist() == pytest.approx(expected, abs=2e-3)


def test_the_floor_of_a_steps_spread_does_not_make_noise_loud():
    """``std_floor`` adds the spread of the other steps to the divisor; what is noise is noise all the same."""
    credit = torch.tensor([[0.0, 0.5], [1.0, 0.5001], [0.0, 0.4999], [1.0, 0.5]], dtype=torch.float64)[None]
    rewards = StepRewards(torch.zeros(1, 1, 1), torch.ones(1), ViewRules((1e-3,), (False,)))
    found = GroupNorm(std_floor=0.5)(credit, rewards, GROUP[:4], torch.ones(4, 2, dtype=torch.bool)).values
    assert found[:, 0].abs().min() > 0.5
    assert not found[:, 1].any()


def test_min_std_silences_one_reward_and_not_the_other():
    rules = ViewRules((0.1, 0.0), (False, False))
    found = advantages(credit_of([0.5, 0.51, 0.49, 0.5] * 2, LARGE), rules=rules)
    torch.testing.assert_close(found, advantages(credit_of(LARGE)))


def test_a_rank_is_the_part_of_the_others_that_is_beaten():
    values = torch.tensor([[0.1], [0.9], [0.5], [0.9], [float("nan")]])
    assert win_rate(values).flatten()[:4].tolist() == pytest.approx([0, 2.5 / 3, 1 / 3, 2.5 / 3])
    assert win_rate(values)[4].isnan()


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=12))
@settings(max_examples=60, deadline=None)
def test_ranks_average_to_a_half_and_keep_the_order(numbers):
    values = torch.tensor(numbers).float()[:, None]
    ranks = win_rate(values).flatten()
    assert ranks.mean().item() == pytest.approx(0.5, abs=1e-5)
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            assert (ranks[i] < ranks[j]) == (a < b)


def test_ranks_of_differences_that_are_noise_are_ties():
    values = torch.tensor([0.5, 0.5 + 1e-7, 0.5 - 1e-7, 0.5, 0.1, 0.9, 0.2, 0.8]).view(1, 8, 1)
    found = ranked(StepRewards(values, torch.ones(1), ViewRules((1e-3,), (True,))), GROUP).values[0, :, 0]
    assert found[:4].tolist() == [0.5] * 4
    assert found[4:].tolist() == pytest.approx([0, 1, 1 / 3, 2 / 3])


@pytest.mark.parametrize("std_scope", ["group", "global"])
def test_min_std_is_a_difference_of_scores_also_where_ranks_are_trained_on(std_scope):
    """Ranks differ by less than 0.4 whatever the scores; a floor of 5 must not silence scores from 0 to 100."""
    recipe = make_recipe("flow_grpo", group_size=4, num_updates=1, std_scope=std_scope)
    plan = recipe.plan((1, 2, 2), torch.linspace(1, 0, 4), (0, 0, 0))

    def found(scores):
        values = torch.full((1, 4, 4), torch.nan)
        values[0, :, -1] = torch.tensor(scores)
        return assign(recipe, StepRewards(values, torch.ones(1), ViewRules((5.0,), (True,))), plan, Solo())[1].values

    ranks = torch.tensor([0.0, 1 / 3, 2 / 3, 1]) - 0.5
    torch.testing.assert_close(
        found([0.0, 20.0, 50.0, 100.0])[:, 0], ranks / ranks.std(correction=0), atol=1e-3, rtol=0
    )
    assert not found([0.0, 1.0, 2.0, 3.0]).any()


def test_groups_whose_ranks_all_tie_are_silent_and_a_floor_of_other_rewards_stays_theirs():
    quiet, scores = [1.0, 2.0, 3.0, 4.0], [0.0, 20.0, 50.0, 100.0]
    values = torch.tensor([scores + quiet, scores + quiet])[..., None]
    found = ranked(StepRewards(values, torch.ones(2), ViewRules((5.0, 5.0), (True, False))), GROUP)
    assert 0 < found.rules.min_std[0] < 1e-3, "less than any rank but for ties"
    assert found.rules.min_std[1] == 5
    single = StepRewards(found.values[:1], torch.ones(1), ViewRules(found.rules.min_std[:1], (True,)))
    credit = found.values[:1].expand(-1, -1, 2)
    own = GroupNorm(std_scope="group")(credit, single, GROUP, TRAIN).values
    torch.testing.assert_close(GroupNorm(std_scope="global")(credit, single, GROUP, TRAIN).values, own)


def test_an_image_alone_is_neither_good_nor_bad():
    assert win_rate(torch.tensor([[7.0]])).item() == 0.5


def test_only_the_views_that_ask_for_it_are_ranked_and_each_group_by_itself():
    values = torch.arange(8.0).view(1, 8, 1).repeat(2, 1, 3)
    rewards = StepRewards(values, torch.ones(2), ViewRules((0.0, 0.0), (False, True)))
    found = ranked(rewards, GROUP).values
    assert torch.equal(found[0], values[0])
    assert found[1, :, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1] * 2)


def test_training_on_ranks_takes_nothing_but_their_order():
    """One image that is far better than the others makes them all alike, unless ranks count."""
    recipe = make_recipe("flow_grpo", group_size=4, num_updates=1)
    plan = recipe.plan((1, 2, 2), torch.linspace(1, 0, 4), (0, 0, 0))

    def found(scores, rank):
        values = torch.full((1, 4, 4), torch.nan)
        values[0, :, -1] = torch.tensor(scores)
        return assign(recipe, StepRewards(values, torch.ones(1), ViewRules((0.0,), (rank,))), plan, Solo())[1].values

    even, far = [0.0, 1.0, 2.0, 3.0], [0.0, 0.1, 0.2, 100.0]
    torch.testing.assert_close(found(far, True), found(even, True))
    torch.testing.assert_close(found(even, True), found(even, False), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found(far, False), found(even, False), atol=0.1)


def test_the_record_of_one_reward():
    scores = torch.tensor([1.0, 3.0, 5.0, torch.nan, 2.0, 2.0, 2.0, 2.0])
    found = one_reward(scores, torch.zeros(8).bool(), GROUP)
    assert found["mean"] == pytest.approx(17 / 7)
    assert found["group_std"] == pytest.approx(((8 / 3) ** 0.5 + 0) / 2)
    assert found["flat_groups"] == 0.5
    assert found["missing"] == pytest.approx(1 / 8)


def test_correlation_looks_inside_groups_only():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 11.0, 12.0, 13.0, 14.0])
    inside = torch.tensor([4.0, 3.0, 2.0, 1.0, 24.0, 23.0, 22.0, 21.0])
    assert correlation(a, inside, GROUP) == pytest.approx(-1)
    assert correlation(a, a * 2 + 1, GROUP) == pytest.approx(1)
    assert correlation(a, torch.ones(8), GROUP) != correlation(a, torch.ones(8), GROUP), "NaN for a constant"


def run_of(tmp_path, rewards, mode="each", **more):
    config = {
        "name": "mixed",
        "model": {"name": "demo"},
        "method": {"name": "dense_grpo", "group_size": 4, "kl_weight": 0.0},
        "rewards": rewards,
        "reward_mode": mode,
        "prompts": ["a red circle", "two blue squares"],
        "training": {"iterations": 1, "groups": 2, "num_steps": 3},
        **more,
    }
    run = Run.create(make_config(config), tmp_path, tmp_path)
    list(Session(run).execute())
    return run.metrics()[-1]


@pytest.mark.parametrize("mode", ["each", "gdpo", "sum"])
def test_every_reward_of_a_run_is_recorded_by_itself(tmp_path, mode):
    rewards = [{"name": "brightness"}, {"name": "brightness", "target": 0.0, "weight": 0.5}, {"name": "colourfulness"}]
    row = run_of(tmp_path, rewards, mode)
    assert set(row["rewards"]) == {"brightness", "darkness", "colourfulness"}
    assert row["rewards"]["brightness"]["mean"] + row["rewards"]["darkness"]["mean"] == pytest.approx(1, abs=1e-5)
    assert row["reward_correlation"]["brightness / darkness"] == pytest.approx(-1, abs=1e-3)
    assert row["rewards"]["brightness"]["missing"] == 0


def test_ranks_and_floors_run_with_probes_of_every_state(tmp_path):
    row = run_of(tmp_path, [{"name": "brightness", "rank": True}, {"name": "colourfulness", "min_std": 100.0}], "gdpo")
    assert row["grad_norm"] > 0


def test_a_reward_below_its_floor_alone_teaches_nothing(tmp_path):
    assert run_of(tmp_path, [{"name": "brightness", "min_std": 100.0}])["policy_loss"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [{"name": "brightness", "weight": 0.0}]}, "brightness has weight 0; remove it, or put it into"),
        ({"held_out_rewards": [{"name": "human_vote"}]}, "human_vote asks people, who are not asked in evaluations"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(change, message):
    config = {"name": "n", "model": {"name": "demo"}, "method": {"name": "flow_grpo"}, "prompts": ["a red circle"]}
    with pytest.raises(ValueError, match=message):
        make_config(config | {"rewards": [{"name": "brightness"}]} | change)


@pytest.mark.parametrize("option", [{"rank": True}, {"min_std": 0.1}])
def test_what_needs_groups_cannot_be_had_of_a_sum(option):
    config = {
        "name": "n",
        "model": {"name": "demo"},
        "method": {"name": "flow_grpo"},
        "rewards": [{"name": "brightness", **option}],
        "reward_mode": "sum",
        "prompts": ["a red circle"],
    }
    with pytest.raises(
        ValueError, match=r"brightness has rank or min_std, but reward_mode 'sum' .* use 'each' or 'gdpo'"
    ):
        make_config(config)
