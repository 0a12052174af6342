"""Runs on disk: what is written, what survives a kill, what bad input says."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from densegrpo.engine import cli
from densegrpo.engine.checkpoint import SaveError, checkpoints, load_checkpoint, save_checkpoint
from densegrpo.engine.config import make_config
from densegrpo.engine.protocols import RewardResult
from densegrpo.engine.recipes import RECIPES
from densegrpo.engine.rewards import REWARDS, brightness
from densegrpo.engine.run import Run
from densegrpo.engine.session import Session
from safetensors.torch import load_file

SMALL = {
    "name": "small",
    "model": {"name": "demo"},
    "method": {"name": "dense_grpo", "group_size": 3, "kl_weight": 0.01},
    "rewards": [{"name": "brightness", "target": 0.0}],
    "prompts": ["a red circle", "two blue squares", "a green triangle"],
    "held_out_prompts": ["a black circle"],
    "lora": {"rank": 2, "alpha": 4.0},
    "optimizer": {"lr": 1e-3, "ema_every": 2},
    "training": {"iterations": 5, "groups": 2, "num_steps": 4, "train_batch": 16},
    "evaluation": {"every": 2, "images_per_prompt": 2, "num_steps": 3},
    "saving": {"every": 2, "keep": 2},
}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


def new_run(out, **changes):
    return Run.create(make_config(SMALL | changes), out, out)


def finish(run, resume=False):
    return list(Session(run, resume=resume).execute())


def lora_of(run):
    return load_file(run.folder / "lora.safetensors")


def learnt(run):
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in run.metrics()]


def test_a_run_leaves_everything_a_user_expects(tmp_path, config_file, capsys):
    assert cli.main(["train", str(config_file), "--out", str(tmp_path / "runs")]) == 0
    folder = tmp_path / "runs" / "small"
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "prompts.jsonl", "held_out.jsonl", "metrics.jsonl", "report.html"} <= names
    assert {p.name for p in (folder / "samples").iterdir()} == {
        "before.png",
        "step_000002.png",
        "step_000004.png",
        "after.png",
    }
    assert [p.name for p in checkpoints(folder / "checkpoints")] == ["step_000004", "step_000005"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert "evaluation" in rows[0]
    assert "evaluation" in rows[5]
    assert "evaluation" not in rows[3]
    assert "held-out reward: base 0." in capsys.readouterr().out
    report = (folder / "report.html").read_text()
    assert "http" not in report.replace("http-equiv", "")
    assert report.count("data:image/png") >= 8


def test_stopping_and_resuming_equals_never_stopping(tmp_path):
    straight = new_run(tmp_path / "a")
    finish(straight)
    broken = new_run(tmp_path / "b")
    for progress in (session := Session(broken).execute()):
        if progress.number == 3:
            session.close()
            break
    assert [p.name for p in checkpoints(broken.folder / "checkpoints")] == ["step_000002", "step_000003"]
    finish(Run.open(broken.folder), resume=True)
    assert all(torch.equal(value, lora_of(broken)[name]) for name, value in lora_of(straight).items())
    states = [load_checkpoint(run.folder / "checkpoints") for run in (straight, broken)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert learnt(straight) == learnt(broken)


def test_a_killed_process_resumes_bit_for_bit(tmp_path, config_file):
    straight = new_run(tmp_path / "a")
    finish(straight)
    command = [sys.executable, "-m", "densegrpo.engine.cli", "train", str(config_file), "--out", str(tmp_path / "b")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    folder = tmp_path / "b" / "small"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "step_000002").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert cli.main(["resume", str(folder)]) == 0
    assert all(
        torch.equal(value, load_file(folder / "lora.safetensors")[name]) for name, value in lora_of(straight).items()
    )
    assert learnt(straight) == learnt(Run.open(folder))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    path = tmp_path / "long.json"
    path.write_text(json.dumps(SMALL | {"training": SMALL["training"] | {"iterations": 5000}}))
    command = [sys.executable, "-m", "densegrpo.engine.cli", "train", str(path), "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "small" / "checkpoints" / "step_000002").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"continue with: densegrpo resume {tmp_path / 'small'}" in errors
    newest = checkpoints(tmp_path / "small" / "checkpoints")[-1]
    assert f"saved after iteration {int(newest.name[5:])};" in errors
    assert (tmp_path / "small" / "lora.safetensors").exists()


def test_an_exception_in_an_update_leaves_the_last_whole_iteration(tmp_path, monkeypatch):
    run = new_run(tmp_path, held_out_prompts=None)
    session = Session(run)
    real_step, calls = session.learner.step, []

    def failing_step():
        calls.append(1)
        norm = real_step()
        if len(calls) == 4:  # the second of the two updates of iteration 2
            raise KeyboardInterrupt
        return norm

    monkeypatch.setattr(session.learner, "step", failing_step)
    with pytest.raises(KeyboardInterrupt):
        list(session.execute())
    other = new_run(tmp_path / "other", held_out_prompts=None)
    finish(
        replace(
            other,
            config=make_config(
                json.loads(other.config.to_json()) | {"training": SMALL["training"] | {"iterations": 1}}
            ),
        )
    )
    states = [load_checkpoint(r.folder / "checkpoints") for r in (run, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_can_be_made_longer(tmp_path):
    straight = new_run(tmp_path / "a", training=SMALL["training"] | {"iterations": 6})
    finish(straight)
    short = new_run(tmp_path / "b")
    finish(short)
    assert cli.main(["resume", str(short.folder), "--iterations", "6"]) == 0
    assert all(torch.equal(value, lora_of(short)[name]) for name, value in lora_of(straight).items())


def test_the_same_run_twice_is_the_same(tmp_path):
    runs = [new_run(tmp_path / name) for name in "ab"]
    for run in runs:
        finish(run)
    assert learnt(runs[0]) == learnt(runs[1])


def test_another_seed_is_another_run(tmp_path):
    runs = [new_run(tmp_path / str(s), training=SMALL["training"] | {"seed": s, "iterations": 1}) for s in (0, 1)]
    for run in runs:
        finish(run)
    assert learnt(runs[0])[1]["reward"] != learnt(runs[1])[1]["reward"]


def refused(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in captured.err
    return captured.err.splitlines()[-1]


def test_an_existing_run_is_not_overwritten(tmp_path, config_file, capsys):
    new_run(tmp_path / "runs")
    assert "exists; continue it with" in refused(capsys, "train", config_file, "--out", tmp_path / "runs")


def test_a_second_demo_keeps_the_first(tmp_path, capsys):
    for _ in range(2):
        assert cli.main(["demo", "--out", str(tmp_path), "--iterations", "0"]) == 0
    assert {"demo", "demo.1"} <= {p.name for p in tmp_path.iterdir()}


def test_resuming_what_is_no_run_is_refused(tmp_path, capsys):
    assert "is not a run: it has no config.json" in refused(capsys, "resume", tmp_path)


def test_resuming_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert "holds no checkpoint" in refused(capsys, "resume", new_run(tmp_path).folder)


@pytest.mark.parametrize("damage", ["cut", "missing", "garbage"])
def test_a_damaged_checkpoint_is_named_and_an_older_one_offered(tmp_path, capsys, damage):
    run = new_run(tmp_path)
    finish(run)
    state = run.folder / "checkpoints" / "step_000005" / "state.safetensors"
    if damage == "missing":
        state.unlink()
    else:
        state.write_bytes(state.read_bytes()[:1000] if damage == "cut" else b"x" * 100)
    message = refused(capsys, "resume", run.folder)
    assert "step_000005 is damaged" in message
    assert "delete that folder to resume from step_000004" in message
    shutil.rmtree(state.parent)
    before = learnt(run)
    assert cli.main(["resume", str(run.folder)]) == 0
    assert learnt(run) == before


def test_a_checkpoint_of_another_lora_is_refused(tmp_path, capsys):
    run = new_run(tmp_path)
    finish(run)
    data = json.loads((run.folder / "config.json").read_text())
    data["lora"]["rank"] = 3
    (run.folder / "config.json").write_text(json.dumps(data))
    assert "belongs to another LoRA" in refused(capsys, "resume", run.folder, "--iterations", 9)


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path, monkeypatch):
    import densegrpo.engine.checkpoint as checkpoint

    state = {"iteration": torch.tensor(1), "x": torch.arange(3)}
    save_checkpoint(tmp_path, 1, state, keep=3)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SaveError, match=r"could not save .*step_000002.*No space left.*free some space"):
        save_checkpoint(tmp_path, 2, state, keep=3)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert torch.equal(load_checkpoint(tmp_path)["x"], state["x"])


FULL_DISK = """
import resource, signal, sys
from densegrpo.engine import cli
from densegrpo.engine.session import Session
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real = Session.save
def save(self):
    if self.learner.iteration >= 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    real(self)
Session.save = save
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_real_write_error_ends_in_one_sentence_and_the_run_resumes(tmp_path, config_file):
    command = [sys.executable, "-c", FULL_DISK, "train", str(config_file), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "densegrpo: could not save" in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "small"
    assert [p.name for p in checkpoints(folder / "checkpoints")] == ["step_000002"]
    straight = new_run(tmp_path / "a")
    finish(straight)
    assert cli.main(["resume", str(folder)]) == 0
    assert all(
        torch.equal(value, load_file(folder / "lora.safetensors")[name]) for name, value in lora_of(straight).items()
    )


def test_a_reward_without_any_score_ends_the_run_in_one_sentence(tmp_path, config_file, capsys, monkeypatch):
    monkeypatch.setattr(
        brightness.Brightness,
        "__call__",
        lambda self, batch: RewardResult(torch.full((len(batch.prompts),), torch.nan)),
    )
    message = refused(capsys, "train", config_file, "--out", tmp_path)
    assert "iteration 1: 24 of 24 images could not be scored" in message
    assert "mend the reward, then resume" in message


def test_some_unscored_images_do_not_stop_a_run(tmp_path, monkeypatch):
    real = brightness.Brightness.__call__

    def sometimes(self, batch):
        scores = real(self, batch).scores
        return RewardResult(scores.where(scores <= scores.median(), torch.nan))

    monkeypatch.setattr(brightness.Brightness, "__call__", sometimes)
    rows = finish(new_run(tmp_path, held_out_prompts=None))
    assert len(rows) == 6
    assert 0 < rows[-1].iteration.stats["unscored"] < 1


def test_a_prompt_that_does_not_suit_the_reward_is_refused_before_training(tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(SMALL | {"rewards": [{"name": "shapes"}], "prompts": ["a cat"]}))
    message = refused(capsys, "train", path, "--out", tmp_path)
    assert "prompt 'a cat'" in message
    assert "no 'include' clauses" in message
    assert not (tmp_path / "small").exists()


def test_recipes_lists_every_method_with_its_options(capsys):
    assert cli.main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert "flow_grpo: Flow-GRPO, arXiv 2505.05470" in printed
    assert all(f"\n{name}: " in printed for name in (*RECIPES, *REWARDS))
    assert cli.main(["recipes", "flow_grpo"]) == 0
    printed = capsys.readouterr().out
    assert 'kl = "flow_grpo"' in printed
    assert "group_size = 24" in printed


def test_the_report_can_be_drawn_again(tmp_path):
    run = new_run(tmp_path)
    finish(run)
    (run.folder / "report.html").unlink()
    assert cli.main(["report", str(run.folder)]) == 0
    assert "<h1>small</h1>" in (run.folder / "report.html").read_text()


def short_of_memory(session, most):
    """A model that runs out of memory with more than ``most`` latents in a call."""
    velocity = session.model.velocity

    def limited(x, *rest):
        if len(x) > most:
            raise torch.OutOfMemoryError(f"{len(x)} latents do not fit")
        return velocity(x, *rest)

    session.model.velocity = limited
    return session


def test_when_memory_runs_out_smaller_batches_learn_the_same(tmp_path):
    plenty, little = new_run(tmp_path / "a"), new_run(tmp_path / "b")
    finish(plenty)
    session = short_of_memory(Session(little), 5)
    assert len(list(session.execute())) == 6
    assert max(session.training.sample_batch, session.training.train_batch) <= 5
    for before, after in zip(learnt(plenty), learnt(little), strict=True):
        assert after.get("reward", 0) == pytest.approx(before.get("reward", 0), abs=1e-5)
        assert after.get("evaluation_reward", 0) == pytest.approx(before.get("evaluation_reward", 0), abs=1e-4)


def test_too_little_memory_for_one_latent_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    from densegrpo.engine import watch as watching
    from densegrpo.engine.distributed import Solo

    monkeypatch.setattr(watching, "Session", lambda *a, **k: short_of_memory(Session(*a, **k), 0))
    assert watching.watch(new_run(tmp_path), Solo(), resume=False) == 1
    message = capsys.readouterr().err
    assert "out of memory with training.train_batch = 1 and training.sample_batch = 1" in message
    assert "lower the model's resolution" in message
