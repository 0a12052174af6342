"""A person teaches the demo model by votes alone, over the page's own interface, and only because of the votes."""

import http.client
import io
import json
import threading

import numpy as np
import pytest
from densegrpo.engine.config import make_config
from densegrpo.engine.run import Run
from densegrpo.engine.session import Session
from densegrpo.engine.train import RewardError
from densegrpo.engine.votes.store import read_scores, write_scores
from PIL import Image

P = "/densegrpo/votes/"
CONFIG = {
    "name": "voted",
    "model": {"name": "demo"},
    "method": {"name": "flow_grpo", "group_size": 8, "clip_range": 0.01, "kl_weight": 0.0},
    "rewards": [{"name": "human_vote", "port": 0, "timeout": 60}],
    "prompts": "demo:train",
    "held_out_prompts": ["a black circle", "two blue squares", "a red triangle", "a green circle"],
    "held_out_rewards": [{"name": "brightness", "target": 0.0}],
    "lora": {"rank": 8, "alpha": 16.0},
    "optimizer": {"lr": 3e-3, "beta2": 0.99, "ema_decay": 0.0},
    "training": {"iterations": 8, "groups": 2, "num_steps": 6},
    "evaluation": {"images_per_prompt": 4, "num_steps": 6},
}


class Voter(threading.Thread):
    """Looks at the page until the run is over; ``ballot``: names, the darkest first -> answer."""

    def __init__(self, ballot, caplog):
        super().__init__(daemon=True)
        self.ballot, self.log, self.over, self.groups = ballot, caplog, threading.Event(), []

    @property
    def port(self):
        """As the run says it; None before."""
        told = self.log.text.rsplit("open http://127.0.0.1:", 1)[1:]
        return int(told[0].split("/")[0]) if told else None

    def ask(self, method, path, data=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, P + path, data and json.dumps(data), {"Content-Type": "application/json"})
        body = connection.getresponse().read()
        connection.close()
        return body

    def darkness(self, name):
        file = self.ask("GET", f"images/{name}.png")
        return -float(np.asarray(Image.open(io.BytesIO(file)).convert("L"), dtype=float).mean())

    def run(self):
        showing = None
        while not self.over.wait(0.02):
            if self.port is not None:
                try:
                    showing = self.look(showing)
                except OSError:  # the run is over: the page, or an image of it, is gone
                    continue

    def look(self, showing):
        """Vote on what the page shows; returns it."""
        state = json.loads(self.ask("POST", "look", {"voter": "me", "active": True, "showing": showing}))
        group = state.get("group")
        if group:
            self.vote(state, sorted(group["images"], key=self.darkness, reverse=True))
        return group and group["id"]

    def vote(self, state, images):
        self.groups.append(images)
        self.ask("POST", "vote", {"voter": "me", "group": state["group"]["id"], "ballot": self.ballot(images)})


def finish(session, voter):
    """Train while ``voter`` votes."""
    voter.log.clear()
    voter.start()
    try:
        list(session.execute())
    finally:
        voter.over.set()
        voter.join(10)


def voted(tmp_path, caplog, ballot):
    """(metrics, run folder) of a run that ``ballot`` decided."""
    run = Run.create(make_config(CONFIG), tmp_path, tmp_path)
    finish(Session(run), Voter(ballot, caplog))
    return run.metrics(), run.folder


def likes_dark(images):
    return {"likes": images[:3], "dislikes": images[-3:]}


def test_a_run_that_nobody_votes_in_ends_by_and_by(tmp_path):
    training = CONFIG["training"] | {"iterations": 9, "groups": 1}
    config = CONFIG | {"rewards": [{"name": "human_vote", "port": 0, "timeout": 1}], "training": training}
    session = Session(Run.create(make_config(config | {"held_out_prompts": None}), tmp_path, tmp_path))
    with pytest.raises(RewardError, match="nobody voted in 5 iterations in a row; when somebody is there, resume"):
        list(session.execute())
    assert session.learner.iteration == 4


@pytest.mark.slow
def test_the_model_learns_what_a_person_likes(tmp_path, caplog):
    rows, folder = voted(tmp_path, caplog, likes_dark)
    dark = [row["evaluation"]["held-out/darkness"] for row in rows if "evaluation" in row]
    assert dark[-1] > dark[0] + 0.05
    assert rows[-1]["unscored"] == rows[-1]["skipped"] == 0
    scores = read_scores(write_scores(folder / "votes"))
    assert len({score.group for score in scores}) == 16
    assert {score.score for score in scores} <= {0.0, 0.5, 1.0}


@pytest.mark.slow
def test_votes_at_random_teach_no_darkness(tmp_path, caplog):
    random = np.random.default_rng(0)

    def any_three(images):
        order = [images[i] for i in random.permutation(len(images))]
        return {"likes": order[:3], "dislikes": order[-3:]}

    rows, _ = voted(tmp_path, caplog, any_three)
    dark = [row["evaluation"]["held-out/darkness"] for row in rows if "evaluation" in row]
    assert abs(dark[-1] - dark[0]) < 0.05


def test_a_run_nobody_votes_in_goes_on_and_learns_nothing(tmp_path):
    rewards = [{"name": "human_vote", "port": 0, "timeout": 1}]
    training = CONFIG["training"] | {"iterations": 1, "groups": 1}
    run = Run.create(make_config(CONFIG | {"rewards": rewards, "training": training}), tmp_path, tmp_path)
    list(Session(run).execute())
    row = run.metrics()[-1]
    assert (row["unscored"], row["skipped"], row["masked"], row["updates"]) == (0, 1, 1, 0)
    assert row["rewards"]["human_vote"]["mean"] is None


class Stopper(Voter):
    """Answers the first group and presses Stop at the second."""

    def vote(self, state, images):
        if self.groups:
            self.ask("POST", "stop", {"voter": "me", "run": state["key"]})
        else:
            super().vote(state, images)


def test_stop_on_the_page_ends_the_run_and_resumed_it_asks_only_what_was_not_answered(tmp_path, caplog):
    run = Run.create(make_config(CONFIG | {"held_out_prompts": None}), tmp_path, tmp_path)
    session, stopper = Session(run), Stopper(likes_dark, caplog)
    with pytest.raises(KeyboardInterrupt):
        finish(session, stopper)
    assert session.learner.iteration == 0
    voter = Voter(likes_dark, caplog)
    finish(Session(run.continued(1), resume=True), voter)
    assert [row["iteration"] for row in run.metrics() if "reward" in row] == [1]
    assert run.metrics()[-1]["skipped"] == 0
    assert len(voter.groups) == 1
    assert set(voter.groups[0]) != set(stopper.groups[0])
