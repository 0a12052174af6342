"""The example reward server, alone and with our own client."""

import base64
import io
import json
import pickle
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from densegrpo.engine import rewards as rewards_module
from densegrpo.engine import serve as serve_module
from densegrpo.engine.protocols import RewardBatch, RewardResult
from densegrpo.engine.rewards import make_reward
from densegrpo.engine.rewards.panel import Member
from densegrpo.engine.rewards.remote.http_reward import RemoteHttp
from densegrpo.engine.serve import greeting, make_server, serve
from PIL import Image

RED = {"include": [{"class": "circle", "count": 1, "color": "red"}]}


@contextmanager
def serving(*entries, members=None):
    server = make_server(entries or [{"name": "brightness"}], "127.0.0.1", 0)
    if members:
        server.members = members
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def client(url, **options):
    return RemoteHttp(**{"url": url, "timeout": 5.0, "retries": 0, "backoff": 0.01, **options})


def eight_bit_images(num=6, height=24, width=20, seed=0):
    return torch.randint(0, 256, (num, 3, height, width), generator=torch.Generator().manual_seed(seed)) / 255


def png(mode="RGB", size=(4, 4), kind="PNG"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def post(url, data, path="/compute", content_type="application/json"):
    """(status, answer) of a raw request."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    request = urllib.request.Request(url + path, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as problem:
        return problem.code, json.loads(problem.read())


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


def test_flow_factorys_request_is_understood():
    """Its client sends null for what it does not have."""
    nothing = dict.fromkeys(("video", "condition_images", "condition_videos", "metadata"))
    with serving() as url:
        assert post(url, {"prompt": ["a"], "image": [png()], **nothing})[1]["rewards"] == [0.0]


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"{", 400, "is not JSON"),
        (pickle.dumps({"prompt": ["a"]}), 400, "is not JSON"),
        (b"[" * 100_000, 400, "is not JSON"),
        ([], 400, "must be an object"),
        ({}, 400, 'needs a list "prompt"'),
        ({"prompt": "a", "image": "b"}, 400, 'needs a list "prompt"'),
        ({"prompt": ["a"]}, 400, 'needs a list "image"'),
        ({"prompt": ["a", "b"], "image": [png()]}, 400, "they have 2, 1 and 2"),
        ({"prompt": ["a"], "image": [png()], "metadata": []}, 400, "they have 1, 1 and 0"),
        ({"prompt": ["a"], "image": [png()], "metadata": {}}, 400, 'needs a list "metadata"'),
        ({"prompt": ["a"], "image": [png()], "metadata": [5]}, 400, '"metadata" must hold objects'),
        ({"prompt": [5], "image": [png()]}, 400, '"prompt" must hold texts'),
        ({"prompt": ["a"], "image": [5]}, 400, "image 0 is not the base64 text of a PNG"),
        ({"prompt": ["a"], "image": ["!!"]}, 400, "image 0 is not the base64 text of a PNG"),
        ({"prompt": ["a"], "image": [png()[:60]]}, 400, "image 0 is not the base64 text of a PNG"),
        ({"prompt": ["a"], "image": [png(kind="JPEG")]}, 400, "image 0 is not the base64 text of a PNG"),
        ({"prompt": ["a"], "image": [png("RGBA")]}, 400, "image 0 must be a PNG file in RGB with 8 bits, this is RGBA"),
        ({"prompt": ["a"], "image": [png("L")]}, 400, "this is L"),
        ({"prompt": ["a"] * 2, "image": [png(), png(size=(5000, 5000))]}, 413, "image 1 has more than 16777216 pixels"),
        ({"prompt": ["a"] * 1025, "image": ["x"] * 1025}, 400, "1024 at most"),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_with_the_reason_and_the_server_lives_on(data, status, reason):
    with serving() as url:
        found, answer = post(url, data)
        assert (found, set(answer)) == (status, {"error"})
        assert reason in answer["error"]
        assert post(url, {"prompt": ["a"], "image": [png()]})[0] == 200


def test_other_paths_and_types_are_refused():
    with serving() as url:
        good = {"prompt": ["a"], "image": [png()]}
        assert post(url, good, "/other")[0] == 404
        assert post(url, good, content_type="text/plain")[0] == 415
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/secret", timeout=5)


def test_a_request_that_is_too_large_is_refused_before_it_is_held(monkeypatch):
    monkeypatch.setattr(serve_module, "MAX_REQUEST", 1000)
    with serving() as url:
        status, answer = post(url, b"x" * 3000)
        assert (status, answer["error"]) == (413, "the request has more than 0 MiB; lower batch_size")
        found = client(url)(RewardBatch(eight_bit_images(1), ["a"], [{}]))
    assert "HTTP 413" in found.errors[0]


@pytest.mark.parametrize("length", ["", "x", "-5", "1" * 20])
def test_a_request_without_a_length_is_refused(length):
    with serving() as url:
        request = urllib.request.Request(f"{url}/compute", b"{}", {"Content-Type": "application/json"})
        request.add_unredirected_header("Content-length", length)
        with pytest.raises(urllib.error.HTTPError, match="411"):
            urllib.request.urlopen(request, timeout=5)


def test_only_what_is_computed_here_is_served(monkeypatch):
    monkeypatch.setitem(rewards_module.REWARDS, "remote_http", ".remote.http_reward:RemoteHttp")
    with pytest.raises(
        ValueError, match="remote_http cannot be served: serve a reward that is computed on this machine"
    ):
        make_server([{"name": "remote_http"}], "127.0.0.1", 0)


def named(entry):
    """As ``member``, with one more reward."""
    return Member("needy", Needy()) if entry["name"] == "needy" else rewards_module.member(entry)


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
    monkeypatch.setattr(serve_module, "member", named)
    with pytest.raises(ValueError, match=message):
        make_server([entry], "127.0.0.1", 0)


def test_a_port_that_is_taken_is_told():
    with serving() as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(ValueError, match=rf"cannot listen on 127\.0\.0\.1 port {port} .*choose another --port"):
            make_server([{"name": "brightness"}], "127.0.0.1", port)


def test_the_greeting_says_what_is_served_where():
    entries = [{"name": "brightness", "target": 0.0}, {"name": "jpeg", "weight": 0.5}]
    with make_server(entries, "127.0.0.1", 0) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        assert greeting(server) == f"serving darkness + 0.5 * jpeg at {address} (stop with Ctrl-C)"


def test_opening_the_server_to_others_is_warned_of():
    with make_server([{"name": "brightness"}], "0.0.0.0", 0) as server:
        assert "WARNING: other computers can reach this server. It has no password" in greeting(server)


def test_serving_ends_with_ctrl_c_and_frees_the_port():
    ports = []

    def interrupt(text):
        ports.append(int(text.split("127.0.0.1:")[1].split(" ")[0]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve([{"name": "brightness"}], "127.0.0.1", 0, interrupt)
    make_server([{"name": "brightness"}], "127.0.0.1", ports[0]).server_close()


def test_what_is_decoded_is_what_was_sent():
    images = eight_bit_images(1, 5, 7)
    pixels = (images[0] * 255).round().byte().movedim(0, -1).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    found = serve_module.read_png(base64.b64encode(file.getvalue()).decode(), 0)
    assert torch.equal(found, images[0])
    assert np.array_equal((found * 255).round().byte().movedim(0, -1).numpy(), pixels)
