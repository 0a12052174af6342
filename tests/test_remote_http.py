"""The client of JSON reward servers."""

import json
from dataclasses import asdict

import pytest
import torch
from densegrpo.engine.knobs import check, options_of
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards.remote import patience
from densegrpo.engine.rewards.remote.http_reward import RemoteHttp
from densegrpo.engine.rewards.remote.parallel import interruptibly
from stub_servers import Answer, Stub, dead_url, grey_rewards

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)


def reward(stub_or_url, **options):
    url = stub_or_url if isinstance(stub_or_url, str) else stub_or_url.url
    options = {"url": url, "timeout": 2.0, "patience": 0.5, **options}
    check("remote_http", options_of(RemoteHttp), options)
    return RemoteHttp(**options)


def batch(num=5, metadata=None, height=8, width=12):
    levels = torch.linspace(0, 1, num) if num > 1 else torch.full((num,), 0.5)
    images = levels.view(-1, 1, 1, 1).expand(num, 3, height, width).clone()
    return RewardBatch(images, [f"prompt {{{i}}} \u00e4" for i in range(num)], metadata or [{}] * num)


def answering(data):
    return lambda request: Answer(data) if request.method == "POST" else Answer({"status": "ok"})


def test_scores_come_in_order_whatever_the_size_of_a_request():
    for batch_size, workers, requests in ((16, 2, 1), (2, 3, 3), (1, 5, 5)):
        with Stub(grey_rewards) as stub:
            result = reward(stub, batch_size=batch_size, workers=workers)(batch())
        torch.testing.assert_close(result.scores, torch.linspace(0, 1, 5), atol=0.5 / 255 + 1e-6, rtol=0)
        assert result.scores.dtype == torch.float32
        assert not result.errors
        assert len(stub.requests) == requests


def test_a_request_has_the_fields_of_flow_factory_and_metadata():
    """Its servers read ``prompt`` and ``image`` and ignore the rest."""
    with Stub(grey_rewards) as stub:
        reward(stub)(batch(2, [{"tag": "counting"}, {"include": [{"class": "cow", "count": 2}]}]))
    (request,) = stub.requests
    assert request.path == "/compute"
    assert request.headers["Content-Type"] == "application/json"
    assert set(request.data) == {"prompt", "image", "metadata"}
    assert request.data["prompt"] == ["prompt {0} \u00e4", "prompt {1} \u00e4"]
    assert request.data["metadata"] == [{"tag": "counting"}, {"include": [{"class": "cow", "count": 2}]}]


def test_null_is_no_score_and_may_have_a_reason():
    data = {"rewards": [0.5, None, None, 1, -2.5], "errors": {"1": "no shapes in it", "7": "x", "0": "y", "2": 5}}
    with Stub(answering(data)) as stub:
        result = reward(stub)(batch())
    assert result.scores.isnan().tolist() == [False, True, True, False, False]
    assert result.scores[[0, 3, 4]].tolist() == [0.5, 1, -2.5]
    assert result.errors == {1: "no shapes in it", 2: "the reward server has no score for this image"}


@pytest.mark.parametrize(
    "junk", ["0.5", True, [0.5], {"score": 0.5}, "__import__('os')", 1e300, "NaN", float("nan"), float("-inf"), 10**400]
)
def test_one_entry_that_is_no_finite_number_costs_one_image(junk):
    with Stub(Answer(raw=json.dumps({"rewards": [0.1, junk, 0.3]}).encode())) as stub:
        result = reward(stub)(batch(3))
    assert result.scores.isnan().tolist() == [False, True, False]
    assert set(result.errors) == {1}
    assert "is not a finite number" in result.errors[1]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"rewards": [1, 2]}, "gave 2 rewards for 3 images"),
        ({"rewards": [1, 2, 3, 4]}, "gave 4 rewards for 3 images"),
        ({"rewards": []}, "gave 0 rewards for 3 images"),
        ({"scores": [1, 2, 3]}, 'no list "rewards"'),
        ({"rewards": {"0": 1}}, 'no list "rewards"'),
        ([1, 2, 3], 'no list "rewards"'),
        (None, 'no list "rewards"'),
        ({"error": "CUDA out of memory"}, "reports an error: CUDA out of memory"),
    ],
)
def test_an_answer_that_does_not_fit_gives_no_scores_at_all(data, reason):
    with Stub(Answer(data)) as stub:
        result = reward(stub)(batch(3))
    assert result.scores.isnan().all()
    assert all(reason in result.errors[i] for i in range(3))
    assert len(stub.requests) == 1


@pytest.mark.parametrize("status", [400, 500])
def test_a_request_that_is_refused_costs_its_own_images_only(status):
    def picky(request):
        return (
            Answer({"detail": "bad image"}, status)
            if request.data["prompt"][0].startswith("prompt {2}")
            else Answer({"rewards": [0.5, 0.5]})
        )

    with Stub(picky) as stub:
        result = reward(stub, batch_size=2, workers=1)(batch(6))
    assert result.scores.isnan().tolist() == [False, False, True, True, False, False]
    assert f"HTTP {status}" in result.errors[2]


def test_a_dead_server_gives_nan_with_a_reason_for_every_image():
    result = reward(dead_url(), batch_size=1, workers=2)(batch(20))
    assert result.scores.isnan().all()
    assert len(result.errors) == 20
    assert all("ConnectionRefusedError" in reason for reason in result.errors.values())


def test_an_image_with_pixels_that_are_no_numbers_is_not_sent():
    images = batch(3, [{"number": i} for i in range(3)])
    images.images[1, 0, 2, 2] = torch.nan
    with Stub(grey_rewards) as stub:
        result = reward(stub)(images)
    assert result.scores.isnan().tolist() == [False, True, False]
    assert result.errors == {1: "the image has pixels that are not numbers"}
    assert stub.requests[0].data["prompt"] == ["prompt {0} \u00e4", "prompt {2} \u00e4"]
    assert stub.requests[0].data["metadata"] == [{"number": 0}, {"number": 2}]


def test_no_images_no_request():
    with Stub(grey_rewards) as stub:
        assert reward(stub)(batch(0)).scores.shape == (0,)
    assert not stub.requests


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 4, 8, 8), (2, 8, 8)])
def test_images_that_are_not_rgb_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be float \[B, 3, H, W\] in 0\.\.1 \(RGB\)"):
        reward(dead_url())(RewardBatch(torch.zeros(shape), ["a", "b"], [{}] * 2))


def test_a_host_that_is_not_allowed_gets_nothing_and_is_named_before_training():
    strange = reward("http://judge.example:8000")
    with pytest.raises(ValueError, match="is not allowed"):
        strange(batch(2))
    (problem,) = strange.validate(["a"], [{}])
    assert "DENSEGRPO_REWARD_HOSTS to judge.example:8000" in problem


def test_a_server_that_is_there_passes_with_one_question():
    with Stub(Answer(raw=b"fine")) as stub:
        assert reward(stub).validate(["a", "b"], [{}, {}]) == []
    assert [(request.method, request.path) for request in stub.requests] == [("GET", "/health")]


def test_a_server_that_is_not_there_is_told_at_once_with_what_to_do():
    (problem,) = reward(dead_url(), patience=600.0).validate([], [])
    assert "/health: no usable answer in one attempt; ConnectionRefusedError" in problem
    assert problem.endswith(
        "Start the reward server (an example: densegrpo serve --reward NAME --port 8090), or correct url"
    )


def test_trying_the_connection_says_what_the_server_answers():
    with Stub(grey_rewards) as stub:
        text = reward(stub).test_connection()
    assert text.startswith(f"OK. {stub.url} answers 0.50 for a plain grey test image, in 0.")
    assert len(stub.posts()) == 1


@pytest.mark.parametrize(
    ("url", "start"),
    [
        ("http://judge.example", "NOT CONNECTED. host 'judge.example' of"),
        ("nonsense", "NOT CONNECTED. 'nonsense' must be"),
        (dead_url(), "NOT CONNECTED. http://127.0.0.1:"),
    ],
    ids=["not allowed", "nonsense", "dead"],
)
def test_trying_a_connection_that_fails_says_why(url, start):
    assert reward(url).test_connection().startswith(start)


def test_trying_a_server_without_a_score_says_why():
    with Stub(answering({"rewards": [None], "errors": {"0": "it needs clauses"}})) as stub:
        text = reward(stub).test_connection()
    assert text.endswith("is reachable, but has no score for a plain grey test image: it needs clauses")


def test_the_key_is_in_no_configuration_message_or_log(monkeypatch, caplog):
    monkeypatch.setenv("DENSEGRPO_API_KEY", KEY)

    def echo(request):
        return Answer({"error": f"unknown key {request.headers['Authorization']}"}, 401)

    with Stub(echo) as stub, caplog.at_level(0):
        asked = reward(stub, api_key_variable="DENSEGRPO_API_KEY")
        result = asked(batch(2))
        texts = [
            repr(asked),
            json.dumps(asdict(asked)),
            *result.errors.values(),
            *asked.validate([], []),
            asked.test_connection(),
            caplog.text,
        ]
    assert stub.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    assert "unknown key Bearer ***" in result.errors[0]
    assert all(KEY not in text for text in texts)


def test_images_made_in_inference_mode_can_be_scored_in_the_background():
    """ComfyUI runs nodes in that mode."""
    with Stub(grey_rewards) as stub, torch.inference_mode():
        made = batch(3)
        assert interruptibly(lambda: reward(stub)(made)).scores.isfinite().all()
        assert reward(stub).test_connection().startswith("OK. ")
