"""The alarm: a held-out reward falls while the trained one rises."""

import json
import math

import pytest
import torch
from densegrpo.engine import cli
from densegrpo.engine import guard as guard_module
from densegrpo.engine.config import make_config
from densegrpo.engine.guard import Guard, Snapshot, change
from densegrpo.engine.image_statistics import image_statistics
from densegrpo.engine.protocols import RewardResult
from densegrpo.engine.report import each_reward_curve, figure, held_out_curve
from densegrpo.engine.rewards import brightness
from densegrpo.engine.run import Run
from densegrpo.engine.session import Session
from safetensors import safe_open

N = 64


def rising(step, seed=0):
    """Scores of N images whose mean is ``step``, a little noisy."""
    return step + 0.1 * torch.randn(N, generator=torch.Generator().manual_seed(seed + int(1000 * step)))


def watched(trained, held_out, in_a_row=2, weights=(1.0, 1.0), last=False):
    """The alarms of each evaluation."""
    guard = Guard({"t": weights[0]}, {"h": weights[1]}, in_a_row)
    pairs = list(zip(trained, held_out, strict=True))
    return [
        guard.add(i * 10, {"t": rising(t), "h": rising(h, 7)}, last=last and i == len(pairs) - 1)
        for i, (t, h) in enumerate(pairs)
    ]


def fired(*arguments, **options):
    return [i for i, alarms in enumerate(watched(*arguments, **options)) if alarms]


def test_it_fires_when_one_rises_and_the_other_falls():
    assert fired([0.2, 0.4, 0.6, 0.8], [0.6, 0.5, 0.4, 0.3]) == [2, 3]


def test_it_says_what_fell_and_since_when():
    alarm = watched([0.2, 0.4, 0.6], [0.6, 0.5, 0.4])[-1][0]
    old, new = (rising(level, 7).mean() for level in (0.6, 0.4))
    low, high = (rising(level).mean() for level in (0.2, 0.6))
    assert alarm == (
        f"h went from {old:.3f} to {new:.3f} between iterations 0 and 20 "
        f"while t went from {low:.3f} to {high:.3f}: the reward is being gamed"
    )


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        ([0.2, 0.4, 0.6, 0.8], [0.3, 0.4, 0.5, 0.6]),  # both rise
        ([0.8, 0.6, 0.4, 0.2], [0.6, 0.5, 0.4, 0.3]),  # both fall: the policy breaks, nothing is gamed
        ([0.2, 0.4, 0.6, 0.8], [0.5, 0.5, 0.5, 0.5]),  # nothing happens to the other
        ([0.2, 0.4, 0.6, 0.8], [0.6, 0.4, 0.6, 0.61]),  # one dip
    ],
    ids=["both rise", "both fall", "flat", "one dip"],
)
def test_it_is_silent_otherwise(trained, held_out):
    assert fired(trained, held_out) == []


def test_a_fall_counts_from_the_best_so_far_and_not_only_from_the_start():
    assert fired([0.2, 0.4, 0.6, 0.8], [0.3, 0.7, 0.5, 0.45]) == [3]


def test_how_many_in_a_row_can_be_chosen():
    falls = [0.2, 0.4, 0.6, 0.8], [0.6, 0.5, 0.4, 0.3]
    assert fired(*falls, in_a_row=1) == [1, 2, 3]
    assert fired(*falls, in_a_row=3) == [3]
    assert fired(*falls, in_a_row=0) == []


def test_before_and_after_are_enough_at_the_end_of_a_run():
    assert fired([0.2, 0.8], [0.6, 0.3]) == []
    assert fired([0.2, 0.8], [0.6, 0.3], last=True) == [1]


def test_a_negative_weight_turns_a_reward_around():
    assert fired([0.8, 0.6, 0.4], [0.6, 0.5, 0.4], weights=(-1.0, 1.0)) == [2]
    assert fired([0.2, 0.4, 0.6], [0.3, 0.4, 0.5], weights=(1.0, -1.0)) == [2]


def test_a_change_smaller_than_its_own_uncertainty_is_none():
    noise = torch.Generator().manual_seed(0)
    guard = Guard({"t": 1.0}, {"h": 1.0}, 2)
    for i in range(6):
        h = torch.randn(N, generator=noise)  # its mean wanders by 0.125
        assert guard.add(i, {"t": rising(0.1 * i), "h": h}) == []


def false_alarms(runs, evaluations=20):
    """Share of runs that alarm although the held-out reward only fluctuates while the trained one rises."""
    random, found = torch.Generator().manual_seed(0), 0
    for _ in range(runs):
        guard, own = Guard({"t": 1.0}, {"h": 1.0}, 2), 0.7 * torch.randn(N, generator=random)
        scores = [own + 0.7 * torch.randn(N, generator=random) for _ in range(evaluations)]
        found += any(guard.add(i, {"t": torch.full((N,), float(i)), "h": h}) for i, h in enumerate(scores))
    return found / runs


def test_a_reward_that_only_fluctuates_seldom_alarms(monkeypatch):
    """The number of the documentation, 1 %, and why a change of two standard errors is not enough."""
    assert false_alarms(200) <= 0.05
    monkeypatch.setattr(guard_module, "SIGMAS", 2.0)
    assert false_alarms(50) >= 0.15


def test_the_change_is_measured_image_by_image():
    """A shift of 0.01 is certain when every image shifts, however much they differ."""
    values = torch.randn(N, generator=torch.Generator().manual_seed(1)).tolist()
    shifted = [v + 0.01 + 0.001 * (i % 3) for i, v in enumerate(values)]
    assert change(Snapshot(0, {"h": values}), Snapshot(1, {"h": shifted}), "h") > 50
    assert change(Snapshot(0, {"h": values}), Snapshot(1, {"h": values}), "h") == 0
    few, more = [1.0] * 7, [1.0] * 8
    assert change(Snapshot(0, {"h": more}), Snapshot(1, {"h": [2.0] * 8}), "h") == math.inf
    assert change(Snapshot(0, {"h": few}), Snapshot(1, {"h": [0.0] * 7}), "h") == 0, "too few to say"


def test_images_without_a_score_are_left_out():
    pairs = [(0.5, 0.6), (0.3, 0.5)] * 4
    old = Snapshot(0, {"h": [None, 0.1, *(a for a, _ in pairs)]})
    new = Snapshot(1, {"h": [9.0, None, *(b for _, b in pairs)]})
    assert change(old, new, "h") == pytest.approx(0.15 / (0.05 * (8 / 7) ** 0.5 / 8**0.5), rel=1e-4)


def test_an_evaluation_that_failed_is_left_out_of_all_comparisons():
    guard, nothing = Guard({"t": 1.0}, {"h": 1.0}, 2), torch.full((N,), torch.nan)
    levels = [None, 0.6, 0.5, None, 0.4, 0.3]
    fired = []
    for i, level in enumerate(levels):
        found = guard.add(i, {"t": rising(0.1 * i), "h": nothing if level is None else rising(level, 7)})
        fired.append(bool(found))
        assert not guard.is_best()
    assert fired == [False, False, False, False, False, True]


@pytest.mark.parametrize("other", [{}, {"h": rising(0.9)[:10]}, {"h": torch.full((N,), torch.nan)}], ids=str)
def test_evaluations_of_other_images_or_rewards_are_not_compared(other):
    """As when a run is resumed with another configuration."""
    guard = Guard({"t": 1.0}, {"h": 1.0}, 1)
    guard.add(0, {"t": rising(0.1), **other})
    assert guard.add(1, {"t": rising(0.5), "h": rising(0.3)}) == []
    assert not guard.is_best()


def test_the_best_is_found_on_images_that_both_evaluations_scored():
    """Of fifty images only the ten easiest got a score, each a little worse than before: that is not better."""
    guard, levels = Guard({}, {"h": 1.0}, 2), torch.linspace(0, 1, 50)
    guard.add(0, {"h": levels})
    easiest = torch.full((50,), torch.nan)
    easiest[-10:] = levels[-10:] - 0.2
    guard.add(1, {"h": easiest})
    assert not guard.is_best()


def some_of(scores, indices):
    """Those scores, NaN elsewhere."""
    found = torch.full_like(scores, torch.nan)
    found[indices] = scores[indices]
    return found


def test_a_fall_is_measured_from_the_best_on_images_that_both_evaluations_scored():
    """The second evaluation scored only the ten easiest images: its mean is the highest, but none of them is better."""
    guard, levels, easiest = Guard({"t": 1.0}, {"h": 1.0}, 1), torch.linspace(0, 1, N), slice(-10, None)
    alarms = [
        guard.add(10 * i, {"t": rising(0.2 * i), "h": held_out})
        for i, held_out in enumerate([levels, some_of(levels - 0.2, easiest), levels - 0.2 - 0.01 * levels])
    ]
    assert [len(found) for found in alarms] == [0, 1, 1]
    assert "h went from 0.500 to 0.295 between iterations 0 and 20" in alarms[2][0]
    first, last = levels[easiest].mean(), (levels - 0.2)[easiest].mean()
    assert f"h went from {first:.3f} to {last:.3f} between iterations 0 and 10" in alarms[1][0]


def test_an_evaluation_of_a_handful_of_images_is_nothing_to_fall_from():
    """Seven images rose to 2 and fell back: too few to tell. The others fell all the time."""
    guard, handful = Guard({"t": 1.0}, {"h": 1.0}, 1), slice(0, 7)
    for i, held_out in enumerate([rising(0.6), some_of(rising(2.0), handful), rising(0.3)]):
        alarms = guard.add(i, {"t": rising(0.2 * i), "h": held_out})
        assert not guard.is_best()
    assert len(alarms) == 1
    assert "between iterations 0 and 2" in alarms[0]


@pytest.mark.parametrize(
    ("name", "count"), [("h", 7), ("t", 7), ("h", 0)], ids=["held out", "trained", "none of the held-out"]
)
def test_it_says_when_it_had_too_few_images_to_judge(name, count):
    guard = Guard({"t": 1.0}, {"h": 1.0}, 2)
    said = []
    for i, shared in enumerate([N, 8, count, N]):
        scores = {"t": rising(0.1 * i), "h": rising(0.5)}
        scores[name] = some_of(scores[name], slice(0, shared))
        guard.add(i, scores)
        said.append(guard.unjudged())
    assert said[:2] == [[], []]
    assert len(said[2]) == 1
    assert said[2][0].startswith(f"{name} has scores of {count} images that an earlier evaluation scored too: too few")
    assert said[3] == [], "enough are shared with the first"


def test_without_anything_to_watch_nothing_is_unjudged():
    for held_out, in_a_row in (({}, 2), ({"h": 1.0}, 0)):
        guard = Guard({"t": 1.0}, held_out, in_a_row)
        for i in range(3):
            guard.add(i, {"t": rising(0.1)[:3], "h": rising(0.1)[:3]})
            assert guard.unjudged() == []


def test_people_have_no_evaluations_so_a_fall_alone_is_enough():
    guard = Guard({"votes": 1.0}, {"h": 1.0}, 2)
    assert [bool(guard.add(i, {"h": rising(0.6 - 0.1 * i)})) for i in range(4)] == [False, False, True, True]


def test_the_best_on_held_out_rewards_is_known():
    guard, best = Guard({}, {"h": 1.0}, 2), []
    for i, level in enumerate([0.5, 0.4, 0.6, 0.55, 0.7]):
        guard.add(i, {"h": rising(level)})
        best.append(guard.is_best())
    assert best == [False, False, True, False, True]


def test_without_held_out_rewards_nothing_is_best():
    guard = Guard({"t": 1.0}, {}, 2)
    for i in range(3):
        guard.add(i, {"t": rising(0.1 * i)})
        assert not guard.is_best()


def test_the_history_survives_a_restart_and_later_evaluations_are_forgotten(tmp_path):
    guard = Guard({"t": 1.0}, {"h": 1.0}, 2)
    for i in range(4):
        scores = rising(0.1 * i)
        scores[0] = torch.nan
        guard.add(i * 10, {"t": scores, "h": scores})
    guard.save(tmp_path)
    json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[0])
    again = Guard({"t": 1.0}, {"h": 1.0}, 2)
    again.load(tmp_path, until=20)
    assert again.history == guard.history[:3]


GAMED = {
    "name": "gamed",
    "model": {"name": "demo"},
    "method": {"name": "flow_grpo_fast", "group_size": 12, "clip_range": 0.01, "kl_weight": 0.0},
    "rewards": [{"name": "shapes", "score": "dense"}],
    "prompts": "demo:train",
    "held_out_prompts": "demo:held_out",
    "held_out_rewards": [{"name": "shapes", "score": "strict"}],
    "lora": {"rank": 8, "alpha": 16.0},
    "optimizer": {"lr": 3e-3, "beta2": 0.99, "ema_decay": 0.5},
    "training": {"iterations": 20, "groups": 4, "num_steps": 8, "sample_batch": 64, "train_batch": 64},
    "evaluation": {"every": 5, "images_per_prompt": 1, "num_steps": 8, "stop_when_gamed": True},
}


def trained(tmp_path, **changes):
    run = Run.create(make_config(GAMED | changes), tmp_path, tmp_path)
    session = Session(run)
    list(session.execute())
    return run, session


@pytest.mark.slow
def test_a_run_whose_reward_is_gamed_alarms_and_stops(tmp_path):
    """The area of the wanted colours can be had without any shape: blots score higher."""
    run, session = trained(tmp_path)
    rows = [row for row in run.metrics() if "evaluation" in row]
    first, last = rows[0]["evaluation"], rows[-1]["evaluation"]
    assert last["shapes dense"] > first["shapes dense"] + 0.05
    assert last["held-out/shapes strict"] < first["held-out/shapes strict"] - 0.1
    assert session.gamed
    assert rows[-1]["iteration"] == 10, "the second evaluation in a row that shows it"
    assert "being gamed" in rows[-1]["alarms"][0]
    assert "The reward is being gamed" in (run.folder / "report.html").read_text(encoding="utf-8")
    assert not (run.folder / "lora_best.safetensors").exists(), "nothing was better than the untrained model"
    assert rows[-1]["statistics"]["entropy"] > rows[0]["statistics"]["entropy"] + 0.3


@pytest.mark.slow
def test_a_run_that_raises_both_rewards_is_left_in_peace(tmp_path):
    """The run that is stopped above, watched by a reward that it raises as well: blots are colourful."""
    run, session = trained(
        tmp_path, held_out_rewards=[{"name": "colourfulness"}], training=GAMED["training"] | {"iterations": 10}
    )
    rows = [row["evaluation"] for row in run.metrics() if "evaluation" in row]
    assert rows[-1]["shapes dense"] > rows[0]["shapes dense"] + 0.05
    assert rows[-1]["held-out/colourfulness"] > rows[0]["held-out/colourfulness"] + 0.05
    assert not session.gamed
    assert session.learner.iteration == 10
    assert not any("alarms" in row for row in run.metrics())


@pytest.mark.slow
def test_a_run_that_games_nothing_is_left_in_peace(tmp_path):
    """The same run on what the held-out reward measures too, at the demo's learning rate."""
    run, session = trained(
        tmp_path, rewards=[{"name": "shapes", "score": "partial"}], optimizer=GAMED["optimizer"] | {"lr": 3e-4}
    )
    assert not session.gamed
    assert session.learner.iteration == 20
    assert not any("alarms" in row for row in run.metrics())
    assert "being gamed" not in (run.folder / "report.html").read_text(encoding="utf-8")


def test_the_best_lora_is_kept_and_says_so(tmp_path, monkeypatch):
    levels = iter([0.2, 0.6, 0.4])

    def pretended(self, batch):
        level = next(levels) if len(batch.prompts) == 4 else 0.0
        return RewardResult(level + torch.rand(len(batch.prompts)) / 100)

    monkeypatch.setattr(brightness.Brightness, "__call__", pretended)
    run, _ = trained(
        tmp_path,
        method={"name": "flow_grpo", "group_size": 3, "kl_weight": 0.0},
        rewards=[{"name": "shapes", "score": "dense"}],
        held_out_rewards=[{"name": "brightness"}],
        prompts=["a red circle"],
        held_out_prompts=["a blue circle", "a red square"],
        training={"iterations": 2, "groups": 1, "num_steps": 3},
        evaluation={"every": 1, "images_per_prompt": 2, "num_steps": 3},
    )
    with safe_open(run.folder / "lora_best.safetensors", "pt") as file:
        assert file.metadata()["densegrpo.iterations"] == "1"
    assert [path.name for path in (run.folder / "best").iterdir()] == ["step_000001"]


def test_statistics_of_known_images():
    flat = torch.full((1, 3, 16, 16), 0.5)
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[..., ::2] = 1
    red = torch.zeros(1, 3, 16, 16)
    red[:, 0] = 1
    found = image_statistics(torch.cat([flat, stripes, red]))
    assert found["brightness"].tolist() == pytest.approx([0.5, 0.5, 0.299], abs=1e-5)
    assert found["saturation"].tolist() == pytest.approx([0, 0, 1])
    assert found["sharpness"].tolist() == pytest.approx([0, 0.5, 0], abs=1e-6)
    assert found["entropy"].tolist() == pytest.approx([0, 1, 0], abs=1e-5)


def test_the_entropy_of_all_levels_is_6_bits():
    ramp = torch.linspace(0, 0.999, 64).repeat(64, 1).expand(1, 3, 64, 64)
    assert image_statistics(ramp)["entropy"].item() == pytest.approx(6, abs=0.05)


@pytest.mark.slow
def test_a_run_that_was_stopped_can_go_on_all_the_same(tmp_path, capsys):
    run, session = trained(tmp_path)
    assert session.learner.iteration == 10
    assert cli.main(["resume", str(run.folder), "--ignore-alarms", "--iterations", "16"]) == 0
    assert run.metrics()[-1]["iteration"] == 16
    assert "alarms" in [key for row in run.metrics() if row["iteration"] > 10 for key in row]


@pytest.mark.parametrize("name", ["costs $5 or $9", r"$\frac {prompt}$", "x" * 300])
def test_any_name_of_a_reward_can_be_drawn(name):
    rows = [{"iteration": i, "evaluation": {name: 0.1 * i}, "rewards": {name: {"mean": 0.1}}} for i in range(3)]
    assert figure("a", held_out_curve, rows)
    assert figure("b", each_reward_curve, [{"iteration": 0}, *rows])
