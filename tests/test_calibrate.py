"""Calibrated exploration: how the rules move, what a calibration finds, and what its table may be used for."""

import json
import math
import re

import pytest
import torch
from densegrpo.engine import cli
from densegrpo.engine.calibrate import (
    Balance,
    Faithful,
    Robust,
    balance_of,
    calibrate,
    make_calibration,
    rate_of_excess,
)
from densegrpo.engine.calibration_picture import draw_table
from densegrpo.engine.config import read_config
from densegrpo.engine.data import Prompt, StepRewards
from densegrpo.engine.noise_table import describe, imbalance, make_table, read_table, write_table
from densegrpo.engine.protocols import RewardResult
from densegrpo.engine.recipes import make_recipe
from densegrpo.engine.rewards import Panel
from densegrpo.engine.rewards.brightness import Brightness
from densegrpo.engine.run import Run
from densegrpo.engine.schedule import shifted_linear
from densegrpo.engine.session import Session
from densegrpo.engine.train import RewardError
from gaussian_flow import GaussianFlow

PROMPTS = [Prompt("a" * n, {}) for n in (5, 20)]
CONFIG = {
    "name": "tiny",
    "model": {"name": "demo"},
    "method": {"name": "dense_grpo", "group_size": 3, "noise": 1.5},
    "rewards": [{"name": "brightness", "target": 0.0}],
    "prompts": ["a red circle", "two blue squares"],
    "lora": {"rank": 2, "alpha": 4.0},
    "training": {"iterations": 1, "groups": 1, "num_steps": 4},
}
TINY = ["--rounds", "2", "--trajectories", "6", "--measured", "6"]
BY_HAND = {"kernel": "sde", "sigmas": shifted_linear(4).tolist(), "rates": [0.9, 0.8, 0.7, 0.6]}


class Cleanness:
    """Punishes every element's distance from grey: noise that the chain cannot remove costs reward."""

    def __call__(self, batch):

        return RewardResult(-(batch.images - 0.5).square().flatten(1).mean(1))

    def validate(self, prompts, metadata):
        return []


class Silent(Cleanness):
    """Has no score for anything."""

    def __call__(self, batch):
        raise RuntimeError("the service is down")


def counts(positive, negative):
    return Balance(torch.tensor([float(positive)]), torch.tensor([float(negative)]), torch.tensor([40.0]))


def moved(rule, positive, negative, rate=1.0, progress=0.0):
    return rule(torch.tensor([rate]), counts(positive, negative), progress).item()


def rounds_of(options, noise=2.0, reward=None, seed=0, batch=64, num_steps=6, **method):
    flow, panel = GaussianFlow(), Panel([("r", reward or Cleanness(), 1.0)])
    recipe = make_recipe("dense_grpo", noise=noise, **method)
    cond = flow.encode([p.text for p in PROMPTS])
    found = calibrate(
        flow, cond, PROMPTS, panel, recipe, *make_calibration(options), num_steps=num_steps, seed=seed, batch=batch
    )
    return list(found)


def one_sided(found):
    """Mean |imbalance| over the noisy steps."""
    return found.balance.imbalance[:-1].abs().mean().item()


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        (4, 3, 1.01),
        (3, 4, 1.01),
        (5, 3, 0.99),
        (3, 5, 0.99),
        (9, 0, 0.99),
        (0, 9, 0.99),
        (0, 0, 1.01),
        (1, 0, 1.01),
        (16, 16, 1.01),
        (17, 15, 0.99),
    ],
)
def test_the_faithful_rule_is_algorithm_1(positive, negative, expected):
    assert moved(Faithful(), positive, negative) == pytest.approx(expected)


def test_the_faithful_rule_counts_ties_in_neither_class_so_they_raise_the_noise():
    gains = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0]])
    balance = balance_of(StepRewards(gains[None], torch.ones(1)))
    assert balance.positive.tolist() == [0, 2]
    assert balance.negative.tolist() == [0, 1]
    assert balance.scored.tolist() == [3, 3]
    assert Faithful()(torch.ones(2), balance, 0.0).tolist() == pytest.approx([1.01, 1.01])


def test_the_faithful_rule_lowers_balanced_noise_when_there_are_many_trajectories():
    """|difference| < 2 of 32 fair coins happens 14 times in 100, which is why ours differs."""
    flips = torch.distributions.Binomial(32, torch.tensor(0.5))
    torch.manual_seed(0)
    ups = [moved(Faithful(), up, 32 - up) > 1 for up in flips.sample((400,)).tolist()]
    assert 0.08 < sum(ups) / len(ups) < 0.2
    torch.manual_seed(0)
    ups = [moved(Robust(), up, 32 - up) > 1 for up in flips.sample((400,)).tolist()]
    assert sum(ups) / len(ups) > 0.75


@pytest.mark.parametrize("number", [6, 7, 8, 15, 40, 200])
def test_the_robust_rule_raises_balanced_noise_more_often_than_not(number):
    """By the exact binomial distribution."""
    ways = sum(math.comb(number, up) for up in range(number + 1) if moved(Robust(), up, number - up) > 1)
    assert ways / 2**number > 0.5


def test_the_robust_rule_grows_when_balanced_and_shrinks_when_not():
    rule = Robust(tolerance=0.25, stride=0.2)
    assert moved(rule, 16, 16) == pytest.approx(1.2)
    assert moved(rule, 20, 12) == pytest.approx(1.2)
    assert moved(rule, 21, 11) == pytest.approx(1 / 1.2)
    assert moved(rule, 11, 21) == pytest.approx(1 / 1.2)
    assert moved(Robust(tolerance=0.5), 21, 11) > 1


def test_the_robust_rule_moves_less_and_less():
    rule = Robust(stride=0.2)
    assert moved(rule, 16, 16, progress=0.5) == pytest.approx(1.1)
    assert moved(rule, 30, 2, progress=0.5) == pytest.approx(1 / 1.1)


def test_the_robust_rule_leaves_a_step_alone_when_almost_nothing_changed():
    assert moved(Robust(), 0, 0) == moved(Robust(), 5, 0) == moved(Robust(), 0, 5) == 1
    assert moved(Robust(), 6, 0) < 1


def test_the_robust_result_is_the_average_of_the_last_rounds():
    tried = torch.tensor([[9.0], [1.0], [2.0], [3.0]])
    assert Robust(averaged=2).result(tried).item() == 2.5
    assert Robust(averaged=100).result(tried).item() == 3.75
    assert Faithful().result(tried).item() == 3


def test_the_limits_of_the_rules():
    sigmas = shifted_linear(6)
    low, high = Robust(lowest=0.1, highest=1.0, excess=1.0).limits(sigmas, "sde")
    assert low.tolist() == pytest.approx([0.1] * 6)
    assert high.tolist() == [1] * 6
    low, high = Robust(excess=0.001).limits(sigmas, "sde")
    assert (high < 3.5).all()
    assert (low <= high).all()
    assert Robust(highest=3.5).limits(sigmas, "cps")[1].tolist() == [1] * 6
    assert Faithful().limits(sigmas, "cps")[1].tolist() == [1] * 6
    assert (Faithful().limits(sigmas, "sde")[0] > 0).all()


@pytest.mark.parametrize("excess", [0.01, 0.05, 0.3])
def test_a_step_at_the_rate_of_an_excess_leaves_that_much_noise(excess):
    """By the step's own arithmetic: x = sigma e; the model knows e exactly, so velocity = e and x_0 = 0."""
    sigmas = shifted_linear(6)
    recipe = make_recipe("dense_grpo")
    for t, rate in enumerate(rate_of_excess(sigmas, excess).tolist()):
        noise = torch.ones(1, 1, 1, 1)
        here, there = sigmas[t][None], sigmas[t + 1][None]
        dist = recipe.noise.step.step(here * noise, noise, here, there, torch.tensor([rate]))
        left = (dist.mean.square() + dist.std.square()).sqrt().item()
        assert left == pytest.approx(there.item() + excess, abs=1e-4)


def test_several_rewards_are_counted_on_one_scale():
    small, large = torch.tensor([[0.002], [-0.001]]), torch.tensor([[-100.0], [-100.0]])
    balance = balance_of(StepRewards(torch.stack([small, large]), torch.tensor([3.0, 1.0])))
    assert (balance.positive.item(), balance.negative.item()) == (1, 1)


def test_unknown_rewards_count_nowhere():
    balance = balance_of(StepRewards(torch.tensor([[[math.nan], [1.0]]]), torch.ones(1)))
    assert (balance.positive.item(), balance.negative.item(), balance.scored.item()) == (1, 0, 1)


@pytest.mark.parametrize(
    ("options", "noise"),
    [({"rule": "robust", "excess": 1.0}, 2.0), ({"rule": "faithful", "eps2": 0.05, "trajectories": 9}, 1.2)],
    ids=["robust", "faithful"],
)
def test_calibration_reduces_the_imbalance_of_far_too_much_noise(options, noise):
    found = rounds_of({"rounds": 25, "trajectories": 32, "measured": 200} | options, noise)
    before, after = one_sided(found[0]), one_sided(found[-1])
    assert before > 0.3
    assert after < before - 0.1


def test_little_noise_of_a_balanced_reward_is_raised():
    found = rounds_of({"rounds": 8, "measured": 6, "highest": 0.2}, noise=0.02, reward=Brightness(target=1.0))
    assert (found[-1].rates[:-1] > found[0].rates[:-1]).all()
    assert (found[-1].rates[1:-1] <= 0.2).all()


def test_the_same_seed_gives_the_same_table_whatever_the_chunks():
    options = {"rounds": 3, "trajectories": 10, "measured": 12}
    tables = [torch.stack([r.rates for r in rounds_of(options, batch=batch)]) for batch in (64, 64, 5)]
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])
    assert not torch.equal(tables[0], torch.stack([r.rates for r in rounds_of(options, seed=1)]))


def test_before_and_after_look_at_the_same_trajectories_and_the_search_at_others():
    frozen = {"rounds": 2, "trajectories": 12, "measured": 12, "rule": "faithful", "eps2": 0.0001, "eps1": 10_000}
    first, one, two, last = rounds_of(frozen)
    assert torch.equal(first.balance.positive, last.balance.positive)
    assert not torch.equal(first.balance.positive, one.balance.positive)
    assert not torch.equal(one.balance.positive, two.balance.positive)


def test_the_last_step_keeps_its_rate_and_is_never_noisy():
    for found in rounds_of({"rounds": 2, "trajectories": 6, "measured": 6}):
        assert found.rates[-1] == rounds_of({"rounds": 1, "trajectories": 6, "measured": 6})[0].rates[-1]
        assert found.balance.positive[-1] == found.balance.negative[-1] == 0
        assert found.balance.scored[-1] == 6


def test_shares_of_fresh_noise_stay_below_one():
    found = rounds_of({"rounds": 10, "measured": 6, "tolerance": 1.0}, noise=0.9, kernel="cps")
    assert found[0].rates.tolist() == pytest.approx([0.9] * 6)
    assert found[-1].rates[:-1].tolist() == pytest.approx([1.0] * 5)


def test_a_reward_that_fails_ends_the_calibration_with_its_reason():
    with pytest.raises(RewardError, match=r"round 0: none of the 6 trajectories .* the service is down"):
        rounds_of({"rounds": 1, "trajectories": 6, "measured": 6}, reward=Silent())


def test_options_of_the_other_rule_are_refused():
    with pytest.raises(ValueError, match="calibration has no option 'tolerance'"):
        make_calibration({"rule": "faithful", "tolerance": 0.1})
    with pytest.raises(ValueError, match="calibration has no option 'eps1'"):
        make_calibration({"eps1": 2.0})
    with pytest.raises(ValueError, match=r"rule .* must be one of 'robust', 'faithful', got 'best'"):
        make_calibration({"rule": "best"})
    with pytest.raises(ValueError, match=r"trajectories .* must be a whole number in 6\.\.10000, got 3"):
        make_calibration({"trajectories": 3})


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def config_file(tmp_path, **changes):
    """``method`` changes are added to the method."""
    method = CONFIG["method"] | changes.pop("method", {})
    return write(tmp_path / "config.json", CONFIG | changes | {"method": method})


def test_the_command_writes_a_table_that_trains(tmp_path, capsys):
    path, out = config_file(tmp_path), tmp_path / "psi.json"
    assert cli.main(["calibrate", str(path), "--out", str(out), *TINY]) == 0
    printed = capsys.readouterr()
    assert "images that gained / lost" in printed.out
    assert '"noise_table": "psi.json"' in printed.out
    assert "calibrate: 100%" in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "psi.json", "psi.png"]
    table = json.loads(out.read_text())
    assert table["format"] == "densegrpo-noise-table"
    assert table["rewards"] == CONFIG["rewards"]
    assert (table["rule"], table["rounds"], table["trajectories"]) == ("robust", 2, 6)
    assert table["rates"] == table["after"]["rates"]
    assert len(table["before"]["positive"]) == 4
    assert "NaN" not in out.read_text()

    path = config_file(tmp_path, method={"noise_table": "psi.json"})
    noise = make_recipe(**read_config(path).method).noise
    assert noise.rates(shifted_linear(4)).tolist() == pytest.approx(table["rates"])
    run = Run.create(read_config(path), tmp_path / "runs", tmp_path)
    out.unlink()
    session = Session(Run.open(run.folder))
    assert next(session.loop()).iteration.stats["grad_norm"] > 0
    assert session.run.config.method["noise_table"] == table


def test_a_configuration_that_names_a_table_can_be_calibrated_again_from_its_own_noise(tmp_path):
    path, out = config_file(tmp_path, method={"noise_table": "not_there_yet.json"}), tmp_path / "psi.json"
    assert cli.main(["calibrate", str(path), "--out", str(out), *TINY]) == 0
    start = make_recipe("dense_grpo", noise=1.5).noise.rates(shifted_linear(4))
    assert read_table(out)["before"]["rates"] == pytest.approx(start.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "calibration: rounds .* in 1..10000, got 0"),
        (["--rule", "faithful", "--stride", "0.1"], "calibration has no option 'stride'"),
        (["--out", "nowhere/psi.json"], "--out must be a .json file in a folder that exists"),
        (["--out", "psi.txt"], "--out must be a .json file"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_before_anything_is_computed(tmp_path, capsys, arguments, message):
    assert cli.main(["calibrate", str(config_file(tmp_path)), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_ctrl_c_writes_nothing_and_keeps_the_older_table(tmp_path, capsys, monkeypatch):
    def interrupted(self, rates, balance, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(Robust, "__call__", interrupted)
    out = write(tmp_path / "psi.json", "older")
    assert cli.main(["calibrate", str(config_file(tmp_path)), "--out", str(out), *TINY]) == 130
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert out.read_text() == "older"
    assert not (tmp_path / "psi.png").exists()


def test_a_table_survives_writing_and_reading(tmp_path):
    settings, _ = make_calibration({"rounds": 1, "trajectories": 6, "measured": 6})
    what = {"kernel": "sde", "model": {"name": "demo"}, "rewards": [{"name": "brightness"}]}
    seen = []
    table = make_table(rounds_of({"rounds": 1, "trajectories": 6, "measured": 6}), seen.append, settings, **what)
    assert [r.number for r in seen] == [0, 1, 2]
    write_table(tmp_path / "a.json", table)
    assert read_table(tmp_path / "a.json") == table
    assert table["sigmas"] == pytest.approx(shifted_linear(6).tolist(), abs=1e-6)
    assert describe(table).count("\n") == 6
    assert 0 <= imbalance(table["before"]) <= 1
    assert draw_table(table).size == (720, 560)
