"""A vision-language model as the judge."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from densegrpo.engine.knobs import check, options_of
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards.remote import judge as judge_module
from densegrpo.engine.rewards.remote.atoms import atoms
from densegrpo.engine.rewards.remote.judge import Answers, VlmJudge
from densegrpo.engine.rewards.remote.reply import UnusableError, level, rating, read_reply, yes_probability
from PIL import Image
from stub_servers import Answer, Stub, asked_image, asked_text, chat, dead_url, grey_yes, judge_of

SCORED = {"preset": "own", "mode": "score", "question": "Rate {prompt}", "labels": "Score"}


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(judge_module, "KEPT", Answers())


def judge(stub_or_url, **options):
    url = stub_or_url if isinstance(stub_or_url, str) else stub_or_url.url
    options = {"base_url": f"{url}/v1", "model": "judge-1", "timeout": 2.0, "retries": 1, "backoff": 0.01, **options}
    check("vlm_judge", options_of(VlmJudge), options)
    return VlmJudge(**options)


def batch(num=5, metadata=None, prompts=None):
    levels = torch.linspace(0, 1, num) if num > 1 else torch.full((num,), 0.5)
    images = levels.view(-1, 1, 1, 1).expand(num, 3, 8, 12).clone()
    return RewardBatch(images, prompts or [f"prompt {i}" for i in range(num)], metadata or [{}] * num)


def reply(text="", tokens=None, finish="stop"):
    return read_reply(json.loads(json.dumps(chat(text, tokens, finish).data)))


# what an answer says


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"Yes": 0.6, "No": 0.2}, 0.75),
        ({"Yes": 0.3, " yes": 0.2, "YES": 0.1, "\u2581no": 0.1, "\u0120No": 0.1, "Maybe": 0.2}, 0.75),
        ({"Yes": 0.9}, 1.0),
        ({"No": 0.9, "Not": 0.05, "Yesterday": 0.05}, 0.0),
        ({"Yes": 0.0, "No": 0.5}, 0.0),
    ],
)
def test_yes_is_weighed_against_no_in_all_spellings(tokens, expected):
    assert yes_probability(reply("No", [tokens])) == pytest.approx(expected)


@pytest.mark.parametrize("tokens", [None, [], [{}], [{"<think>": 0.999, "Yes": 1e-5, "No": 1e-7}]])
@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes", 1), (" yes, it does", 1), ("**No**.", 0), ("no", 0), ('"Yes"', 1), ("<think>a no b</think>\nYes", 1)],
)
def test_without_probabilities_the_text_counts(tokens, text, expected):
    assert yes_probability(reply(text, tokens)) == expected


@pytest.mark.parametrize("text", ["", "Not at all", "I cannot say yes", "Yesterday", "none", "1"])
def test_an_answer_that_is_neither_yes_nor_no_is_no_answer(text):
    with pytest.raises(UnusableError, match="neither yes nor no"):
        yes_probability(reply(text))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([{"excellent": 0.5, "good": 0.5}], 0.875),
        ([{"Ex": 0.4, " good": 0.4, "bad": 0.2}], 0.7),
        ([{"The": 0.9, "good": 0.1}, {" quality": 1.0}, {" poor": 0.6, " fair": 0.2, "nice": 0.2}], 0.3125),
    ],
)
def test_levels_give_their_expected_value(tokens, expected):
    assert level(reply("fair", tokens)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Excellent.", 1), ("good", 0.75), ("not bad, in the end: Fair", 0.5), ("**poor**", 0.25), ("bad", 0)],
)
def test_without_probabilities_the_last_level_counts(text, expected):
    assert level(reply(text)) == expected


def test_an_answer_without_a_level_is_no_answer():
    with pytest.raises(UnusableError, match="names none of excellent, good, fair, poor, bad: goodness"):
        level(reply("goodness", [{"b": 0.9}]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Final Score: 4", 0.75),
        ("Final Score:4.50", 0.875),
        ("final score: 3/5", 0.5),
        ("**Final Score:** 2", 0.25),
        ("**Final Score**: **2**", 0.25),
        ("Final Score (1-5): 2.69", 0.4225),
        ("Final Score = [5]", 1),
        ("first Final Score: 1\nno, Final Score: 5", 1),
        ("<think>Final Score: 1</think>Final Score: 5", 1),
        ("Final Score: 17", 1),
        ("Final Score: 0", 0),
        ("Final Score: -3.5", 0),
        ("1. red (colour): 1\n2. cat (animal): 0\nFinal Score:\n 2", 0.25),
    ],
)
def test_the_last_number_after_the_label_is_mapped_and_clamped(text, expected):
    assert rating(reply(text), "Final Score", 1, 5) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "Score 5", "Final Score: X", "Final Score: good", "5", "Final Score: nan", None])
def test_an_answer_without_that_number_is_no_answer(text):
    with pytest.raises(UnusableError, match="no number after 'Final Score'"):
        rating(reply(text), "Final Score", 1, 5)


def test_without_a_label_the_last_number_counts():
    assert rating(reply("of 10 points I give 7."), "", 0, 10) == pytest.approx(0.7)


def test_an_answer_that_was_cut_off_is_no_answer():
    with pytest.raises(UnusableError, match="cut off; raise max_tokens"):
        rating(reply("Final Score: 2", finish="length"), "Final Score", 1, 5)
    with pytest.raises(
        UnusableError, match="ends inside the model's thinking; raise max_tokens or set thinking to off"
    ):
        reply("<think>it could be Final Score: 2", finish="length")


def test_a_label_is_no_pattern_and_a_long_answer_takes_no_long_time():
    assert rating(reply("a+b*: 3"), "a+b*", 1, 5) == 0.5
    with pytest.raises(UnusableError):
        rating(reply("Score " * 50_000 + " " * 100_000), "Score", 1, 5)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"choices": []},
        {"choices": {}},
        {"choices": [None]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {}}]},
        {"choices": [{"message": {"content": 5}}]},
        {"choices": [{"message": {"content": [{"type": "text"}]}}]},
        {"error": {"message": "overloaded"}},
    ],
)
def test_what_is_no_chat_completion_is_no_answer(data):
    with pytest.raises(UnusableError, match=r"no chat completion|instead of a text"):
        read_reply(data)


@pytest.mark.parametrize(
    "logprobs",
    [
        5,
        {"content": 5},
        {"content": [None, 5]},
        {"content": [{"top_logprobs": 5}]},
        {"content": [{"top_logprobs": [None, {"token": 5, "logprob": 0}, {"token": "no", "logprob": "x"}]}]},
        {"content": [{"top_logprobs": [{"token": "no", "logprob": float("nan")}]}]},
    ],
)
def test_probabilities_of_another_shape_are_as_good_as_none(logprobs):
    data = {"choices": [{"message": {"content": "Yes"}, "logprobs": logprobs}]}
    assert yes_probability(read_reply(data)) == 1


def test_impossible_probabilities_stay_within_bounds():
    top = [("Yes", 5000.0), ("No", float("-inf")), ("no", float("nan"))]
    top = [{"token": token, "logprob": value} for token, value in top]
    data = {"choices": [{"message": {"content": "No"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}
    assert yes_probability(read_reply(data)) == 1


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
        result = judge(stub, workers=1, retries=2)(batch())
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


# one question for each thing


COUNT = 'Count what can be called "{}" in this image. Is the number of them {}? Please answer Yes or No.'


@pytest.mark.parametrize(
    ("metadata", "questions"),
    [
        ({"include": [{"class": "cow", "count": 1}]}, [(COUNT.format("cow", "at least 1"), True)]),
        (
            {"include": [{"class": "cow", "count": 3}], "exclude": [{"class": "cow", "count": 4}]},
            [(COUNT.format("cow", "exactly 3"), True)],
        ),
        (
            {"include": [{"class": "cow", "count": 1, "color": "red"}], "exclude": [{"class": "cow", "count": 2}]},
            [
                (COUNT.format("cow", "at least 1"), True),
                ('Look at each "cow" in this image. Is its colour red? Please answer Yes or No.', True),
                (COUNT.format("cow", "2 or more"), False),
            ],
        ),
        (
            {"include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]},
            [
                (COUNT.format("cow", "at least 1"), True),
                (COUNT.format("dog", "at least 1"), True),
                ('Is a "dog" to the left of a "cow" in this image? Please answer Yes or No.', True),
            ],
        ),
    ],
)
def test_metadata_become_questions(metadata, questions):
    assert [tuple(question) for question in atoms(metadata)] == questions


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "no 'include' clauses"),
        ({"include": [{"class": "", "count": 1}]}, "class ''"),
        ({"include": [{"count": 1}]}, "class None"),
        ({"include": [{"class": "cow", "count": 0}]}, "count 0"),
        ({"include": [{"class": "cow", "count": 1, "color": 5}]}, "color 5"),
        ({"include": [{"class": "cow", "count": 1, "position": ["near", 0]}]}, "position"),
        ({"include": ["cow"]}, "clause 'cow'"),
        ({"include": [{"class": "cow", "count": 1}], "exclude": 5}, "'exclude' 5"),
    ],
)
def test_wrong_metadata_are_named_before_training_and_cost_one_image(metadata, reason):
    right = {"include": [{"class": "cow", "count": 1}]}
    with Stub(judge_of(chat("Yes"))) as stub:
        reward = judge(stub, preset="geneval_atoms")
        (problem,) = reward.validate(["a cow", "b"], [right, metadata])
        result = reward(batch(2, [metadata, right]))
    assert problem.startswith("prompt 2 ('b'): ")
    assert reason in problem
    assert result.scores.isnan().tolist() == [True, False]
    assert reason in result.errors[0]


def test_the_reward_is_the_mean_over_the_questions_and_strict_needs_them_all():
    metadata = {
        "include": [{"class": "cow", "count": 1, "color": "red"}],
        "exclude": [{"class": "dog", "count": 1}],
    }

    def respond(request):
        text = asked_text(request)
        yes = 0.9 if "at least" in text else 0.8 if "colour red" in text else 0.4
        return chat("", [{"Yes": yes, "No": 1 - yes}])

    with Stub(judge_of(respond)) as stub:
        result = judge(stub, preset="geneval_atoms")(batch(3, [metadata, {"include": metadata["include"]}, metadata]))
    torch.testing.assert_close(result.scores, torch.tensor([2.3 / 3, 0.85, 2.3 / 3]))
    assert result.details["strict"].tolist() == [1, 1, 1]

    with Stub(judge_of(lambda request: chat("", [{"Yes": 0.4, "No": 0.6}]))) as stub:
        result = judge(stub, preset="geneval_atoms")(batch(1, [metadata]))
    assert result.details["strict"].tolist() == [0]
    assert result.scores.item() == pytest.approx((0.4 + 0.4 + 0.6) / 3)


def test_an_image_with_one_unanswered_question_has_no_score():
    metadata = {"include": [{"class": "cow", "count": 1, "color": "red"}]}
    with Stub(judge_of(lambda r: chat("hm") if "colour" in asked_text(r) else chat("Yes"))) as stub:
        result = judge(stub, preset="geneval_atoms")(batch(1, [metadata]))
    assert result.scores.isnan().all()
    assert result.details["strict"].isnan().all()
    assert "neither yes nor no" in result.errors[0]


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
        ({**SCORED, "low": 5.0, "high": 5.0}, r"low must be below high, got 5.0 and 5.0"),
        ({**SCORED, "mode": "several"}, r"needs different labels, such as 'A, B', got 'Score'"),
        ({**SCORED, "mode": "several", "labels": "A, a"}, r"needs different labels"),
        ({"preset": "vqa"}, r"must be one of 'vqascore', 'unifiedreward'"),
        ({"retries": 99}, r"must be a whole number in 0..10"),
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
        "labels": "Hands, Text",
        "low": 0.0,
        "high": 10.0,
    }
    with Stub(judge_of(chat("Hands: 4\nText: 8"))) as stub:
        result = judge(stub, **options)(batch(1))
    assert result.scores.tolist() == [pytest.approx(0.6)]
    assert [values.item() for values in result.details.values()] == [pytest.approx(0.4), pytest.approx(0.8)]
    assert list(result.details) == ["hands", "text"]


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


def test_trying_the_connection_tells_of_an_answer_that_is_none():
    with Stub(judge_of(chat("I see grey"))) as stub:
        text = judge(stub).test_connection()
    assert text.startswith("NO SCORE. Model judge-1 on ")
    assert text.endswith("the answer is neither yes nor no: I see grey")
