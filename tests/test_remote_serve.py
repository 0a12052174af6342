"""The example reward server, alone and with our own client."""

import json
import time
import urllib.error
import urllib.request

import pytest
import torch
from densegrpo.engine import rewards as rewards_module
from densegrpo.engine import serve as serve_module
from densegrpo.engine.protocols import RewardBatch, RewardResult
from densegrpo.engine.rewards import make_reward
from densegrpo.engine.rewards.panel import Member
from densegrpo.engine.serve import greeting, make_server, serve
from reward_serving import client, eight_bit_images, png, post, serving

RED = {"include": [{"class": "circle", "count": 1, "color": "red"}]}


class Slow:
    """Counts how many compute at a time; refuses dark images."""

    def __init__(self):
        self.running = self.most = 0

    def __call__(self, batch):
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.05)
        self.running -= 1
        scores = batch.images.mean((1, 2, 3))
        dark = (scores < 0.1).nonzero().flatten().tolist()
        scores[dark] = torch.nan
        return RewardResult(scores, {}, dict.fromkeys(dark, "too dark"))

    def validate(self, prompts, metadata):
        return []


@pytest.mark.parametrize(
    ("entry", "metadata"),
    [
        ({"name": "brightness", "target": 0.3}, {}),
        ({"name": "colourfulness"}, {}),
        ({"name": "jpeg", "direction": "incompressible"}, {}),
        ({"name": "shapes", "score": "dense"}, RED),
        ({"name": "shapes", "score": "partial"}, RED),
    ],
)
def test_a_served_reward_gives_exactly_the_scores_of_the_local_one(entry, metadata):
    images = eight_bit_images()
    images[0, 0] = 1.0
    batch = RewardBatch(images, [f"prompt {i}" for i in range(6)], [metadata] * 6)
    local = make_reward(**entry)(batch).scores
    with serving(entry) as url:
        distant = client(url, batch_size=4)(batch)
    assert torch.equal(distant.scores, local.float())
    assert not distant.errors


def test_several_rewards_are_served_as_their_weighted_sum():
    images = eight_bit_images(3)
    batch = RewardBatch(images, ["a"] * 3, [{}] * 3)
    with serving({"name": "brightness", "weight": 2.0}, {"name": "jpeg", "weight": "-0.5"}) as url:
        found = client(url)(batch).scores
    expected = 2 * make_reward("brightness")(batch).scores - 0.5 * make_reward("jpeg")(batch).scores
    assert torch.equal(found, expected)


def test_images_of_different_sizes_may_come_in_one_request():
    sizes = [(4, 4), (8, 4), (4, 4)]
    with serving() as url:
        status, answer = post(url, {"prompt": ["a"] * 3, "image": [png(size=size) for size in sizes]})
    assert (status, answer) == (200, {"rewards": [0.0, 0.0, 0.0], "errors": {}})


def test_prompts_metadata_and_reasons_stay_with_their_images_when_sizes_differ():
    """Images of one size are scored together."""

    class Told(Slow):
        def __call__(self, batch):
            pairs = zip(batch.prompts, batch.metadata, strict=True)
            scores = torch.tensor([float(prompt) + data.get("more", 0) for prompt, data in pairs])
            refused = [i for i, data in enumerate(batch.metadata) if "no" in data]
            scores[refused] = torch.nan
            return RewardResult(scores, {}, dict.fromkeys(refused, "no"))

    order = {
        "prompt": ["1", "2", "3", "4"],
        "image": [png(size=size) for size in ((4, 4), (8, 4), (4, 4), (8, 4))],
        "metadata": [{}, {"more": 10}, {"more": 20}, {"no": 1}],
    }
    with serving(members=[Member("told", Told(), 1.0)]) as url:
        answer = post(url, order)[1]
    assert answer == {"rewards": [1.0, 12.0, 23.0, None], "errors": {"3": "told: no"}}


def test_a_reward_without_a_score_is_null_with_the_reason():
    images = torch.tensor([0.5, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    with serving(members=[Member("picky", Slow(), 1.0)]) as url:
        found = client(url)(RewardBatch(images, ["a"] * 3, [{}] * 3))
    assert found.scores.isnan().tolist() == [False, True, False]
    assert found.errors == {1: "picky: too dark"}


def test_a_prompt_that_the_reward_cannot_use_is_told_and_costs_one_image():
    images = eight_bit_images(3)
    batch = RewardBatch(images, ["a", "b", "c"], [RED, {}, RED])
    with serving({"name": "shapes", "score": "partial"}) as url:
        found = client(url)(batch)
    expected = make_reward("shapes", score="partial")(RewardBatch(images, ["a"] * 3, [RED] * 3)).scores
    assert torch.equal(found.scores[[0, 2]], expected[[0, 2]])
    assert found.scores.isnan().tolist() == [False, True, False]
    assert "it has no 'include' clauses" in found.errors[1]


class Fussy(Slow):
    """Breaks over a batch with a prompt "b", as it says; counts how often it is asked."""

    calls = 0

    def __call__(self, batch):
        self.calls += 1
        if "b" in batch.prompts:
            raise ValueError("not b")
        return super().__call__(batch)

    def validate(self, prompts, metadata):
        return ["b will not do"] * prompts.count("b")


def test_when_the_rest_is_asked_again_its_reasons_stay_with_their_images():
    images = torch.tensor([0.5, 0.5, 0.0, 1.0]).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    with serving(members=[Member("fussy", Fussy(), 1.0)]) as url:
        found = client(url)(RewardBatch(images, ["b", "a", "a", "a"], [{}] * 4))
    assert found.scores.isnan().tolist() == [True, False, True, False]
    assert found.errors == {0: "fussy: b will not do", 2: "fussy: too dark"}


def test_a_reward_is_not_asked_again_when_that_cannot_help():
    class Partly(Fussy):
        def __call__(self, batch):
            self.calls += 1
            return RewardResult(torch.tensor([torch.nan, 0.5]), {}, {0: "not b"})

    class Hopeless(Fussy):
        def __call__(self, batch):
            self.calls += 1
            raise OSError("the model is gone")

        def validate(self, prompts, metadata):
            return []

    for reward, errors in (
        (Partly(), {0: "x: not b"}),
        (Hopeless(), dict.fromkeys((0, 1), "x: OSError: the model is gone")),
    ):
        with serving(members=[Member("x", reward, 1.0)]) as url:
            assert client(url)(RewardBatch(eight_bit_images(2), ["b", "a"], [{}] * 2)).errors == errors
        assert reward.calls == 1


def test_a_reward_with_a_bug_is_an_error_of_the_server_which_lives_on(caplog):
    class Buggy(Slow):
        def __call__(self, batch):
            return RewardResult(torch.ones(7))

    with serving(members=[Member("buggy", Buggy(), 1.0)]) as url:
        for _ in range(2):
            status, answer = post(url, {"prompt": ["a"], "image": [png()]})
            assert (status, answer) == (
                500,
                {"error": "RuntimeError: reward buggy returned shape (7,) for 1 images"},
            )
    assert [(record.message, record.exc_info[0]) for record in caplog.records] == [
        ("a request failed", RuntimeError)
    ] * 2


def test_when_no_prompt_can_be_used_every_image_gets_the_reason():
    with serving({"name": "shapes"}) as url:
        found = client(url)(RewardBatch(eight_bit_images(2), ["a", "b"], [{}] * 2))
    assert found.scores.isnan().all()
    assert "prompt 'b': it has no 'include' clauses" in found.errors[1]


def test_a_reward_that_breaks_gives_its_reason_and_the_server_lives_on():
    class Broken(Slow):
        def __call__(self, batch):
            raise OSError("the model is gone")

    with serving(members=[Member("broken", Broken(), 1.0)]) as url:
        for _ in range(2):
            found = client(url)(RewardBatch(eight_bit_images(2), ["a"] * 2, [{}] * 2))
            assert found.scores.isnan().all()
            assert found.errors[0] == "broken: OSError: the model is gone"


def test_a_sum_that_overflows_is_no_score():
    class Vast(Slow):
        def __call__(self, batch):
            return RewardResult(torch.full((len(batch.prompts),), 3e38))

    with serving(members=[Member("vast", Vast(), 1000.0)]) as url:
        found = client(url)(RewardBatch(eight_bit_images(1), ["a"], [{}]))
    assert found.errors == {0: "the weighted sum is not a finite number"}


def test_the_model_computes_for_one_request_at_a_time():
    slow = Slow()
    with serving(members=[Member("slow", slow, 1.0)]) as url:
        client(url, batch_size=1, workers=6)(RewardBatch(eight_bit_images(6), ["a"] * 6, [{}] * 6))
    assert slow.most == 1


def test_health_names_the_rewards_and_the_client_is_content():
    with serving({"name": "brightness", "target": 0.0}) as url:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            assert json.loads(response.read()) == {"status": "ok", "rewards": ["darkness"]}
        assert client(url).validate(["a"], [{}]) == []
        assert client(url).test_connection().startswith(f"OK. {url} answers 0.50 for")


@pytest.mark.parametrize("entry", [{"name": "remote_http"}, {"name": "vlm_judge"}, {"name": "human_vote"}])
def test_only_what_is_computed_here_is_served(entry):
    with pytest.raises(
        ValueError, match=rf"{entry['name']} cannot be served: serve a reward that is computed on this machine"
    ):
        make_server([entry], "127.0.0.1", 0)


def named(entries):
    """As ``members``, with one more reward."""
    known = [entry for entry in entries if entry["name"] != "needy"]
    return [*rewards_module.members(known), *(Member("needy", Needy()) for _ in entries[len(known) :])]


class Needy(Slow):
    def validate(self, prompts, metadata):
        return ["its files are missing"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "brighness"}, "unknown reward 'brighness'"),
        ({"name": "brightness", "cap": 0.5, "rank": True}, "cap, rank belongs to the run that trains"),
        ({"name": "brightness", "weight": "much"}, "reward brightness: weight must be a number, got 'much'"),
        ({"name": "brightness", "weight": float("nan")}, r"weight in the sum.* must be a number in -1000"),
        ({"name": "needy"}, "reward needy: its files are missing"),
    ],
)
def test_a_reward_that_cannot_be_served_is_told_at_the_start(entry, message, monkeypatch):
    monkeypatch.setattr(serve_module, "members", named)
    with pytest.raises(ValueError, match=message):
        make_server([entry], "127.0.0.1", 0)


def test_a_port_that_is_taken_is_told():
    with serving() as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(ValueError, match=rf"cannot listen on 127\.0\.0\.1 port {port} .*choose another --port"):
            make_server([{"name": "brightness"}], "127.0.0.1", port)


def test_a_port_that_does_not_exist_is_told():
    with pytest.raises(ValueError, match=r"cannot listen on 127\.0\.0\.1 port 70000"):
        make_server([{"name": "brightness"}], "127.0.0.1", 70000)


def test_the_greeting_says_what_is_served_where():
    entries = [{"name": "brightness", "target": 0.0}, {"name": "jpeg", "weight": 0.5}]
    with make_server(entries, "127.0.0.1", 0) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        assert greeting(server) == f"serving darkness + 0.5 * jpeg compressible at {address} (stop with Ctrl-C)"


def test_opening_the_server_to_others_is_warned_of():
    with make_server([{"name": "brightness"}], "0.0.0.0", 0) as server:
        assert "WARNING: other computers can reach this server. It has no password" in greeting(server)


def test_serving_ends_with_ctrl_c_and_frees_the_port(monkeypatch):
    made = []
    monkeypatch.setattr(serve_module, "make_server", lambda *given: made.append(make_server(*given)) or made[0])

    def interrupt(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve([{"name": "brightness"}], "127.0.0.1", 0, interrupt)
    assert made[0].socket.fileno() == -1
