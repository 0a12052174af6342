"""A vision-language model as the judge."""

import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock

import numpy as np
import pytest
import torch
from densegrpo.engine import waiting
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards.remote import judge as judge_module
from densegrpo.engine.rewards.remote import patience
from densegrpo.engine.rewards.remote.judge import Answers, VlmJudge
from judging import batch, judge
from PIL import Image
from stub_servers import Answer, Stub, asked_image, asked_text, chat, dead_url, grey_yes, judge_of

SCORED = {"preset": "own", "mode": "score", "question": "Rate {prompt}", "labels": "Score"}


@pytest.fixture(autouse=True)
def nothing_kept_and_short_pauses(monkeypatch):
    monkeypatch.setattr(judge_module, "KEPT", Answers())
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)


# what is asked


def test_scores_keep_their_order_under_threads_and_batches_do_not_mix():
    with Stub(judge_of(grey_yes)) as stub:
        reward, reverse = judge(stub, workers=8), [4, 3, 2, 1, 0]
        parts = batch(), RewardBatch(batch().images[reverse], ["other"] * 5, [{}] * 5)
        with ThreadPoolExecutor(2) as threads:
            first, second = threads.map(reward, parts)
    torch.testing.assert_close(first.scores, torch.linspace(0, 1, 5), atol=0.003, rtol=0)
    torch.testing.assert_close(second.scores, torch.linspace(1, 0, 5), atol=0.003, rtol=0)
    assert first.scores.dtype == torch.float32
    assert not first.errors


def test_a_question_holds_the_image_without_loss_and_the_prompt_as_it_is():
    pixels = torch.arange(3 * 16 * 16).view(1, 3, 16, 16) % 256
    with Stub(judge_of(grey_yes)) as stub:
        judge(stub)(RewardBatch(pixels / 255, ["a {prompt} {0} %s"], [{}]))
    (request,) = stub.requests
    assert request.path == "/v1/chat/completions"
    image = Image.open(io.BytesIO(base64.b64decode(asked_image(request))))
    assert np.array_equal(np.asarray(image), pixels[0].movedim(0, -1).numpy())
    assert asked_text(request) == 'Does this figure show "a {prompt} {0} %s"? Please answer Yes or No.'
    settings = {key: value for key, value in request.data.items() if key != "messages"}
    assert settings == {
        "model": "judge-1",
        "temperature": 0,
        "seed": 0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
    }


def test_thinking_can_be_switched_off():
    with Stub(judge_of(chat("Score: 3"))) as stub:
        judge(stub, **SCORED, thinking="off", max_tokens=99)(batch(1))
    assert stub.requests[0].data["chat_template_kwargs"] == {"enable_thinking": False}
    assert stub.requests[0].data["max_tokens"] == 99
    assert "logprobs" not in stub.requests[0].data


@pytest.mark.parametrize(
    ("preset", "max_tokens", "reads_probabilities"),
    [
        ("vqascore", 1, True),
        ("geneval_atoms", 1, True),
        ("quality_levels", 16, True),
        ("unifiedreward", 512, False),
        ("unifiedreward2", 512, False),
    ],
)
def test_answers_may_be_as_long_as_the_way_of_judging_needs(preset, max_tokens, reads_probabilities):
    with Stub(judge_of(chat("Yes"))) as stub:
        judge(stub, preset=preset)(batch(1, [{"include": [{"class": "cow", "count": 1}]}]))
    assert stub.requests[0].data["max_tokens"] == max_tokens
    assert ("logprobs" in stub.requests[0].data) == reads_probabilities


@pytest.mark.parametrize(("workers", "at_most"), [(1, 1), (3, 3)])
def test_as_many_questions_are_asked_at_a_time_as_there_are_workers(workers, at_most):
    running, seen, lock = [0], [], Lock()

    def respond(request):
        with lock:
            running[0] += 1
            seen.append(running[0])
        time.sleep(0.1)
        with lock:
            running[0] -= 1
        return chat("Yes")

    with Stub(judge_of(respond)) as stub:
        judge(stub, workers=workers)(batch(6))
    assert max(seen) == at_most


def test_unifiedreward_is_one_mark():
    text = "cat (animal): 1\nred (colour): 0\nFinal Score: 3.42"
    with Stub(judge_of(chat(text))) as stub:
        result = judge(stub, preset="unifiedreward")(batch(1, prompts=["a red cat"]))
    assert result.scores.tolist() == [pytest.approx(0.605)]
    assert asked_text(stub.requests[0]).endswith(
        "score from 1 to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [a red cat]"
    )


def test_unifiedreward2_is_the_mean_of_three_marks():
    text = "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.37\nStyle Score (1-5): 2.8025"
    with Stub(judge_of(chat(text))) as stub:
        result = judge(stub, preset="unifiedreward2")(batch(2))
    assert {name: values[1].item() for name, values in result.details.items()} == {
        "alignment": pytest.approx(0.423675),
        "coherence": pytest.approx(0.3425),
        "style": pytest.approx(0.450625),
    }
    torch.testing.assert_close(result.scores, torch.full((2,), 0.405600))


def test_a_mark_that_is_missing_among_several_means_no_score():
    with Stub(judge_of(chat("Alignment Score (1-5): 2\nStyle Score (1-5): 3"))) as stub:
        result = judge(stub, preset="unifiedreward2")(batch(2))
    assert result.scores.isnan().all()
    assert set(result.details) == {"alignment", "coherence", "style"}
    assert all(values.isnan().all() for values in result.details.values())
    assert "no number after 'Coherence Score'" in result.errors[0]


def test_quality_levels_ask_nothing_about_the_prompt():
    with Stub(judge_of(chat("Good", [{"Good": 0.5, "Fair": 0.5}]))) as stub:
        result = judge(stub, preset="quality_levels")(batch(1))
    assert result.scores.tolist() == [0.625]
    assert "prompt" not in asked_text(stub.requests[0])


def test_one_unusable_answer_costs_one_image():
    def moody(request):
        return chat("I would rather not say") if "prompt 2" in asked_text(request) else chat("Yes")

    with Stub(judge_of(moody)) as stub:
        result = judge(stub)(batch(5))
    assert result.scores.isnan().tolist() == [False, False, True, False, False]
    assert result.errors == {2: "the answer is neither yes nor no: I would rather not say"}


def test_a_broken_image_is_not_sent():
    images = batch(2)
    images.images[0, 0, 0, 0] = torch.inf
    with Stub(judge_of(chat("Yes"))) as stub:
        result = judge(stub)(images)
    assert result.errors == {0: "the image has pixels that are not numbers"}
    assert result.scores[1] == 1
    assert len(stub.requests) == 1


def test_a_dead_judge_gives_nan_with_reasons_soon():
    result = judge(dead_url())(batch(64))
    assert result.scores.isnan().all()
    assert len(result.errors) == 64
    assert any("not asked, because another request failed" in reason for reason in result.errors.values())


def test_no_images_no_question():
    result = judge(dead_url(), preset="unifiedreward2")(batch(0))
    assert result.scores.shape == (0,)
    assert all(values.shape == (0,) for values in result.details.values())


def test_requests_that_failed_for_a_moment_do_not_show():
    answers = [Answer({}, 503), Answer({}, 429, {"Retry-After": "0"}), judge_of(grey_yes)]
    with Stub(*answers) as stub:
        result = judge(stub, workers=1)(batch())
    torch.testing.assert_close(result.scores, torch.linspace(0, 1, 5), atol=0.003, rtol=0)
    assert len(stub.requests) == 7


# what is remembered


def test_the_same_question_about_the_same_image_is_asked_once():
    with Stub(judge_of(grey_yes)) as stub:
        first = judge(stub)(batch())
        again = judge(stub)(batch())
        assert len(stub.requests) == 5
        judge(stub)(batch(prompts=["another prompt"] * 5))
        assert len(stub.requests) == 10
        judge(stub, model="judge-2")(batch())
        assert len(stub.requests) == 15
    assert torch.equal(first.scores, again.scores)


def test_an_image_of_the_same_size_is_another_image():
    """Both files have the same length."""
    images = torch.tensor([100, 155]).view(2, 1, 1, 1).expand(2, 3, 8, 8) / 255
    with Stub(judge_of(grey_yes)) as stub:
        result = judge(stub, workers=1)(RewardBatch(images, ["a"] * 2, [{}] * 2))
    torch.testing.assert_close(result.scores, torch.tensor([100, 155]) / 255, atol=0.003, rtol=0)


def test_failures_are_not_remembered():
    with Stub(chat("hm"), chat("Yes")) as stub:
        assert judge(stub)(batch(1)).scores.isnan().all()
        assert judge(stub)(batch(1)).scores.tolist() == [1]


def test_only_the_last_answers_are_remembered():
    kept = Answers(2)
    kept.put("a", (1.0,))
    kept.put("b", (2.0,))
    kept.get("a")
    kept.put("c", (3.0,))
    assert (kept.get("a"), kept.get("b"), kept.get("c")) == ((1.0,), None, (3.0,))


# before training


def test_a_judge_that_is_there_passes_with_one_question():
    with Stub(judge_of(chat("Yes"))) as stub:
        assert judge(stub).validate(["a"] * 9, [{}] * 9) == []
    assert [(request.method, request.path) for request in stub.requests] == [("GET", "/v1/models")]


@pytest.mark.parametrize("model", ["", "judge-2"])
def test_a_model_that_is_not_there_is_named_with_those_that_are(model):
    with Stub(judge_of(chat("Yes"))) as stub:
        (problem,) = judge(stub, model=model).validate([], [])
    assert problem.endswith(f"has no model '{model}'; it has: judge-1")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (
            Answer({"status": "ok"}),
            "/models answered, but not with a list of models: is this an OpenAI-compatible server",
        ),
        (Answer({"data": [None, {"id": 5}]}), "has no model 'judge-1'; it has: none"),
        (Answer({}, 404), "HTTP 404: {}. Start the server, or correct base_url (most end in /v1)"),
        (Answer({}, 503), "no usable answer in one attempt; HTTP 503"),
    ],
)
def test_a_server_that_is_no_judge_is_told_before_training(answer, problem):
    with Stub(answer) as stub:
        (found,) = judge(stub).validate([], [])
        assert judge(stub).test_connection().startswith("NOT CONNECTED. ")
    assert problem in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "Is it good?"}, r"question has no effect with preset 'vqascore'; set preset to 'own'"),
        ({"preset": "unifiedreward", "mode": "levels", "high": 10.0}, r"mode, high has no effect"),
        ({"preset": "own"}, r"preset 'own' needs a question"),
        ({"preset": "own", "question": " "}, r"preset 'own' needs a question"),
        ({**SCORED, "low": 5.0, "high": 5.0}, r"low must be below high, got 5.0 and 5.0"),
        ({**SCORED, "mode": "several"}, r"needs different labels, such as 'A, B', got 'Score'"),
        ({**SCORED, "mode": "several", "labels": "A, a"}, r"needs different labels"),
        ({"preset": "vqa"}, r"must be one of 'vqascore', 'unifiedreward'"),
        ({"patience": -1.0}, r"must be a number in 0..86400"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        judge(dead_url(), **options)


def test_an_own_question_can_have_several_marks_on_an_own_scale():
    options = {
        "preset": "own",
        "mode": "several",
        "question": "Mark {prompt}",
        "labels": "Hands, Text,",
        "low": 0.0,
        "high": 10.0,
    }
    with Stub(judge_of(chat("Hands: 4\nText: 8"))) as stub:
        result = judge(stub, **options)(batch(1))
    assert result.scores.tolist() == [pytest.approx(0.6)]
    assert [values.item() for values in result.details.values()] == [pytest.approx(0.4), pytest.approx(0.8)]
    assert list(result.details) == ["hands", "text"]


def test_an_own_question_for_one_mark_needs_no_label():
    options = {"preset": "own", "mode": "score", "question": "Rate it", "low": 0.0, "high": 10.0}
    with Stub(judge_of(chat("of 10 points I give 7."))) as stub:
        result = judge(stub, **options)(batch(1))
    assert result.scores.tolist() == [pytest.approx(0.7)]
    assert not result.details


def test_braces_in_an_own_question_stay_as_they_are():
    with Stub(judge_of(chat("Yes"))) as stub:
        judge(stub, preset="own", question='Like {"a": {}}: {prompt}?')(batch(1, prompts=["{x}"]))
    assert asked_text(stub.requests[0]) == 'Like {"a": {}}: {x}?'


@pytest.mark.parametrize("preset", ["vqascore", "geneval_atoms"])
def test_trying_the_connection_asks_anew_each_time(preset):
    with Stub(judge_of(chat("Yes", [{"Yes": 0.73, "No": 0.27}]))) as stub:
        texts = [judge(stub, preset=preset).test_connection() for _ in range(2)]
    assert texts[0].startswith(f"OK. Model judge-1 on {stub.url}/v1 answers 0.73")
    assert len(stub.posts()) == 2


def test_trying_the_connection_shows_every_mark():
    text = "Alignment Score (1-5): 5\nCoherence Score (1-5): 2\nStyle Score (1-5): 2"
    with Stub(judge_of(chat(text))) as stub:
        found = judge(stub, preset="unifiedreward2").test_connection()
    assert found.startswith(
        f"OK. Model judge-1 on {stub.url}/v1 answers 0.50 (alignment 1.00, coherence 0.25, style 0.25)"
    )


@pytest.mark.parametrize(
    ("slow", "asked"),
    [
        ("/v1/models", lambda one: one.validate([], [])),
        ("/v1/models", VlmJudge.test_connection),
        ("/v1/chat/completions", VlmJudge.test_connection),
    ],
)
def test_whoever_waits_for_a_check_can_stop_it(slow, asked, monkeypatch):
    class CancelledError(Exception):
        pass

    stop = Event()

    def respond(request):
        if request.path == slow:
            stop.set()
            return Answer({}, delay=20)
        return judge_of(chat("Yes"))(request)

    def check():
        if stop.is_set():
            raise CancelledError

    monkeypatch.setattr(waiting, "INTERRUPTS", [check])
    with Stub(respond) as stub:
        start = time.monotonic()
        with pytest.raises(CancelledError):
            asked(judge(stub, timeout=30.0))
        assert time.monotonic() - start < 10


def test_a_check_waits_a_few_seconds_only(monkeypatch):
    monkeypatch.setattr(judge_module, "HEALTH_SECONDS", 0.2)
    with Stub(Answer({}, delay=20)) as stub:
        (problem,) = judge(stub, timeout=5.0).validate([], [])
    assert "no answer within 0.2 s" in problem


def test_of_a_server_with_many_models_the_first_are_named():
    with Stub(Answer({"data": [{"id": f"model-{i:04}"} for i in range(1000)]})) as stub:
        (problem,) = judge(stub).validate([], [])
    assert "it has: model-0000, model-0001" in problem
    assert len(problem) < 1200


def test_a_server_that_is_not_there_is_named_before_metadata_that_are_wrong():
    first, second = judge(dead_url(), preset="geneval_atoms").validate(["a"], [{}])
    assert "Start the server" in first
    assert second.startswith("prompt 1 ('a'): ")


def test_trying_the_connection_tells_of_an_answer_that_is_none():
    with Stub(judge_of(chat("I see grey"))) as stub:
        text = judge(stub).test_connection()
    assert text.startswith("NO SCORE. Model judge-1 on ")
    assert text.endswith("the answer is neither yes nor no: I see grey")
