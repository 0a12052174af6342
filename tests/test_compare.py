"""Comparisons: what a plan may say, how its runs are done, and whether the numbers are right."""

import base64
import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from densegrpo.engine import cli, compare, compare_worker
from densegrpo.engine.compare_plan import Budget, make_comparison, read_comparison
from densegrpo.engine.compare_report import colours, make_task, write_comparison
from densegrpo.engine.compare_worker import measurements

SHIPPED = Path(cli.__file__).parent / "demo" / "compare.json"
SHUFFLED = "Flow-GRPO, shuffled rewards"
PLAN = {
    "name": "small",
    "base": {
        "model": {"name": "demo"},
        "lora": {"rank": 2, "alpha": 4.0},
        "method": {"group_size": 3},
        "prompts": ["a red circle", "two blue squares"],
        "held_out_prompts": ["a green triangle"],
        "optimizer": {"lr": 1e-3, "ema_every": 1},
        "training": {"groups": 1, "num_steps": 3},
        "evaluation": {"images_per_prompt": 2, "num_steps": 2},
    },
    "tasks": {
        "darkness": {
            "rewards": [{"name": "brightness", "target": 0.0}],
            "held_out_rewards": [{"name": "shapes", "score": "strict"}],
        }
    },
    "methods": {
        "Flow-GRPO": {"method": {"name": "flow_grpo"}},
        SHUFFLED: {"method": {"name": "flow_grpo"}, "training": {"shuffle_rewards": True}},
    },
    "seeds": [0, 1],
    "evaluations": 60,
    "measure_points": 2,
}


def changed(**parts):
    return json.loads(json.dumps(PLAN)) | parts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [1]}, r"the plan has no key 'seed' \(did you mean 'seeds'\?\)"),
        ({"seeds": [0, 0]}, r"seeds must be a list of different whole numbers such as \[0, 1, 2\], got \[0, 0\]"),
        ({"seeds": [-1]}, r"task 'darkness', method 'Flow-GRPO': training: seed .* got -1"),
        ({"evaluations": 0}, "no budget; set evaluations or seconds above 0"),
        ({"evaluations": "many"}, "the plan: evaluations .* must be a number .* got 'many'"),
        ({"measure_points": 0}, "measure_points .* got 0"),
        ({"methods": {}}, "methods must name at least one"),
        ({"methods": {"a/b": {}}}, "methods: name 'a/b' must be a folder name"),
        ({"methods": {"A": {"method": {"name": "flow"}}}}, "task 'darkness', method 'A': unknown recipe 'flow'"),
        ({"methods": {"A": {"prompts": ["x"]}}}, "methods: A may set .* not 'prompts'.* put it into base or tasks"),
        ({"methods": {"A": {"training": {"seed": 3}}}}, r"methods: A: training\.seed is set by the comparison itself"),
        ({"base": {"saving": {}}}, "base: saving is set by the comparison itself"),
        ({"tasks": {"t": {"rewards": [{"name": "shapez"}]}}}, "task 't', method 'Flow-GRPO': unknown reward 'shapez'"),
        ({"tasks": {"t": []}}, "tasks: t must be an object"),
        ({"name": "a:b"}, "must be a folder name"),
    ],
)
def test_a_mistake_in_the_plan_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_comparison(changed(**change))


def test_what_is_missing_in_the_plan_is_named():
    with pytest.raises(ValueError, match="the plan lacks tasks, seeds"):
        make_comparison({k: v for k, v in PLAN.items() if k not in ("tasks", "seeds")})
    base = {k: v for k, v in PLAN["base"].items() if k != "held_out_prompts"}
    with pytest.raises(ValueError, match="'darkness', method 'Flow-GRPO': held_out_prompts are missing"):
        make_comparison(changed(base=base))


def test_options_that_do_not_go_together_are_refused_before_anything_starts():
    method = {"name": "flow_grpo", "norm_axis": "joint", "std_floor": 0.1}
    with pytest.raises(ValueError, match="method 'A': flow_grpo: std_floor has no effect"):
        make_comparison(changed(methods={"A": {"method": method}}))


@pytest.mark.parametrize("key", ["prompts", "held_out_prompts"])
def test_prompts_that_do_not_suit_a_reward_are_refused_before_anything_starts(key, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(changed(tasks={"shapes": {"rewards": [{"name": "shapes"}], key: ["a dog"]}})))
    assert cli.main(["compare", str(plan), "--out", str(tmp_path / "out")]) == 2
    assert "task 'shapes', method 'Flow-GRPO': reward shapes dense: prompt 'a dog'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json"], r"plan .*missing\.json does not exist"),
        ([str(SHIPPED), "--processes", "0"], "at least 1, got 0"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(arguments, message, capsys, tmp_path):
    assert cli.main(["compare", *arguments, "--out", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_shipped_plan_is_valid_and_has_a_control(tmp_path):
    jobs = read_comparison(SHIPPED).jobs(tmp_path, tmp_path)
    assert any(job.run.config.training.shuffle_rewards for job in jobs)
    assert len({job.run.folder for job in jobs}) == len(jobs)


def test_later_parts_of_a_plan_win_and_options_are_put_together():
    plan = changed(methods={"A": {"method": {"name": "flow_grpo", "noise": 0.5}, "training": {"num_steps": 5}}})
    config = make_comparison(plan).config("darkness", "A", 7)
    assert config.method == {"group_size": 3, "name": "flow_grpo", "noise": 0.5}
    assert (config.training.groups, config.training.num_steps, config.training.seed) == (1, 5, 7)


def test_runs_are_measured_evenly_along_each_budget_and_go_on_until_both_are_spent():
    both = Budget(evaluations=100, seconds=10.0, measure_points=4)
    assert both.points(0, 0) == [0, 0]
    assert both.points(25, 2.4) == [1, 0]
    assert both.points(500, 9.9) == [4, 3]
    assert Budget(evaluations=100, measure_points=4).points(99, 1000.0) == [3]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A finished comparison: its folder."""
    out = tmp_path_factory.mktemp("comparison")
    (out / "plan.json").write_text(json.dumps(PLAN))
    assert cli.main(["compare", str(out / "plan.json"), "--out", str(out), "--processes", "2"]) == 0
    return out / "small"


@pytest.fixture
def copied(comparison, tmp_path):
    """A copy of it that may be changed."""
    shutil.copytree(comparison, tmp_path / "small")
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    return tmp_path / "small"


def again(folder):
    return cli.main(["compare", str(folder.parent / "plan.json"), "--out", str(folder.parent), "--processes", "1"])


def rows(folder):
    """Measurements of a run without what depends on the clock."""
    found = json.loads((folder / "result.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def test_a_comparison_leaves_a_table_a_page_a_text_and_a_picture(comparison):
    page = (comparison / "comparison.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4  # curves; samples of the base model and of two methods
    assert "http" not in page
    text = (comparison / "comparison.md").read_text(encoding="utf-8")
    assert "4 of 4 planned runs, 2 seeds." in text
    assert "darkness (trained) at 60 model evaluations" in text
    assert "shapes strict (not trained) at 60 model evaluations" in text
    assert (comparison / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_measurements_has_every_measurement_of_every_run(comparison):
    lines = list(csv.DictReader((comparison / "comparison.csv").open(encoding="utf-8")))
    runs = {(line["task"], line["method"], line["seed"]) for line in lines}
    assert runs == {("darkness", method, seed) for method in PLAN["methods"] for seed in "01"}
    assert len(lines) == len(runs) * 3  # before training and at two points
    last = lines[-1]
    assert float(last["evaluations"]) >= 60
    assert float(last["reward"]) == float(last["darkness"])
    assert 0 <= float(last["held-out/shapes strict"]) <= 1
    assert 0 < float(last["seconds"]) < 60


def test_measurements_count_training_only_and_average_what_happened_since_the_last(comparison):
    run = comparison / "darkness" / "Flow-GRPO" / "seed_0"
    training = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, second, third = rows(run)
    assert third["evaluations"] == sum(row["evaluations"] for row in training)
    assert third["iteration"] == len(training)
    recent = training[second["iteration"] :]
    assert third["training_reward"] == pytest.approx(np.mean([row["reward"] for row in recent]))
    assert (first["iteration"], first["kl"]) == (0, 0.0)
    assert third["kl"] > 0


def test_seeds_and_methods_differ_but_start_from_the_same_scores(comparison):
    runs = [rows(comparison / "darkness" / m / s) for m in PLAN["methods"] for s in ("seed_0", "seed_1")]
    assert len({run[0]["reward"] for run in runs}) == 1
    assert len({run[-1]["reward"] for run in runs}) == 4


def test_a_stopped_comparison_keeps_finished_runs_and_the_same_command_does_the_others(copied, monkeypatch, capsys):
    methods = [copied / "darkness" / method for method in PLAN["methods"]]
    first, second = (method / "seed_1" for method in methods)
    before, untouched = [rows(first), rows(second)], (methods[0] / "seed_0" / "result.json").stat().st_mtime_ns
    for run in (first, second):
        (run / "result.json").unlink()
    started, start_worker, sleep = [], compare.start_worker, compare.time.sleep

    def start(folder):
        started.append((folder, start_worker(folder)))
        return started[-1][1]

    def stop_at_the_second(seconds):
        if len(started) == 2:
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(compare, "start_worker", start)
    with monkeypatch.context() as patch:
        patch.setattr(compare.time, "sleep", stop_at_the_second)
        assert again(copied) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert all(worker.poll() is not None for _, worker in started)
    assert [(run / "result.json").exists() for run in (first, second)] == [True, False]
    assert again(copied) == 0
    assert [folder for folder, _ in started] == [first, second, second]
    assert [rows(first), rows(second)] == before
    assert (methods[0] / "seed_0" / "result.json").stat().st_mtime_ns == untouched


def test_a_worker_does_not_outlive_a_comparison_that_is_killed(copied):
    run = copied / "darkness" / "Flow-GRPO" / "seed_0"
    (run / "budget.json").write_text(json.dumps({"evaluations": 1e12}))
    worker = compare.start_worker(run)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(1)
    worker.stdin.close()
    assert worker.wait(30) == 1


def test_a_finished_run_of_another_plan_is_refused_and_kept(copied, capsys):
    plan = changed()
    plan["base"]["optimizer"]["lr"] = 2e-3
    (copied.parent / "plan.json").write_text(json.dumps(plan))
    assert again(copied) == 2
    assert "seed_0 is a finished run of another plan (optimizer.lr was 0.001, is 0.002); give another" in (
        capsys.readouterr().err
    )
    assert len(list(copied.rglob("result.json"))) == 4
    (copied.parent / "plan.json").write_text(json.dumps(changed(evaluations=70)))
    assert again(copied) == 2
    assert "evaluations was 60, is 70" in capsys.readouterr().err
    base = PLAN["base"] | {"held_out_prompts": ["a blue circle"]}
    (copied.parent / "plan.json").write_text(json.dumps(changed(base=base)))
    assert again(copied) == 2
    assert "its held_out_prompts were others" in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_others_are_reported(copied, monkeypatch, capsys):
    run = copied / "darkness" / SHUFFLED / "seed_1"
    (run / "result.json").unlink()

    def fail(folder):
        with (folder / "worker.log").open("wb") as log:
            return subprocess.Popen([sys.executable, "-c", "raise SystemExit('no score today')"], stderr=log)

    monkeypatch.setattr(compare, "start_worker", fail)
    assert again(copied) == 1
    assert f"darkness, {SHUFFLED}, seed 1: no score today (see " in capsys.readouterr().err
    assert "3 of 4 planned runs" in (copied / "comparison.md").read_text(encoding="utf-8")


class Stub:
    """A session whose iterations take 10 evaluations and 2 seconds each, and whose measurements take 100 seconds."""

    def __init__(self, folder, budget):
        (folder / "budget.json").write_text(json.dumps(budget))
        self.run = SimpleNamespace(folder=folder, config=make_comparison(PLAN).config("darkness", "Flow-GRPO", 0))
        self.now = 1000.0

    def clock(self):
        return self.now

    def evaluate(self, name):
        self.now += 100
        return SimpleNamespace(means={"darkness": 0.5}, num_images=1, missing={}, statistics={})

    def iterations(self):
        for number in range(1, 1000):
            self.now += 2
            stats = {"evaluations": 10.0, "reward": float(number)}
            yield SimpleNamespace(number=number, iteration=SimpleNamespace(stats=stats))


@pytest.mark.parametrize(
    ("budget", "measured"),
    [
        ({"evaluations": 80, "seconds": 0, "measure_points": 2}, [0, 4, 8]),
        ({"evaluations": 0, "seconds": 12, "measure_points": 2}, [0, 3, 6]),
        ({"evaluations": 80, "seconds": 12, "measure_points": 2}, [0, 3, 4, 6, 8]),
        ({"evaluations": 40, "seconds": 20, "measure_points": 1}, [0, 4, 10]),
    ],
)
def test_a_run_goes_on_until_every_budget_is_spent_and_the_time_of_measuring_does_not_count(
    tmp_path, monkeypatch, budget, measured
):
    monkeypatch.setattr(compare_worker, "moved", lambda session: 0.0)
    session = Stub(tmp_path, budget)
    found = list(measurements(session, session.clock))
    assert [row["iteration"] for row in found] == measured
    assert [row["seconds"] for row in found] == [2.0 * number for number in measured]
    assert [row["evaluations"] for row in found] == [10.0 * number for number in measured]
    last = range(measured[-2] + 1, measured[-1] + 1)
    assert found[-1]["training_reward"] == pytest.approx(np.mean(last))


def test_the_report_says_what_hand_made_results_mean(tmp_path):
    """Flow-GRPO ends at 0.6, 0.62, 0.64; the other one 0.2 higher; the control stays at the base model's 0.2."""
    methods = PLAN["methods"] | {"DenseGRPO": {"method": {"name": "dense_grpo"}}}
    comparison = make_comparison(changed(methods=methods, seeds=[0, 1, 2], evaluations=100))
    jobs = comparison.jobs(tmp_path, tmp_path)
    for job in jobs:
        end = {"Flow-GRPO": 0.6, "DenseGRPO": 0.8 + 0.002 * job.seed, SHUFFLED: 0.18}[job.method] + 0.02 * job.seed
        write_result(job, [0.2, 0.2 if job.method == SHUFFLED else end], seconds=4 if job.method == "DenseGRPO" else 2)
    write_comparison(comparison, jobs, tmp_path)
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert {len(line) for line in cells} == {13, 5}  # no row shorter than its head
    table = {line[0]: line for line in cells}
    pictures = re.findall('base64,([^"]*)', (tmp_path / "comparison.html").read_text(encoding="utf-8"))
    shown = ["Flow-GRPO 0 before", *(f"{method} 0 after" for method in methods)]
    assert [base64.b64decode(data).decode() for data in pictures[1:]] == shown
    assert "0.515 is the base model's 0.200 and 75% of what Flow-GRPO gains in 100 model evaluations." in text
    reached, difference = text.split("Difference to Flow-GRPO")
    assert "| Flow-GRPO | 3 | 10 | 100 | 2 | 0.620 ± 0.050 | 0.620 ± 0.050 |" in reached
    assert "| DenseGRPO | 3 | 10 | 100 | 4 | 0.822 ± 0.055 | 0.511 ± 0.027 |" in reached
    assert reached.count("not reached | not reached | not reached") == 1
    assert table["DenseGRPO"][1] == "+0.202 ± 0.005: significant"
    assert "darkness (trained) at 2 CPU seconds" in difference


def test_a_control_has_the_colour_of_the_method_it_shuffles_and_a_baseline_may_fail(tmp_path):
    methods = {SHUFFLED: PLAN["methods"][SHUFFLED], "DenseGRPO": {"method": {"name": "dense_grpo"}}}
    methods |= {"Slow": {"method": {"name": "flow_grpo"}, "optimizer": {"lr": 1e-5}}, **PLAN["methods"]}
    comparison = make_comparison(changed(methods=methods, evaluations=100))
    jobs = comparison.jobs(tmp_path, tmp_path)
    for job in jobs:
        write_result(job, [0.2, 0.1], seconds=1)
    write_comparison(comparison, jobs, tmp_path)
    assert f"{SHUFFLED} did not raise the held-out reward" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
    found = colours(make_task(comparison, "darkness", jobs))
    assert list(found) == list(methods)
    assert found[SHUFFLED] in (found["Slow"], found["Flow-GRPO"])
    assert len({found[method] for method in methods if method != SHUFFLED}) == 3


def write_result(job, reward, seconds):
    """A run that was measured before training and at its end."""
    job.run.folder.joinpath("samples").mkdir(parents=True)
    for name in ("before", "after"):
        (job.run.folder / "samples" / f"{name}.png").write_bytes(f"{job.method} {job.seed} {name}".encode())
    found = [
        {"iteration": 10 * i, "evaluations": 100 * i, "seconds": seconds * i, "reward": reward[i], "kl": 0.0}
        | {"training_reward": None, "scores": {"darkness": reward[i], "held-out/shapes strict": None}}
        for i in (0, 1)
    ]
    job.result.write_text(json.dumps({"clock": "CPU seconds", "rows": found}))


def test_a_task_may_have_a_budget_of_its_own():
    tasks = {"darkness": PLAN["tasks"]["darkness"] | {"budget": {"evaluations": 7}}, "again": PLAN["tasks"]["darkness"]}
    comparison = make_comparison(changed(tasks=tasks))
    assert comparison.budget_of("darkness") == replace(comparison.budget, evaluations=7)
    assert comparison.budget_of("again") == comparison.budget
    tasks["darkness"]["budget"] = 7
    with pytest.raises(ValueError, match="tasks: darkness: budget must be an object such as"):
        make_comparison(changed(tasks=tasks))
    tasks["darkness"]["budget"] = {"evaluation": 7}
    with pytest.raises(ValueError, match=r"tasks: darkness: budget has no option 'evaluation' \(did you mean"):
        make_comparison(changed(tasks=tasks))


def test_a_plan_may_name_a_noise_table_beside_it(tmp_path):
    (tmp_path / "noise.json").write_bytes(SHIPPED.with_name("noise_table.json").read_bytes())
    method = {"name": "dense_grpo", "noise_table": "noise.json"}
    plan = changed(methods={"calibrated": {"method": method}}, base=PLAN["base"] | {"training": {"num_steps": 8}})
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    config = read_comparison(tmp_path / "plan.json").config("darkness", "calibrated", 0)
    assert len(config.method["noise_table"]["rates"]) == 8
