"""What the record of a run says: its newest line, images without a score, and what is to be seen to."""

import importlib.util
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import densegrpo
import pytest
import torch
from densegrpo.engine import metrics
from densegrpo.engine.config import make_config
from densegrpo.engine.data import Advantages, Plan, Prompt, StepRewards
from densegrpo.engine.distributed import Solo
from densegrpo.engine.metrics import append_row, last_row, read_rows, write_rows
from densegrpo.engine.protocols import RewardResult
from densegrpo.engine.report import unjudged_curve, warnings
from densegrpo.engine.reward_stats import PATIENCE, Idleness, one_reward, reward_stats
from densegrpo.engine.rewards import Panel, brightness, colourfulness
from densegrpo.engine.run import Run
from densegrpo.engine.session import Progress, Session

GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
CONFIG = {
    "name": "recorded",
    "model": {"name": "demo"},
    "method": {"name": "flow_grpo", "group_size": 3, "kl_weight": 0.0},
    "rewards": [{"name": "brightness"}],
    "prompts": ["a red circle", "a blue square"],
    "held_out_prompts": ["a red square", "a blue circle"],
    "held_out_rewards": [{"name": "colourfulness"}],
    "training": {"iterations": 2, "groups": 1, "num_steps": 2},
    "evaluation": {"every": 1, "images_per_prompt": 2, "num_steps": 2},
}


def new_session(folder, report=False, **changes):
    session = Session(Run.create(make_config(CONFIG | changes), folder, folder))
    if not report:
        session.report = lambda: None
    return session


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"iteration": 0',
        '{"iteration": 0}\n',
        '{"iteration": 0}\n{"iteration": 1}\n{"itera',
        '{"iteration": 0}\n' + json.dumps({"iteration": 1, "long": "x" * 500}) + "\n",
        json.dumps({"iteration": 1, "long": "x" * 500}) + '\n{"cut off": "' + "y" * 300,
        "".join(f'{{"iteration": {i}}}\n' for i in range(100)),
    ],
    ids=["empty", "cut", "one", "two and a cut one", "long", "before a long cut one", "many"],
)
@pytest.mark.parametrize("tail", [1, 17, 64, 65536])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_newest_line_is_the_last_of_all_lines(tmp_path, monkeypatch, text, tail, newline):
    monkeypatch.setattr(metrics, "TAIL", tail)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8", newline=newline)
    every = read_rows(tmp_path)
    assert last_row(tmp_path) == (every[-1] if every else None)


def test_the_newest_line_is_found_without_reading_the_others(tmp_path, monkeypatch):
    assert last_row(tmp_path) is None
    content, lengths = b"no JSON}\n" * 100 + b'{"iteration": 7}\n', []
    (tmp_path / "metrics.jsonl").write_bytes(content)

    class Noted(io.BytesIO):
        def read(self, size=-1, /):
            lengths.append(size)
            return super().read(size)

    monkeypatch.setattr(metrics, "TAIL", 100)
    monkeypatch.setattr(Path, "open", lambda *_: Noted(content))
    assert last_row(tmp_path) == {"iteration": 7}
    assert lengths == [100]


def test_numbers_that_are_none_are_written_as_null(tmp_path):
    append_row(tmp_path, {"iteration": 0, "rewards": {"a": {"mean": float("nan")}}})
    append_row(tmp_path, {"iteration": 1, "list": [float("inf"), 1.0]})
    rows = [{"iteration": 0, "rewards": {"a": {"mean": None}}}, {"iteration": 1, "list": [None, 1.0]}]
    assert read_rows(tmp_path) == rows
    write_rows(tmp_path, [{"iteration": 0, "number": float("nan")}])
    assert read_rows(tmp_path) == [{"iteration": 0, "number": None}]


@pytest.fixture
def host(monkeypatch):
    """nodes/progress.py on a host that only notes what it is sent."""
    sent = []
    instance = SimpleNamespace(
        send_progress_text=lambda *_: None,
        send_sync=lambda name, data: sent.append((name, json.loads(json.dumps(data)))),
    )
    bar = SimpleNamespace(update_absolute=lambda *_: None)
    modules = {
        "comfy.utils": {"ProgressBar": lambda *_, **__: bar},
        "comfy": {},
        "folder_paths": {},
        "aiohttp": {"web": SimpleNamespace(Request=None, Response=None)},
        "server": {"PromptServer": SimpleNamespace(instance=instance)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["comfy"], "utils", sys.modules["comfy.utils"], raising=False)
    path = f"{densegrpo.__path__[0]}/nodes/progress.py"
    spec = importlib.util.spec_from_file_location("densegrpo.nodes.progress", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return SimpleNamespace(follower=loaded.Follower("5"), sent=sent)


def test_a_page_is_sent_the_newest_line_and_the_file_is_not_read_for_it(tmp_path, monkeypatch, host):
    session = new_session(tmp_path)
    rows = [{"iteration": i, "reward": 0.1 * i} for i in range(3)]
    for row in rows:
        append_row(session.run.folder, row)
        monkeypatch.setattr(Run, "metrics", lambda _: pytest.fail("it read all lines"))
        host.follower(session, Progress(row["iteration"], 5))
    assert [data["row"] for _, data in host.sent] == rows
    assert host.sent[-1] == ("densegrpo.progress", {"node": "5", "run": "recorded", "total": 5, "row": rows[-1]})


def test_what_failed_and_what_a_person_passed_over_are_counted_apart():
    scores = torch.tensor([1.0, torch.nan, 2.0, 3.0, torch.nan, torch.nan, torch.nan, torch.nan])
    found = one_reward(scores, GROUP == 1, GROUP)
    assert (found["missing"], found["skipped"]) == (1 / 8, 1 / 2)


@dataclass
class Person:
    """Passes over the second group."""

    interactive: ClassVar[bool] = True

    def __call__(self, batch):
        second = batch.groups == 1
        rows = frozenset(second.nonzero().flatten().tolist())
        return RewardResult(torch.rand(len(second)).masked_fill(second, torch.nan), skipped=rows)


@dataclass
class Failing:
    """Cannot score the first image of each group."""

    def __call__(self, batch):
        scores = torch.rand(8)
        scores[[0, 4]] = torch.nan
        return RewardResult(scores, errors={0: "blurred", 4: "blurred"})


def test_each_reward_is_charged_with_its_own_failures_only():
    """An image that a person passed over may have failed elsewhere; of the whole iteration it counts as passed over."""
    panel = Panel([("you", Person(), 1.0), ("model", Failing(), 1.0)])
    scored = panel(torch.zeros(8, 3, 2, 2), [Prompt("a", {})] * 8, GROUP)
    nothing = torch.zeros(8)
    plan = Plan(nothing, GROUP, GROUP, torch.ones(8, 1), torch.ones(8, 1).bool(), GROUP, GROUP, ((0, 0, 0),) * 8)
    advantages = Advantages(torch.zeros(8, 1), torch.ones(8, 1).bool())
    rewards = StepRewards(scored.scores[..., None], torch.ones(2))
    found = reward_stats(rewards, torch.zeros(2, 8, 1), advantages, plan, scored.by_reward, scored.passed_over, Solo())
    assert (found["unscored"], found["skipped"]) == (1 / 8, 1 / 2)
    assert [found["rewards"][name]["missing"] for name in ("you", "model")] == [0, 1 / 4]
    assert [found["rewards"][name]["skipped"] for name in ("you", "model")] == [1 / 2, 0]
    assert scored.errors == ["model: blurred"] * 2
    assert torch.equal(scored.skipped, GROUP == 1)


def fails_on_the_first(reward, evaluated):
    """That reward, which cannot score the first image when it is asked for as many images as evaluations have."""
    usual = reward.__call__

    def call(self, batch):
        scores = usual(self, batch).scores
        if len(batch.prompts) != evaluated:
            return RewardResult(scores)
        scores[0] = torch.nan
        return RewardResult(scores, errors={0: "HTTP 503"})

    return call


def test_an_evaluation_says_how_much_it_lacks_and_why(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(colourfulness.Colourfulness, "__call__", fails_on_the_first(colourfulness.Colourfulness, 4))
    session = new_session(tmp_path, report=True)
    list(session.execute())
    rows = session.run.metrics()
    assert [row["evaluation_missing"] for row in rows] == [{"held-out/colourfulness": 0.25}] * 3
    sentence = "held-out/colourfulness: 1 of 4 held-out images have no score: HTTP 503"
    assert all(sentence in row["warnings"] for row in rows)
    assert caplog.text.count(sentence) == 1, "the same thing is said once"
    page = (session.run.folder / "report.html").read_text(encoding="utf-8")
    assert f"<li>iteration 0 and 2 more: {sentence}</li>" in page
    assert f"{rows[0]['evaluation']['held-out/colourfulness']:.3f} (of 3)" in page
    assert f"<td>{rows[0]['evaluation']['brightness']:.3f}</td>" in page


def test_too_few_images_for_the_guard_are_said_once(tmp_path, caplog):
    session = new_session(tmp_path)
    list(session.execute())
    rows = session.run.metrics()
    sentence = "held-out/colourfulness has scores of 4 images that an earlier evaluation scored too: too few to tell"
    assert [any(w.startswith(sentence) for w in row.get("warnings", ())) for row in rows] == [False, True, True]
    assert caplog.text.count(sentence) == 1
    assert [row["evaluation_missing"] for row in rows] == [{}] * 3


@pytest.mark.parametrize(("writes", "times"), [(True, 1), (False, 0)], ids=["the first", "another"])
def test_one_process_of_several_logs_an_alarm(tmp_path, caplog, writes, times):
    session = new_session(tmp_path)
    session.writes = writes
    row = session.said(Progress(3, 9, alarms=["the reward is being gamed"], warnings=["few images"]))
    assert row == {"alarms": ["the reward is being gamed"], "warnings": ["few images"]}
    for sentence in ("iteration 3: the reward is being gamed", "iteration 3: few images"):
        assert caplog.text.count(sentence) == times


def test_the_alarm_of_an_evaluation_is_logged_once(tmp_path, caplog):
    session = new_session(tmp_path)
    add = session.guard.add
    session.guard.add = lambda *given, **more: add(*given, **more) or ["it is being gamed"]
    list(session.execute())
    assert caplog.text.count("it is being gamed") == 1
    assert [row["alarms"] for row in session.run.metrics()] == [["it is being gamed"]] * 3


def test_a_run_in_which_nothing_fails_has_no_warnings(tmp_path, caplog):
    training = CONFIG["training"] | {"iterations": 1}
    session = new_session(tmp_path, training=training, evaluation=CONFIG["evaluation"] | {"images_per_prompt": 4})
    list(session.execute())
    assert not any("warnings" in row for row in session.run.metrics())
    assert not caplog.text


def test_an_iteration_says_why_images_have_no_score(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(brightness.Brightness, "__call__", fails_on_the_first(brightness.Brightness, 3))
    session = new_session(tmp_path, report=True, held_out_prompts=None, held_out_rewards=[])
    list(session.execute())
    rows = [row for row in session.run.metrics() if "reward" in row]
    assert [row["unscored"] for row in rows] == pytest.approx([1 / 3] * 2)
    assert [row["warnings"] for row in rows] == [["some images have no score: brightness: HTTP 503"]] * 2
    assert caplog.text.count("HTTP 503") == 1
    assert "Share of training images without a score" in (session.run.folder / "report.html").read_text("utf-8")


def test_what_an_iteration_warned_of_is_kept_when_its_evaluation_is_made_up_for(tmp_path, monkeypatch):
    monkeypatch.setattr(brightness.Brightness, "__call__", fails_on_the_first(brightness.Brightness, 3))
    session = new_session(tmp_path)
    due = Session.due_evaluation

    def cancelled(self, number):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "due_evaluation", cancelled)
    with pytest.raises(KeyboardInterrupt):
        list(session.execute())
    monkeypatch.setattr(Session, "due_evaluation", due)
    list(Session(session.run, resume=True).execute())
    row = session.run.metrics()[1]
    assert row["iteration"] == 1
    assert "evaluation" in row
    assert row["warnings"][0] == "some images have no score: brightness: HTTP 503"
    assert len(row["warnings"]) == len(set(row["warnings"])) == 3


def test_the_same_warning_is_one_line_of_the_report():
    rows = [{"iteration": i, "warnings": ["<down>", f"other {i}"][: 1 + (i == 2)]} for i in range(4)]
    page = warnings(rows)
    assert page.count("<li>") == 2
    assert "iteration 0 and 3 more: &lt;down&gt;" in page
    assert "iteration 2: other 2" in page
    assert warnings([{"iteration": 0}]) == ""


def test_runs_of_earlier_versions_do_not_tell_who_passed_over():
    drawn = []
    axes = SimpleNamespace(plot=lambda x, y, label: drawn.append((list(x), list(y), label)), legend=lambda: None)
    unjudged_curve(axes, [{"iteration": 1, "unscored": 0.5}, {"iteration": 2, "unscored": 0.25, "skipped": 0.75}])
    assert drawn == [([1, 2], [0.5, 0.25], "could not be scored"), ([2], [0.75], "people passed over")]


def row_of(zero=None, **flat):
    """The statistics of an iteration; reward -> share of flat groups, None when nothing was scored.

    ``zero``: share of advantages that are 0; all of them when all rewards are flat, unless it is given.
    """
    zero = float(all(found in (None, 1.0) for found in flat.values())) if zero is None else zero
    rewards = {
        name: {"mean": float("nan") if found is None else 0.5, "flat_groups": found or 0.0}
        for name, found in flat.items()
    }
    return {"rewards": rewards, "zero_advantages": zero}


def test_a_reward_that_tells_no_images_apart_is_named_after_a_while():
    idleness = Idleness()
    said = [idleness.add(row_of(dead=1.0, alive=0.9)) for _ in range(3 * PATIENCE)]
    assert [len(found) for found in said] == [int(i == PATIENCE - 1) for i in range(3 * PATIENCE)]
    assert said[PATIENCE - 1][0].startswith("reward dead gave all images of each group the same score, 10 iterations")


def test_one_group_that_differs_makes_a_reward_alive_again():
    idleness = Idleness()
    pattern = [1.0] * (PATIENCE - 1) + [0.5] + [1.0] * PATIENCE
    assert [bool(idleness.add(row_of(a=share))) for share in pattern] == [False] * (len(pattern) - 1) + [True]


def test_steps_to_equal_ends_can_teach():
    """A step-wise method learns from how soon images became good, though all of them are good in the end."""
    idleness = Idleness()
    assert not any(idleness.add(row_of(a=1.0, zero=0.4)) for _ in range(2 * PATIENCE))


def test_iterations_without_any_score_do_not_count():
    idleness = Idleness()
    pattern = [1.0] * (PATIENCE - 1) + [None] * 5 + [1.0]
    assert [bool(idleness.add(row_of(a=share))) for share in pattern] == [False] * (len(pattern) - 1) + [True]


def test_scores_that_differ_but_teach_nothing_are_noticed_too():
    """As when min_std is too large, or all scores are above their cap."""
    idleness = Idleness()
    said = [idleness.add(row_of(a=0.0, flat=1.0, zero=1.0)) for _ in range(PATIENCE)]
    assert said[:-1] == [[]] * (PATIENCE - 1)
    flat, all_zero = said[-1]
    assert flat.startswith("reward flat gave all images")
    assert all_zero.startswith("nothing was learnt 10 iterations in a row: every advantage is 0; lower min_std")


@pytest.mark.parametrize(
    ("reward", "changes", "sentence"),
    [
        ("brightness", {}, "reward brightness gave all images of each group the same score"),
        ("colourfulness", {"min_std": 100.0}, "nothing was learnt"),
        ("colourfulness", {"cap": -1.0}, "nothing was learnt"),
    ],
    ids=["flat", "below min_std", "above cap"],
)
def test_a_run_that_learns_nothing_says_so(tmp_path, monkeypatch, caplog, reward, changes, sentence):
    monkeypatch.setattr("densegrpo.engine.reward_stats.PATIENCE", 2)
    flat = lambda self, batch: RewardResult(torch.full((len(batch.prompts),), 0.3, dtype=torch.float64))  # noqa: E731
    monkeypatch.setattr(brightness.Brightness, "__call__", flat)
    session = new_session(tmp_path, rewards=[{"name": reward, **changes}], held_out_prompts=None, held_out_rewards=[])
    list(session.execute())
    rows = session.run.metrics()[1:]
    assert [row["zero_advantages"] for row in rows] == [1, 1]
    assert "warnings" not in rows[0]
    assert rows[1]["warnings"][0].startswith(sentence)
    assert len(rows[1]["warnings"]) == 1
    assert sentence in caplog.text
