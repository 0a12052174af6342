"""The same run on one and on two processes, started as a user would start it."""

import json
import subprocess
import sys

import pytest
import torch
from densegrpo.engine import cli
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
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def on_one_and_on_two(tmp_path, scope, groups):
    """The folders of the same run, after every metric was found equal."""
    path = tmp_path / "shared.json"
    changes = {"method": CONFIG["method"] | {"std_scope": scope}, "training": CONFIG["training"] | {"groups": groups}}
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
    one, two = on_one_and_on_two(tmp_path, scope, groups=3)
    mine, theirs = load_file(one / "lora.safetensors"), load_file(two / "lora.safetensors")
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["group", "global"])
def test_groups_of_different_processes_are_never_mixed(tmp_path, scope):
    """Five groups: with numbers made from each process's own count, two of them were once the same."""
    on_one_and_on_two(tmp_path, scope, groups=5)


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
