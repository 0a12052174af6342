"""Training on rewards that take their time: scored while sampling goes on, missing now and then, skipped by people."""

import json
import threading
import weakref
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from densegrpo.engine import cli
from densegrpo.engine.config import make_config
from densegrpo.engine.distributed import Solo
from densegrpo.engine.protocols import RewardBatch, RewardResult
from densegrpo.engine.rewards import Panel, brightness, make_reward
from densegrpo.engine.rewards.brightness import Brightness
from densegrpo.engine.run import Run
from densegrpo.engine.serve import make_server
from densegrpo.engine.session import Session
from densegrpo.engine.train import RewardError, TrainSettings, train
from densegrpo.engine.waiting import wait_until
from gaussian_flow import GaussianFlow
from method_variants import NAMES, PROMPTS, VARIANTS, Counting, Recording, small
from safetensors import safe_open
from safetensors.torch import load_file


class Far(Brightness):
    """Brightness as computed elsewhere."""

    remote: ClassVar[bool] = True


def panel_of(kind):
    return Panel([("bright", kind(), 1.0), ("grey", make_reward("brightness", target=0.4), 0.5)])


def trained(recipe, panel, groups=3):
    """(gradients of all optimizer steps, statistics of all iterations)"""
    model = Counting()
    learner, cond = Recording(model), model.encode([p.text for p in PROMPTS])
    options = TrainSettings(iterations=2, groups=groups, num_steps=6, sample_batch=7, train_batch=5)
    stats = [i.stats for i in train(model, cond, PROMPTS, panel, recipe, learner, options, Solo())]
    return learner.gradients, stats


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=NAMES)
def test_scoring_elsewhere_while_sampling_goes_on_changes_nothing(name, options):
    """Groups are then sampled one by one; neither what is learnt nor what it costs depends on that."""
    recipe = small(name, options)
    (near, numbers), (far, others) = (trained(recipe, panel_of(kind)) for kind in (Brightness, Far))
    assert len(near) == len(far)
    for a, b in zip(far, near, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()) + 1e-7, rtol=1e-3)
    for a, b in zip(others, numbers, strict=True):
        assert a["evaluations"] == b["evaluations"]
        for key in ("reward", "group_std", "loss", "kl", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-4), key


class Flow(GaussianFlow):
    """Counts its calls."""

    calls = 0

    def velocity(self, *arguments):
        self.calls += 1
        return super().velocity(*arguments)


@dataclass
class Patient:
    """Answers for the first group only once the next one is being sampled."""

    remote: ClassVar[bool] = True
    model: Flow
    overlapped: list = field(default_factory=list)

    def __call__(self, batch):
        seen = self.model.calls
        if not self.overlapped:
            self.overlapped.append(wait_until(lambda: self.model.calls > seen, 10))
        return RewardResult(batch.images.flatten(1).mean(1))

    def validate(self, prompts, metadata):
        return []


def test_the_first_group_is_scored_while_the_next_is_sampled():
    model = Flow()
    reward = Patient(model)
    options = TrainSettings(iterations=1, groups=2, num_steps=6)
    learner, cond = Recording(model), model.encode([p.text for p in PROMPTS])
    list(train(model, cond, PROMPTS, Panel([("far", reward, 1.0)]), small("flow_grpo", {}), learner, options))
    assert reward.overlapped == [True]


CONFIG = {
    "name": "far",
    "model": {"name": "demo"},
    "method": {"name": "flow_grpo", "group_size": 4, "kl_weight": 0.0},
    "prompts": ["a red circle", "two blue squares"],
    "held_out_prompts": ["a black circle"],
    "training": {"iterations": 3, "groups": 2, "num_steps": 4},
    "evaluation": {"images_per_prompt": 1, "num_steps": 3},
}


def entry(port, **options):
    return {"name": "remote_http", "url": f"http://127.0.0.1:{port}", "patience": 0.0, **options}


@pytest.fixture
def server():
    """Serves darkness until it is told not to."""
    made = make_server([{"name": "brightness", "target": 0.0}], "127.0.0.1", 0)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def test_a_run_on_a_served_reward_learns_what_one_on_the_local_reward_learns(tmp_path, server):
    """PNG has 256 levels, so scores differ by less than one of them."""
    rows = {}
    for name, reward in (("near", {"name": "brightness", "target": 0.0}), ("far", entry(server.server_address[1]))):
        run = Run.create(make_config(CONFIG | {"name": name, "rewards": [reward]}), tmp_path, tmp_path)
        list(Session(run).execute())
        rows[name] = run.metrics()
    for a, b in zip(rows["near"], rows["far"], strict=True):
        assert a.get("reward", 0) == pytest.approx(b.get("reward", 0), abs=2 / 255)
        assert a.get("evaluation_reward", 0) == pytest.approx(b.get("evaluation_reward", 0), abs=2 / 255)


def test_a_server_that_goes_away_ends_the_run_and_nothing_is_lost(tmp_path, server, capsys):
    """And when it is back, the run goes on to the same end."""
    port = server.server_address[1]
    path = tmp_path / "far.json"
    path.write_text(json.dumps(CONFIG | {"rewards": [entry(port)]}))
    run = Run.create(make_config(json.loads(path.read_text())), tmp_path / "straight", tmp_path)
    list(Session(run).execute())

    broken = Run.create(make_config(json.loads(path.read_text())), tmp_path / "broken", tmp_path)
    session = Session(broken)

    def until_it_is_gone():
        for progress in session.execute():
            if progress.number == 1:
                server.shutdown()
                server.server_close()

    with pytest.raises(RewardError, match=r"iteration 2: 8 of 8 images could not be scored .* then resume the run"):
        until_it_is_gone()
    assert session.learner.iteration == 1
    assert cli.main(["resume", str(broken.folder)]) == 2
    assert "could not be scored" in capsys.readouterr().err

    again = make_server([{"name": "brightness", "target": 0.0}], "127.0.0.1", port)
    threading.Thread(target=again.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    assert cli.main(["resume", str(broken.folder)]) == 0
    again.shutdown()
    again.server_close()
    mine, theirs = (load_file(r.folder / "lora.safetensors") for r in (broken, run))
    assert all(torch.equal(theirs[name], value) for name, value in mine.items())


def test_a_lora_does_not_say_where_its_rewards_were_computed(tmp_path, server):
    reward = entry(server.server_address[1])
    run = Run.create(make_config(CONFIG | {"rewards": [reward]}), tmp_path, tmp_path)
    list(Session(run.continued(1)).execute())
    with safe_open(run.folder / "lora.safetensors", "pt") as file:
        assert json.loads(file.metadata()["densegrpo.rewards"]) == [{"name": "remote_http"}]


def test_images_are_dropped_once_they_are_scored(monkeypatch):
    """A dense probe makes ten times as many images as chains: only those of the chains' ends are kept."""
    kept, alive, usual = [], [], RewardBatch.__init__

    def remembered(self, images, *rest):
        kept.append(weakref.ref(images))
        alive.append(sum(reference() is not None for reference in kept))
        usual(self, images, *rest)

    monkeypatch.setattr(RewardBatch, "__init__", remembered)
    model = Counting()
    learner, cond = Recording(model), model.encode([p.text for p in PROMPTS])
    options = TrainSettings(iterations=1, groups=2, num_steps=6, sample_batch=7)
    panel = Panel([("bright", Brightness(), 1.0)])
    loop = train(model, cond, PROMPTS, panel, small("dense_grpo", {}), learner, options)
    iteration = next(loop)
    assert len(kept) > 5
    assert max(alive) <= 2, "the batch that is being scored, and the one before"
    assert len(iteration.images) == 8


def test_a_server_that_is_not_there_is_noticed_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="reward remote_http"):
        Run.create(make_config(CONFIG | {"rewards": [entry(9)]}), tmp_path, tmp_path)
    assert not (tmp_path / "far").exists()


@pytest.mark.parametrize(("most", "ends"), [(0.5, True), (0.8, False)])
def test_how_much_may_be_missing_can_be_chosen(tmp_path, monkeypatch, most, ends):
    def mostly_missing(self, batch):
        scores = torch.rand(len(batch.prompts))
        scores[3:] = torch.nan
        return RewardResult(scores)

    monkeypatch.setattr(brightness.Brightness, "__call__", mostly_missing)
    training = CONFIG["training"] | {"max_missing": most, "groups": 2}
    config = CONFIG | {"rewards": [{"name": "brightness"}], "training": training, "held_out_prompts": None}
    session = Session(Run.create(make_config(config), tmp_path, tmp_path))
    if ends:
        with pytest.raises(RewardError, match="5 of 8 images could not be scored"):
            list(session.execute())
    else:
        list(session.execute())
    assert session.learner.iteration == (0 if ends else 3)


class Skipping(Brightness):
    """A person who passes over everything, or the first group only."""

    interactive: ClassVar[bool] = True
    first_only = False

    def __call__(self, batch):
        scores = super().__call__(batch).scores
        skipped = batch.groups == batch.groups[0] if self.first_only else torch.ones(len(scores), dtype=torch.bool)
        rows = frozenset(skipped.nonzero().flatten().tolist())
        return RewardResult(scores.masked_fill(skipped, torch.nan), skipped=rows)


def steps(kind, method="flow_grpo", others=()):
    model = Counting()
    learner, cond = Recording(model), model.encode([p.text for p in PROMPTS])
    options = TrainSettings(iterations=2, groups=2, num_steps=6)
    panel = Panel([("you", kind(), 1.0), *others])
    loop = train(model, cond, PROMPTS, panel, small(method, {}), learner, options)
    stats = [iteration.stats for iteration in loop]
    return learner, stats


def test_an_iteration_that_is_skipped_altogether_teaches_nothing_and_the_run_goes_on():
    learner, stats = steps(Skipping)
    assert learner.iteration == 2
    assert learner.gradients == []
    assert [(row["unscored"], row["skipped"]) for row in stats] == [(0, 1)] * 2


@pytest.mark.parametrize(("method", "others"), [("flow_grpo", ()), ("dense_grpo", [("far", Far(), 1.0)])])
def test_a_skipped_group_teaches_nothing_but_the_other_does(method, others):
    class First(Skipping):
        first_only = True

    learner, stats = steps(First, method, others)
    assert learner.gradients
    assert all(gradient.abs().max() > 0 for gradient in learner.gradients)
    assert [(row["masked"], row["unscored"], row["skipped"]) for row in stats] == [(0.5, 0, 0.5)] * 2
    assert [row["rewards"]["you"]["missing"] for row in stats] == [0, 0]


def test_people_are_never_asked_in_evaluations(tmp_path, monkeypatch):
    monkeypatch.setattr(brightness.Brightness, "interactive", True, raising=False)
    groups = []
    usual = brightness.Brightness.__call__
    monkeypatch.setattr(
        brightness.Brightness, "__call__", lambda self, batch: (groups.append(batch.groups), usual(self, batch))[1]
    )
    run = Run.create(make_config(CONFIG | {"rewards": [{"name": "brightness"}]}), tmp_path, tmp_path)
    list(Session(run).execute())
    rows = run.metrics()
    assert len(groups) == 3, "once an iteration"
    assert all(len(g) == 8 for g in groups)
    assert rows[0]["evaluation"] == {}
    assert rows[0]["evaluation_reward"] is None
    assert rows[-1]["statistics"]["brightness"] > 0
    assert (run.folder / "samples" / "after.png").exists()
    assert (run.folder / "report.html").exists()
