"""The reward: training waits for people, and for nobody longer than it should."""

import json
import math
import threading
import time

import pytest
import torch
from densegrpo.engine import waiting
from densegrpo.engine.advantage import GroupNorm
from densegrpo.engine.data import Prompt, StepRewards
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards.human_vote import HumanVote
from densegrpo.engine.rewards.panel import Panel
from densegrpo.engine.votes import room as rooms
from densegrpo.engine.votes.room import HOSTS, ROOMS, Host
from densegrpo.engine.votes.store import encode, read_votes


def batch(num_groups=2, per_group=3, seed=0):
    images = torch.rand((num_groups * per_group, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    groups = torch.arange(num_groups).repeat_interleave(per_group)
    return RewardBatch(images, [f"prompt {g}" for g in groups.tolist()], [{}] * len(images), groups)


@pytest.fixture
def host():
    """A host that shows the page; it remembers what it was told."""
    told = []
    HOSTS.append(Host("in the test", lambda: told.append("changed"), lambda: told.append("stop")))
    yield told
    HOSTS.clear()


class People(threading.Thread):
    """Votes by itself: ``decide(group)`` gives the ballot on each group on its page."""

    def __init__(self, decide, voter="me"):
        super().__init__(daemon=True)
        self.decide, self.voter, self.asked, self.over = decide, voter, [], False

    def run(self):
        while not self.over:
            group = ROOMS[-1].state(self.voter)["group"] if ROOMS else None
            if group is None:
                time.sleep(0.01)
                continue
            self.asked.append(group)
            ROOMS[-1].board.answer(self.voter, group["id"], self.decide(group))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *problem):
        self.over = True
        self.join(5)


def name(image):
    return encode(image)[0]


def like_first(group):
    return {"likes": group["images"][:1]}


def test_votes_become_scores_of_the_right_images(host, tmp_path):
    images, favourites = batch(), [4, 2]
    names = [name(images.images[i]) for i in favourites]
    reward = HumanVote()
    with reward.session(tmp_path), People(lambda group: {"likes": [n for n in group["images"] if n in names]}):
        result = reward(images)
    assert result.scores.tolist() == [0.5, 0.5, 1, 0.5, 1, 0.5]
    assert result.scores.dtype == torch.float32
    assert (result.errors, result.skipped) == ({}, frozenset())


def test_groups_may_lie_anywhere_in_the_batch(host, tmp_path):
    plain = batch()
    order = torch.tensor([3, 0, 4, 1, 5, 2])
    mixed = RewardBatch(plain.images[order], [plain.prompts[i] for i in order], [{}] * 6, plain.groups[order])
    best = name(plain.images[4]), name(plain.images[2])
    with (
        (reward := HumanVote(mode="rank")).session(tmp_path),
        People(lambda group: {"order": [n for n in group["images"] if n in best]}),
    ):
        scores = reward(mixed).scores
    assert scores.tolist() == [0.25, 0.25, 1, 0.25, 0.25, 1]


def test_a_skipped_group_has_no_score_and_is_no_error(host, tmp_path):
    with (
        (reward := HumanVote()).session(tmp_path),
        People(lambda group: None if group["prompt"] == "prompt 0" else like_first(group)),
    ):
        result = reward(batch())
    assert [math.isnan(score) for score in result.scores.tolist()] == [True] * 3 + [False] * 3
    assert (result.skipped, result.errors) == ({0, 1, 2}, {})


def test_nobody_in_time_is_skipped_too(host, tmp_path):
    start = time.monotonic()
    with (reward := HumanVote(timeout=1)).session(tmp_path):
        result = reward(batch(10))
    assert result.skipped == set(range(30))
    assert result.scores.isnan().all()
    assert result.errors == {}
    assert 0.9 < time.monotonic() - start < 6, "one clock for all groups"
    assert read_votes(tmp_path / "votes") == []


def test_several_people_are_averaged(host, tmp_path):
    likes, dislikes = like_first, lambda group: {"dislikes": group["images"][:2]}
    with (reward := HumanVote(min_voters=2)).session(tmp_path), People(likes, "me"), People(dislikes, "you"):
        images = batch(1)
        result = reward(images)
    names = sorted(name(image) for image in images.images)
    expected = dict(zip(names, [0.5, 0.25, 0.5], strict=True))
    assert result.scores.tolist() == [expected[name(image)] for image in images.images]


def test_equal_images_are_shown_once_and_share_their_score(host, tmp_path):
    images = batch(1, 4)
    images.images[3] = images.images[0]
    best = name(images.images[0])
    with (reward := HumanVote(mode="rank")).session(tmp_path), People(lambda group: {"order": [best]}) as people:
        scores = reward(images).scores
    assert len(people.asked[0]["images"]) == 3
    assert scores.tolist() == [1, 0.25, 0.25, 1]


def test_two_equal_groups_are_asked_about_once(host, tmp_path):
    one = batch(1)
    both = RewardBatch(one.images.repeat(2, 1, 1, 1), list(one.prompts) * 2, [{}] * 6, torch.tensor([0] * 3 + [1] * 3))
    with (reward := HumanVote()).session(tmp_path), People(like_first) as people:
        scores = reward(both).scores
    assert len(people.asked) == 1
    assert scores[:3].tolist() == scores[3:].tolist()


def test_two_groups_of_one_prompt_are_two(host, tmp_path):
    plain = batch()
    same = RewardBatch(plain.images, ["one prompt"] * 6, plain.metadata, plain.groups)
    with (reward := HumanVote()).session(tmp_path), People(like_first) as people:
        reward(same)
    assert [len(group["images"]) for group in people.asked] == [3, 3]


def test_images_are_served_until_the_next_votes_are_in(host, tmp_path):
    """A page may be loading them when somebody else closes the last group; then they would be broken on it."""
    served = []

    def look(group):
        served.append([ROOMS[-1].image(name) is not None for asked in people.asked for name in asked["images"]])
        return like_first(group)

    with (reward := HumanVote()).session(tmp_path), People(look) as people:
        reward(batch())
        reward(batch(seed=1))
        assert all(map(all, served))
        assert not any(ROOMS[-1].image(name) for asked in people.asked[:2] for name in asked["images"])


def test_what_was_voted_or_skipped_before_a_crash_is_not_asked_again(host, tmp_path):
    images = batch()
    decide = lambda group: None if group["prompt"] == "prompt 0" else like_first(group)  # noqa: E731
    with (reward := HumanVote()).session(tmp_path), People(decide):
        before = reward(images)
    with (reward := HumanVote(timeout=1)).session(tmp_path), People(like_first) as people:
        after = reward(images)
        assert people.asked == []
        reward(batch(seed=1))
        assert len(people.asked) == 2
    assert after.skipped == before.skipped
    assert after.scores.nan_to_num(-1).tolist() == before.scores.nan_to_num(-1).tolist()


def test_a_group_that_timed_out_is_asked_again(host, tmp_path):
    with (reward := HumanVote(timeout=1)).session(tmp_path):
        assert reward(batch(1)).skipped
    with (reward := HumanVote(timeout=1)).session(tmp_path), People(like_first):
        assert not reward(batch(1)).skipped


def test_votes_of_the_other_mode_are_not_taken_for_these(host, tmp_path):
    with (reward := HumanVote()).session(tmp_path), People(like_first):
        reward(batch(1))
    with (
        (reward := HumanVote(mode="rank")).session(tmp_path),
        People(lambda group: {"order": group["images"]}) as people,
    ):
        reward(batch(1))
    assert len(people.asked) == 1


def test_the_pages_know_the_place_in_the_run(host, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n{"iteration": 11}\n{"iterat', encoding="utf-8")
    with (reward := HumanVote()).session(tmp_path), People(like_first) as people:
        reward(batch())
    assert [(g["iteration"], g["number"], g["total"]) for g in people.asked] == [(12, 1, 2), (12, 2, 2)]


@pytest.mark.parametrize("metrics", [None, "", "{}\n", "x\n", "[]\n"])
def test_without_metrics_the_iteration_is_not_known(host, tmp_path, metrics):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics, encoding="utf-8")
    assert rooms.Room(tmp_path).next_iteration() is None


def test_without_a_run_it_refuses_and_says_why():
    result = HumanVote()(batch())
    assert result.scores.isnan().all()
    assert result.skipped == frozenset()
    assert {*result.errors.values()} == {"human votes are asked for in training only; score images with another reward"}
    assert sorted(result.errors) == list(range(6))


def test_after_the_session_it_refuses_again(host, tmp_path):
    reward = HumanVote()
    with reward.session(tmp_path):
        assert len(ROOMS) == 1
    assert ROOMS == []
    assert len(reward(batch()).errors) == 6


def test_another_reward_of_the_same_settings_is_not_drawn_into_the_session(host, tmp_path):
    with HumanVote().session(tmp_path):
        assert len(HumanVote()(batch()).errors) == 6, "evaluations have their own"


def test_the_host_is_told_when_pages_should_look(host, tmp_path):
    with (reward := HumanVote()).session(tmp_path), People(like_first):
        host.clear()
        reward(batch(1))
        assert host.count("changed") >= 2
        host.clear()
    assert host == ["changed"], "the pages close"


def test_stop_in_a_host_is_the_hosts_business(host, tmp_path):
    class CancelledError(Exception):
        pass

    def check():
        if "stop" in host:
            raise CancelledError

    waiting.INTERRUPTS.append(check)
    try:
        with (reward := HumanVote()).session(tmp_path):
            threading.Timer(0.2, lambda: ROOMS[-1].stop()).start()
            with pytest.raises(waiting.Interrupted) as stop:
                reward(batch())
            assert isinstance(stop.value.reason, CancelledError)
            ROOMS[-1].check_stop()  # the host raises, not we
            assert ROOMS[-1].state("me")["state"] == "stopping"
            assert ROOMS[-1].state("me")["group"] is None, "nothing is left open"
    finally:
        waiting.INTERRUPTS.remove(check)


def test_stop_without_a_host_is_like_ctrl_c_and_votes_given_before_are_kept(tmp_path, caplog):
    with (reward := HumanVote(port=0)).session(tmp_path):
        assert "open http://127.0.0.1:" in caplog.text
        room, images = ROOMS[-1], batch()

        def people():
            while (group := room.state("me")["group"]) is None:
                time.sleep(0.01)
            room.board.answer("me", group["id"], like_first(group))
            room.stop()

        threading.Thread(target=people, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            reward(images)
        with pytest.raises(KeyboardInterrupt):
            reward(images)
    assert waiting.INTERRUPTS == []
    assert len(read_votes(tmp_path / "votes")) == 1


def test_two_of_these_rewards_share_a_page(tmp_path, caplog):
    like, rank = HumanVote(port=0), HumanVote(mode="rank", port=0)
    with like.session(tmp_path), rank.session(tmp_path):
        assert len(ROOMS) == 1
        assert caplog.text.count("http://") == 1
        with People(lambda group: like_first(group) if group["mode"] == "like" else {"order": group["images"]}):
            assert like(batch(1)).scores.unique().tolist() == [0.5, 1]
            assert sorted(rank(batch(1)).scores.tolist()) == [0, 0.5, 1]
    lines = (tmp_path / "votes" / "votes.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["mode"] for line in lines] == ["like", "rank"]


def test_without_group_numbers_images_of_a_prompt_belong_together(host, tmp_path):
    known = batch()
    unknown = RewardBatch(known.images, known.prompts, known.metadata)
    with (reward := HumanVote()).session(tmp_path), People(like_first) as people:
        reward(unknown)
    assert [group["prompt"] for group in people.asked] == ["prompt 0", "prompt 1"]


def test_a_panel_passes_on_what_was_skipped(host, tmp_path):
    images = batch()
    panel, prompts = Panel([("vote", HumanVote(), 1.0)]), [Prompt(text, {}) for text in images.prompts]
    with panel.session(tmp_path), People(lambda group: None if group["number"] == 2 else like_first(group)):
        scored = panel(images.images, prompts, images.groups)
    assert scored.skipped.tolist() == [False] * 3 + [True] * 3
    assert scored.errors == []
    assert sorted(scored.scores[0, :3].tolist()) == [0.5, 0.5, 1]


def test_a_skipped_group_teaches_nothing_and_a_tie_teaches_nothing():
    scores = torch.tensor([torch.nan, torch.nan, 1, 1, 1, 0.5])[None, :, None]
    group, train = torch.tensor([0, 0, 1, 1, 2, 2]), torch.ones(6, 1, dtype=torch.bool)
    found = GroupNorm()(scores, StepRewards(scores, torch.ones(1)), group, train)
    assert found.mask[:, 0].tolist() == [False, False, True, True, True, True]
    assert found.values[:4, 0].tolist() == [0] * 4
    assert found.values[4:, 0].tolist() == pytest.approx([1, -1], abs=1e-3)
