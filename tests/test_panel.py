"""How a panel asks rewards that take their time: servers in the background, people at the end."""

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from densegrpo.engine import waiting
from densegrpo.engine.data import Prompt
from densegrpo.engine.protocols import RewardResult
from densegrpo.engine.rewards import Member, Panel, make_panel, make_reward, members

PROMPTS = [Prompt("a", {"n": 1}), Prompt("b", {"n": 2}), Prompt("c", {"n": 3})]


def images(num=3, value=0.5):
    return torch.full((num, 3, 8, 8), value) + torch.arange(num).view(-1, 1, 1, 1) / 100


@dataclass
class Server:
    """Answers the mean of each image, when it is allowed to."""

    remote: ClassVar[bool] = True
    go: threading.Event = field(default_factory=threading.Event)
    seen: list = field(default_factory=list)

    def __call__(self, batch):
        self.seen.append((threading.current_thread() is threading.main_thread(), list(batch.prompts)))
        assert self.go.wait(20)
        return RewardResult(batch.images.flatten(1).mean(1))

    def validate(self, prompts, metadata):
        return []


@dataclass
class Person:
    """Answers for whole groups."""

    interactive: ClassVar[bool] = True
    answer: object = None
    seen: list = field(default_factory=list)

    def __call__(self, batch):
        main = threading.current_thread() is threading.main_thread()
        self.seen.append((main, list(batch.prompts), None if batch.groups is None else batch.groups.tolist()))
        return self.answer(batch) if self.answer else RewardResult(torch.arange(len(batch.prompts)).float())

    def validate(self, prompts, metadata):
        return []


def open_server():
    server = Server()
    server.go.set()
    return server


def test_a_remote_reward_works_while_the_next_images_are_made():
    server = Server()
    panel = Panel([("far", server, 1.0)])
    with panel.scoring() as scoring:
        start = time.monotonic()
        scoring.add(images(), PROMPTS)
        scoring.add(images(2, 0.1), PROMPTS[:2])
        assert time.monotonic() - start < 5, "adding waited for the server"
        assert waiting.wait_until(lambda: len(server.seen) == 1, 5)
        server.go.set()
        found = scoring.collect()
    expected = torch.cat([images(), images(2, 0.1)]).flatten(1).mean(1)
    torch.testing.assert_close(found.scores[0], expected)
    assert [main for main, _ in server.seen] == [False, False]
    assert [prompts for _, prompts in server.seen] == [["a", "b", "c"], ["a", "b"]]


def test_local_rewards_are_asked_at_once_and_in_the_main_thread():
    where = []

    def note(self, batch):
        where.append(threading.current_thread() is threading.main_thread())
        return RewardResult(torch.zeros(len(batch.prompts)))

    panel = Panel([("near", type("Near", (), {"__call__": note})(), 1.0), ("far", open_server(), 1.0)])
    with panel.scoring() as scoring:
        scoring.add(images(), PROMPTS)
        assert where == [True]
        assert scoring.collect().scores.shape == (2, 3)


def test_a_failing_server_gives_nan_with_a_reason_for_its_part_only():
    def answer(batch):
        if batch.prompts[0] == "b":
            raise ConnectionError("gone")
        return RewardResult(torch.ones(len(batch.prompts)), {"half": torch.full((len(batch.prompts),), 0.5)})

    flaky = type("Flaky", (), {"remote": True, "__call__": staticmethod(answer)})()
    with Panel([("far", flaky, 1.0)]).scoring() as scoring:
        for prompt in PROMPTS:
            scoring.add(images(1), [prompt])
        found = scoring.collect()
    assert found.scores[0].isnan().tolist() == [False, True, False]
    assert list(found.errors) == ["far: ConnectionError: gone"]
    assert found.by_reward["far/half"].isnan().tolist() == [False, True, False]


def test_a_remote_reward_leaves_the_random_state_of_the_others_alone():
    """Restoring it from a background thread would repeat numbers drawn meanwhile."""
    server = Server()
    torch.manual_seed(3)
    with Panel([("far", server, 1.0)]).scoring() as scoring:
        scoring.add(images(), PROMPTS)
        waiting.wait_until(lambda: bool(server.seen), 5)
        first = torch.rand(4)
        server.go.set()
        scoring.collect()
    assert not torch.equal(torch.rand(4), first)


def test_whoever_stops_waiting_leaves_nothing_behind_for_the_server():
    server = Server()
    with Panel([("far", server, 1.0)]).scoring() as scoring:
        for prompt in PROMPTS:
            scoring.add(images(1), [prompt])
        assert waiting.wait_until(lambda: len(server.seen) == 1, 5)
    server.go.set()
    time.sleep(0.3)
    assert len(server.seen) == 1


class CancelledError(Exception):
    """As ComfyUI's InterruptProcessingException, which is an Exception."""


@pytest.mark.parametrize("reward", [Server(), Person(lambda _: waiting.wait_until(lambda: False, 20))])
def test_the_hosts_own_exception_ends_the_waiting(monkeypatch, reward):
    def check():
        raise CancelledError

    monkeypatch.setattr(waiting, "INTERRUPTS", [check])
    with pytest.raises(CancelledError):
        Panel([("slow", reward, 1.0)])(images(), PROMPTS)


def test_a_person_sees_all_images_of_an_iteration_at_once_with_their_groups():
    person = Person()
    with Panel([("you", person, 1.0)]).scoring() as scoring:
        scoring.add(images(2), PROMPTS[:2], torch.tensor([0, 1]))
        scoring.add(images(1), PROMPTS[2:], torch.tensor([0]))
        assert not person.seen
        found = scoring.collect()
    assert person.seen == [(True, ["a", "b", "c"], [0, 1, 0])]
    assert found.scores.tolist() == [[0, 1, 2]]


def test_a_skipped_image_has_no_score_and_is_no_error():
    def answer(batch):
        return RewardResult(torch.tensor([1.0, torch.nan, torch.nan]), skipped=frozenset({1}))

    found = Panel([("you", Person(answer), 1.0)])(images(), PROMPTS)
    assert found.skipped.tolist() == [False, True, False]
    assert list(found.errors) == ["you: the score is not a finite number"]


def test_an_image_with_a_score_was_not_skipped():
    def answer(batch):
        return RewardResult(torch.tensor([1.0, 2.0, 3.0]), skipped=frozenset({1}))

    assert not Panel([("you", Person(answer), 1.0)])(images(), PROMPTS).skipped.any()


def test_running_out_of_memory_is_not_the_rewards_failure():
    def answer(batch):
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError):
        Panel([("big", Person(answer), 1.0)])(images(), PROMPTS)


@pytest.mark.parametrize("mode", ["each", "gdpo", "sum"])
def test_a_cap_limits_what_is_trained_on_but_not_the_record(mode):
    member = Member("bright", make_reward("brightness"), weight=2.0, cap=0.5)
    bright = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    found = Panel([member], mode)(bright, PROMPTS)
    factor = 2.0 if mode == "sum" else 1.0
    assert found.scores[0].tolist() == pytest.approx([0.2 * factor, 0.5 * factor, 0.5 * factor])
    assert found.by_reward["bright"].tolist() == pytest.approx([0.2, 0.5, 0.9])


def test_a_panel_hands_its_rules_to_every_grid():
    members = [
        Member("a", make_reward("brightness"), min_std=0.1),
        Member("b", make_reward("colourfulness"), rank=True),
    ]
    rules = Panel(members, "gdpo").rules(num_grids=2)
    assert tuple(rules.min_std) == (0.1, 0.0, 0.1, 0.0)
    assert tuple(rules.rank) == (False, True, False, True)
    assert rules.over_batch
    assert not Panel(members, "each").rules(1).over_batch


def test_a_configured_panel_has_what_the_entries_say():
    panel = make_panel(
        [{"name": "shapes", "score": "strict", "weight": 2.0, "cap": 0.9, "min_std": 0.01, "rank": True}], "each"
    )
    label, _, *rest = panel.members[0]
    assert label == "shapes strict"
    assert rest == [2.0, 0.9, 0.01, True]


def test_a_session_is_open_while_a_run_is_trained(tmp_path):
    events = []

    class Lasting(Person):
        @contextmanager
        def session(self, folder):
            events.append(("open", folder))
            yield
            events.append("closed")

    with Panel([("you", Lasting(), 1.0), ("bright", make_reward("brightness"), 1.0)]).session(tmp_path):
        assert events == [("open", tmp_path)]
    assert events[-1] == "closed"


@pytest.mark.parametrize(
    ("entry", "label"),
    [
        ({"name": "brightness"}, "brightness"),
        ({"name": "brightness", "target": 0.0}, "darkness"),
        ({"name": "brightness", "target": 0.3}, "brightness 0.3"),
        ({"name": "shapes", "score": "strict", "weight": 2.0, "rank": True}, "shapes strict"),
        ({"name": "clipscore", "placement": "cpu", "batch_size": 3}, "clipscore"),
        ({"name": "pickscore", "model": "mine"}, "pickscore mine"),
        ({"name": "human_vote", "timeout": 5, "port": 0}, "human_vote"),
        ({"name": "remote_http", "url": "http://127.0.0.1:1", "timeout": 5.0}, "remote_http http://127.0.0.1:1"),
    ],
)
def test_a_label_says_what_a_reward_is_and_not_how_it_is_computed(entry, label):
    assert [member.label for member in members([entry])] == [label]


def test_equal_rewards_have_labels_of_their_own():
    labels = [member.label for member in members([{"name": "brightness"}] * 3, "held-out/")]
    assert labels == ["held-out/brightness", "held-out/brightness (2)", "held-out/brightness (3)"]


class Odd(Person):
    """Not a person, but it takes the same answers."""

    interactive = False


KINDS = {
    "float64": torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64),
    "float16": torch.tensor([0.25, 0.5, 1.0], dtype=torch.float16),
    "with gradient": torch.tensor([0.25, 0.5, 1.0], requires_grad=True),
}


@pytest.mark.parametrize("scores", KINDS.values(), ids=KINDS)
def test_numbers_of_any_kind_become_float32_on_the_cpu(scores):
    found = Panel([("odd", Odd(lambda _: RewardResult(scores, {"part": scores})), 1.0)])(images(), PROMPTS)
    for values in (found.scores[0], found.by_reward["odd"], found.by_reward["odd/part"]):
        assert (values.dtype, values.requires_grad) == (torch.float32, False)
        assert values.tolist() == [0.25, 0.5, 1.0]


def test_whole_numbers_and_truth_values_are_scores_too():
    for scores in (torch.tensor([0, 1, 2]), torch.tensor([False, True, True])):
        found = Panel([("odd", Odd(lambda _, scores=scores: RewardResult(scores)), 1.0)])(images(), PROMPTS)
        assert found.scores.tolist() == [scores.tolist()]
        assert found.scores.dtype == torch.float32


def test_infinite_scores_are_none_and_say_so():
    scores = torch.tensor([1.0, torch.inf, -torch.inf])
    found = Panel([("odd", Odd(lambda _: RewardResult(scores)), 1.0)])(images(), PROMPTS)
    assert found.scores[0].isnan().tolist() == [False, True, True]
    assert found.reasons == {"odd": ["the score is not a finite number"] * 2}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (RewardResult(torch.zeros(2)), r"reward odd returned shape \(2,\) for 3 images"),
        (RewardResult(torch.zeros(3, 1)), r"reward odd returned shape \(3, 1\) for 3 images"),
        (
            RewardResult(torch.zeros(3), {"part": torch.zeros(4)}),
            r"reward odd, part returned shape \(4,\) for 3 images",
        ),
        (RewardResult([1.0, 2.0, 3.0]), "reward odd returned list; it must return a tensor"),
        (torch.zeros(3), "reward odd returned Tensor; it must return a RewardResult"),
        (None, "reward odd returned NoneType; it must return a RewardResult"),
    ],
    ids=["too few", "a column", "a wrong detail", "a list", "bare scores", "nothing"],
)
def test_what_is_not_one_number_for_each_image_is_a_bug_of_the_reward_and_named(answer, message):
    with pytest.raises(RuntimeError, match=message):
        Panel([("odd", Odd(lambda _: answer), 1.0)])(images(), PROMPTS)


def test_reasons_and_skips_of_parts_keep_their_images():
    def answer(batch):
        return RewardResult(torch.tensor([1.0, torch.nan, torch.nan]), errors={1: "blurred"}, skipped=frozenset({2}))

    class Near(Person):
        interactive = False

    with Panel([("near", Near(answer), 1.0)]).scoring() as scoring:
        scoring.add(images(), PROMPTS)
        scoring.add(images(), PROMPTS)
        found = scoring.collect()
    assert found.skipped.tolist() == [False, False, True, False, False, True]
    assert list(found.errors) == ["near: blurred"] * 2


def test_a_label_is_one_line_even_of_a_question_with_several():
    entry = {"name": "vlm_judge", "preset": "own", "question": "Is this\n{prompt}?\n\nYes or no?"}
    assert [member.label for member in members([entry])] == ["vlm_judge own Is this {prompt}? Yes or no?"]
