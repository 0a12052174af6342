"""The same run on one and on two processes: every method with two threads for processes, some started for real."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from densegrpo.engine import cli
from densegrpo.engine.distributed import Solo, gather_texts
from densegrpo.engine.evaluate import evaluate
from densegrpo.engine.protocols import RewardResult
from densegrpo.engine.rewards import Panel
from densegrpo.engine.train import TrainSettings, train
from flat_rows import flat
from method_variants import NAMES, PROMPTS, VARIANTS, Counting, Recording, panel, small
from safetensors.torch import load_file

CONFIG = {
    "name": "shared",
    "model": {"name": "demo"},
    "method": {"name": "dense_grpo", "group_size": 4, "kl_weight": 0.01},
    "rewards": [{"name": "brightness", "target": 0.0}],
    "prompts": ["a red circle", "two blue squares", "a green triangle"],
    "held_out_prompts": ["a black circle", "a blue circle", "a red square"],
    "lora": {"rank": 2, "alpha": 4.0},
    # Adam turns rounding noise in a gradient that nearly cancels into a step of up to lr, so lr bounds equality.
    "optimizer": {"lr": 1e-4, "ema_every": 1},
    "training": {"iterations": 3, "groups": 3, "num_steps": 4},
    "evaluation": {"images_per_prompt": 2, "num_steps": 3},
}


def launch(processes, *arguments):
    kind = "--multi_gpu" if processes > 1 else "--cpu"
    options = f"{kind} --num_processes {processes} --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    command += ["-m", "densegrpo.engine.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def numbers(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [flat({k: v for k, v in row.items() if not k.startswith("seconds")}) for row in rows]


def on_one_and_on_two(tmp_path, groups, **method):
    """The folders of the same run, after every metric was found equal."""
    path = tmp_path / "shared.json"
    changes = {"method": CONFIG["method"] | method, "training": CONFIG["training"] | {"groups": groups}}
    path.write_text(json.dumps(CONFIG | changes))
    assert cli.main(["train", str(path), "--out", str(tmp_path / "one")]) == 0
    launch(2, "train", path, "--out", tmp_path / "two")
    one, two = tmp_path / "one" / "shared", tmp_path / "two" / "shared"
    for a, b in zip(numbers(one), numbers(two), strict=True):
        assert a.keys() == b.keys()
        assert (a.pop("processes", 1.0), b.pop("processes", 2.0)) == (1.0, 2.0)
        for name in a:
            assert b[name] == pytest.approx(a[name], abs=1e-5), name
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["group", "global"])
def test_two_processes_learn_what_one_learns(tmp_path, scope):
    """Three groups on two processes: unequal shares on purpose."""
    one, two = on_one_and_on_two(tmp_path, 3, std_scope=scope)
    mine, theirs = load_file(one / "lora.safetensors"), load_file(two / "lora.safetensors")
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["group", "global"])
def test_groups_of_different_processes_are_never_mixed(tmp_path, scope):
    """Five groups: with numbers made from each process's own count, two of them were once the same."""
    on_one_and_on_two(tmp_path, 5, std_scope=scope)


OTHERS = [
    {"name": "tempflow_grpo", "num_seeds": 2},
    {"name": "g2rpo"},
    {"name": "tp_grpo", "balance": "batch"},
    {"name": "flow_grpo_fast", "window_size": 2, "window_end": 0, "step_weight": "noise"},
]


@pytest.mark.slow
@pytest.mark.parametrize("method", OTHERS, ids=lambda m: m["name"])
def test_two_processes_learn_what_one_learns_with_other_methods(tmp_path, method):
    one, two = on_one_and_on_two(tmp_path, 3, **method)
    mine, theirs = load_file(one / "lora.safetensors"), load_file(two / "lora.safetensors")
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-4, rtol=0)


class Half:
    """One of two threads that play processes."""

    size = 2

    def __init__(self, rank, barrier, table):
        self.rank, self.barrier, self.table = rank, barrier, table

    def exchange(self, value):
        """What both brought, in rank order."""
        self.table[self.rank] = value
        self.barrier.wait(timeout=60)
        both = list(self.table)
        self.barrier.wait(timeout=60)
        return both

    def sum(self, values):
        """All-reduce."""
        return sum(self.exchange(values))

    def gather(self, rows, dim=0):
        """All-gather."""
        return torch.cat(self.exchange(rows), dim)


def trained(recipe, world, groups):
    """(gradients of all optimizer steps, statistics of all iterations) of one process."""
    model = Counting()
    learner, cond = Recording(model), model.encode([p.text for p in PROMPTS])
    options = TrainSettings(iterations=2, groups=groups, num_steps=6, sample_batch=7, train_batch=5)
    stats = [i.stats for i in train(model, cond, PROMPTS, panel(), recipe, learner, options, world)]
    return learner.gradients, stats


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=NAMES)
@pytest.mark.parametrize("groups", [3, 5])
def test_the_gradients_and_statistics_of_every_method_do_not_depend_on_the_number_of_processes(name, options, groups):
    """Unequal shares on purpose; each process ends with the gradients and the numbers of all."""
    recipe, barrier, table = small(name, options), Barrier(2), [None, None]
    gradients, stats = trained(recipe, Solo(), groups)
    with ThreadPoolExecutor(2) as threads:
        halves = list(threads.map(lambda rank: trained(recipe, Half(rank, barrier, table), groups), range(2)))
    for found, numbers_found in halves:
        assert len(found) == len(gradients)
        for a, b in zip(found, gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()) + 1e-7, rtol=1e-3)
        for a, b in zip(map(flat, numbers_found), map(flat, stats), strict=True):
            assert a.keys() == b.keys()
            for key in set(a) - {"processes", *(key for key in a if key.startswith("seconds"))}:
                assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-4), key


class Detailed:
    """Has a sub-score, and fails on one process."""

    def __init__(self, fails):
        self.fails = fails

    def __call__(self, batch):
        if self.fails:
            raise OSError("no room")
        return RewardResult(torch.ones(len(batch.prompts)), {"part": torch.full((len(batch.prompts),), 0.5)})


def test_a_reward_that_fails_on_one_process_does_not_stop_the_others():
    """All must gather the same things, or they wait for each other forever."""
    barrier, table = Barrier(2), [None, None]

    def evaluated(rank):
        model, panel = Counting(), Panel([("d\nof two lines", Detailed(rank == 1), 1.0)])
        cond, world = model.encode([p.text for p in PROMPTS]), Half(rank, barrier, table)
        return evaluate(model, cond, PROMPTS, panel, world, num_steps=2, images_per_prompt=1, batch=4)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(evaluated, range(2))
    assert list(first.scores) == list(second.scores) == ["d\nof two lines", "d\nof two lines/part"]
    assert first.scores["d\nof two lines/part"].isnan().tolist() == [i % 2 == 1 for i in range(len(PROMPTS))]
    assert first.reasons == second.reasons == {"d\nof two lines": "OSError: no room"}
    assert first.missing == second.missing == {"d\nof two lines": pytest.approx(1 / 3)}


def test_a_failure_on_one_process_is_known_to_all():
    """The first of them writes the record."""
    barrier, table = Barrier(2), [None, None]

    def errors(rank):
        model, failing = Counting(), Panel([("d", Detailed(rank == 1), 1.0)])
        learner, cond = Recording(model), model.encode([p.text for p in PROMPTS])
        options, world = TrainSettings(iterations=1, groups=2, num_steps=4), Half(rank, barrier, table)
        steps = train(model, cond, PROMPTS, failing, small("flow_grpo", {}), learner, options, world)
        return [iteration.errors for iteration in steps]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(errors, range(2))) == [[["d: OSError: no room"]]] * 2


def test_processes_never_gather_nothing():
    """Not every way to gather can."""

    class Wanting(Solo):
        def gather(self, rows, dim=0):
            assert len(rows)
            return rows

    assert gather_texts(Wanting(), []) == []
    assert gather_texts(Wanting(), ["b", "a\nb", "b"]) == ["b", "a\nb"]


def test_a_text_that_is_no_unicode_is_gathered_all_the_same():
    """As the name of a file in an error; it would have ended the run."""
    assert gather_texts(Solo(), ["no file caf\udce9", "grün"]) == ["no file caf\\udce9", "grün"]


@pytest.mark.slow
def test_a_run_started_on_two_processes_resumes_on_one(tmp_path):
    path = tmp_path / "shared.json"
    path.write_text(json.dumps(CONFIG | {"training": CONFIG["training"] | {"iterations": 1}}))
    launch(2, "train", path, "--out", tmp_path / "two")
    launch(1, "resume", tmp_path / "two" / "shared", "--iterations", 3)
    path.write_text(json.dumps(CONFIG))
    assert cli.main(["train", str(path), "--out", str(tmp_path / "one")]) == 0
    last = [numbers(tmp_path / folder / "shared")[-1] for folder in ("one", "two")]
    assert last[1]["reward"] == pytest.approx(last[0]["reward"], abs=1e-5)
    assert last[1]["evaluation_reward"] == pytest.approx(last[0]["evaluation_reward"], abs=1e-5)


def test_one_process_instead_of_two_is_refused(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, "-m", "densegrpo.engine.cli", "demo"], capture_output=True, text=True, cwd=tmp_path
    )
    assert "use `accelerate launch --multi_gpu --num_processes 2" in done.stderr


END = """
import atexit, sys
from densegrpo.engine.cli import end_process
atexit.register(print, "the interpreter was taken down")
print("all of it", end="")
print("errors too", end="", file=sys.stderr)
end_process(3)
"""


@pytest.mark.parametrize(("run_id", "more"), [("none", ""), (None, "the interpreter was taken down\n")])
def test_one_of_several_processes_ends_at_once_but_says_all(monkeypatch, run_id, more):
    """A thread of the process group that meets an interpreter which is taken down aborts the process."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if run_id:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"all of it{more}", "errors too")
