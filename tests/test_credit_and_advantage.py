"""From rewards of states to credit of steps to group-relative advantages."""

import pytest
import torch
from densegrpo.engine.advantage import GroupNorm
from densegrpo.engine.credit import broadcast_terminal, gain
from densegrpo.engine.data import StepRewards
from hypothesis import given, settings
from hypothesis import strategies as st

seeds = st.integers(0, 2**16)
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1])
NO_GROUPS = torch.zeros(0)
GLOBAL, JOINT = {"std_scope": "global"}, {"norm_axis": "joint"}
every_setting = pytest.mark.parametrize(
    "options", [{}, GLOBAL, JOINT, GLOBAL | JOINT, {"std_floor": 0.3}, GLOBAL | {"std_floor": 0.3}], ids=str
)


def table(seed=0, views=1, num_chains=7, num_states=5):
    """Rewards of states, [V, B, T+1]."""
    generator = torch.Generator().manual_seed(seed)
    return StepRewards(torch.randn(views, num_chains, num_states, generator=generator), torch.ones(views))


def credits_of(*rows):
    """One view of credit, [1, B, T]."""
    return torch.tensor([rows])


def normalise(credit, group=None, train=None, weights=None, **options):
    """GroupNorm without the ceremony."""
    rewards = StepRewards(torch.zeros(len(credit), 1, 1), torch.ones(len(credit)) if weights is None else weights)
    group = torch.zeros(credit.shape[1], dtype=torch.long) if group is None else group
    train = torch.ones(credit.shape[1:], dtype=torch.bool) if train is None else train
    return GroupNorm(**options)(credit, rewards, group, train)


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_gains_add_up_to_the_whole_improvement(seed):
    rewards = table(seed, views=2)
    expected = rewards.values[..., -1] - rewards.values[..., 0]
    torch.testing.assert_close(gain(rewards, NO_GROUPS).sum(-1), expected, atol=1e-5, rtol=1e-5)


def test_a_gain_is_the_reward_of_the_next_state_less_that_of_this_one():
    rewards = StepRewards(torch.tensor([[[1.0, 3.0, 2.5, 2.5]]]), torch.ones(1))
    assert gain(rewards, NO_GROUPS).tolist() == [[[2.0, -0.5, 0.0]]]


def test_broadcasting_gives_every_step_the_final_reward():
    rewards = StepRewards(torch.tensor([[[torch.nan, torch.nan, 2.0], [torch.nan, torch.nan, 3.0]]]), torch.ones(1))
    assert broadcast_terminal(rewards, NO_GROUPS).tolist() == [[[2.0, 2.0], [3.0, 3.0]]]


def test_an_unscored_state_costs_the_two_gains_beside_it():
    rewards = table()
    rewards.values[0, 2, 2] = torch.nan
    assert gain(rewards, NO_GROUPS)[0, 2].isnan().tolist() == [False, True, True, False]


def slowly(credit, valid, std_scope="group", norm_axis="step", std_floor=0.0):
    """The definition, element by element: credit [B, T] of one view -> advantages, not clipped."""
    known = [tuple(place) for place in valid.nonzero().tolist()]

    def peers(b, t, everyone, all_steps):
        return [(i, j) for i, j in known if (everyone or GROUP[i] == GROUP[b]) and (all_steps or j == t)]

    def mean(values, places):
        return sum(float(values[i, j]) for i, j in places) / len(places)

    joint, everyone = norm_axis == "joint", std_scope == "global"
    centred, found = torch.zeros_like(credit), torch.zeros_like(credit)
    for b, t in known:
        centred[b, t] = credit[b, t] - mean(credit, peers(b, t, False, joint))
    for b, t in known:
        own = mean(centred**2, peers(b, t, everyone, joint))
        pooled = mean(centred**2, peers(b, t, everyone, True))
        found[b, t] = centred[b, t] / ((own + std_floor**2 * pooled) ** 0.5 + 1e-4)
    return found


@every_setting
def test_advantages_are_what_a_loop_over_chains_and_steps_gives(options):
    """Two views, some steps not trained, one score missing."""
    credit, weights, train = (
        gain(table(1, views=2), NO_GROUPS),
        torch.tensor([1.0, -0.5]),
        torch.ones(7, 4, dtype=torch.bool),
    )
    train[0], train[2, 1], credit[1, 5, 2] = False, False, torch.nan
    valid = train & credit.isfinite().all(0)
    found = normalise(credit, GROUP, train, weights, advantage_clip=1000.0, **options)
    expected = slowly(credit[0], valid, **options) - 0.5 * slowly(credit[1], valid, **options)
    torch.testing.assert_close(found.values, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.mask, valid)


@every_setting
@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_advantages_of_a_group_have_mean_zero(options, seed):
    found = normalise(gain(table(seed), NO_GROUPS), GROUP, advantage_clip=1000.0, **options)
    for g in (0, 1):
        mean = found.values[GROUP == g].mean(0 if options.get("norm_axis") != "joint" else (0, 1))
        assert mean.abs().max() < 1e-4


@every_setting
@given(seed=seeds, shift=st.floats(-50, 50), scale=st.floats(0.1, 50))
@settings(max_examples=20, deadline=None)
def test_advantages_do_not_change_when_rewards_are_shifted_and_scaled(options, seed, shift, scale):
    credit = gain(table(seed), NO_GROUPS).double()
    before = normalise(credit, GROUP, std_eps=0.0, **options)
    after = normalise(credit * scale + shift, GROUP, std_eps=0.0, **options)
    torch.testing.assert_close(after.values, before.values, atol=1e-6, rtol=1e-6)


def test_one_groups_luck_does_not_change_anothers_advantages():
    credit = gain(table(), NO_GROUPS)
    lucky = credit + 100.0 * (GROUP == 1)[None, :, None]
    torch.testing.assert_close(normalise(lucky, GROUP).values, normalise(credit, GROUP).values, atol=1e-3, rtol=1e-3)


def test_the_groups_own_spread_makes_every_group_count_alike():
    calm_and_wild = credits_of([0.0], [1.0], [0.0], [100.0])
    group = torch.tensor([0, 0, 1, 1])
    own = normalise(calm_and_wild, group, std_eps=0.0)
    assert own.values.flatten().tolist() == pytest.approx([-1, 1, -1, 1])
    shared = normalise(calm_and_wild, group, std_eps=0.0, std_scope="global").values.flatten()
    std = ((0.5**2 * 2 + 50**2 * 2) / 4) ** 0.5
    assert shared.tolist() == pytest.approx([-0.5 / std, 0.5 / std, -50 / std, 50 / std])


def test_every_step_by_itself_or_all_steps_together():
    credit = credits_of([0.0, 10.0], [2.0, 30.0])
    each = normalise(credit, std_eps=0.0, norm_axis="step").values
    torch.testing.assert_close(each, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    std = (((0 - 10.5) ** 2 + 0.5**2 + 8.5**2 + 19.5**2) / 4) ** 0.5
    joint = normalise(credit, std_eps=0.0, norm_axis="joint").values
    torch.testing.assert_close(joint, torch.tensor([[-10.5, -0.5], [-8.5, 19.5]]) / std)


def test_the_floor_keeps_steps_of_pure_noise_small():
    """sqrt(std^2 + (floor * pooled)^2) + eps, by hand: stds 2 and 0.02, pooled sqrt((4 + 0.0004) / 2)."""
    credit, pooled = credits_of([-2.0, -0.02], [2.0, 0.02]), (4.0004 / 2) ** 0.5
    found = normalise(credit, std_floor=0.5, std_eps=0.01).values[1].tolist()
    expected = [value / ((value**2 + (0.5 * pooled) ** 2) ** 0.5 + 0.01) for value in (2.0, 0.02)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[1] < 0.05 < 0.9 < normalise(credit, std_eps=0.0).values[1, 1]


def test_large_advantages_are_clipped():
    credit = credits_of(*[[0.0]] * 99, [1.0])
    assert normalise(credit, std_eps=0.0, advantage_clip=1000.0).values.max().item() == pytest.approx(99**0.5, rel=1e-4)
    assert normalise(credit).values.max() == 5
    assert normalise(-credit, advantage_clip=2.0).values.min() == -2


@every_setting
def test_a_missing_score_is_masked_and_changes_nobody_else(options):
    credit = gain(table(), NO_GROUPS)
    credit[0, 1] = torch.nan
    others = torch.arange(7) != 1
    found, without = normalise(credit, GROUP, **options), normalise(credit[:, others], GROUP[others], **options)
    torch.testing.assert_close(found.values[others], without.values)
    assert torch.equal(found.mask[others], without.mask)
    assert not found.mask[1].any()
    assert (found.values[1] == 0).all()


@every_setting
def test_steps_that_are_not_trained_do_not_count(options):
    credit, train = gain(table(), NO_GROUPS), torch.ones(7, 4, dtype=torch.bool)
    train[1], train[:, 3] = False, False
    found = normalise(credit, GROUP, train, **options)
    wild = credit.clone()
    wild[:, 1], wild[:, :, 3] = 1e3, -1e3
    assert torch.equal(found.values, normalise(wild, GROUP, train, **options).values)
    assert torch.equal(found.mask, train)


def test_a_score_missing_in_one_view_masks_the_step_in_all():
    credit = gain(table(views=2), NO_GROUPS)
    credit[1, 0, 2] = torch.nan
    found = normalise(credit)
    assert not found.mask[0, 2]
    assert found.mask.sum() == 7 * 4 - 1
    assert found.values.isfinite().all()


@pytest.mark.parametrize("norm_axis", ["step", "joint"])
def test_a_group_with_a_single_scored_chain_teaches_nothing(norm_axis):
    credit = gain(table(), NO_GROUPS)
    credit[0, :3] = torch.nan
    found = normalise(credit, GROUP, norm_axis=norm_axis)
    assert not found.mask[:4].any()
    assert found.mask[4:].all()
    assert (found.values[:4] == 0).all()


def test_a_group_that_teaches_nothing_does_not_count_in_the_global_spread():
    credit = gain(table(), NO_GROUPS)
    credit[0, :3] = torch.nan
    found, without = normalise(credit, GROUP, **GLOBAL), normalise(credit[:, 4:], GROUP[4:], **GLOBAL)
    torch.testing.assert_close(found.values[4:], without.values)


def test_a_step_scored_in_a_single_chain_teaches_nothing_by_itself():
    credit = gain(table(), NO_GROUPS)
    credit[0, :3, 2] = torch.nan
    found = normalise(credit, GROUP)
    assert found.mask[:4].tolist() == [[True, True, False, True]] * 3 + [[True, True, False, True]]


@every_setting
@pytest.mark.parametrize("std_eps", [0.0, 1e-4])
def test_equal_rewards_teach_nothing_and_stay_finite(options, std_eps):
    """A group without differences has spread 0: its advantages are 0, not 0 / 0."""
    assert (normalise(torch.full((1, 7, 4), 0.25), GROUP, std_eps=std_eps, **options).values == 0).all()


@every_setting
def test_nothing_scored_is_all_masked(options):
    found = normalise(torch.full((1, 7, 4), torch.nan), GROUP, **options)
    assert not found.mask.any()
    assert (found.values == 0).all()


def test_views_are_normalised_alone_and_added_with_their_weights():
    credit = gain(table(views=3), NO_GROUPS)
    scaled = credit * torch.tensor([1.0, 1000.0, 0.001])[:, None, None]
    weights = torch.tensor([1.0, 0.5, -2.0])
    options = {"std_eps": 0.0, "advantage_clip": 1000.0}
    alone = torch.stack([normalise(view[None], GROUP, **options).values for view in credit])
    expected = (weights[:, None, None] * alone).sum(0)
    found = normalise(scaled, GROUP, weights=weights, **options)
    torch.testing.assert_close(found.values, expected, atol=1e-5, rtol=1e-4)


def test_a_view_of_weight_zero_does_not_matter():
    credit = gain(table(views=2), NO_GROUPS)
    found = normalise(credit, GROUP, weights=torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found.values, normalise(credit[:1], GROUP).values)


def test_the_names_of_groups_do_not_matter():
    credit = gain(table(), NO_GROUPS)
    assert torch.equal(normalise(credit, 40 - 7 * GROUP).values, normalise(credit, GROUP).values)


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 5 / 6])
@pytest.mark.parametrize("group_size", [2, 6, 7, 11, 24])
def test_equal_rewards_teach_nothing_however_small_the_eps(value, group_size):
    """Float32 misses the mean of seven times 0.7 by a rounding; divided by a spread as small, that was 0.86."""
    found = normalise(torch.full((1, group_size, 3), value), std_eps=1e-8)
    assert not found.values.any()
