"""GenEval's metadata as questions to a judge."""

import pytest
import torch
from densegrpo.engine.rewards.remote import judge as judge_module
from densegrpo.engine.rewards.remote.atoms import atoms
from densegrpo.engine.rewards.remote.judge import Answers
from judging import batch, judge
from stub_servers import Stub, asked_text, chat, judge_of

COUNT = 'Count what can be called "{}" in this image. Is the number of them {}? Please answer Yes or No.'


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(judge_module, "KEPT", Answers())


@pytest.mark.parametrize(
    ("metadata", "questions"),
    [
        ({"include": [{"class": "cow", "count": 1}]}, [(COUNT.format("cow", "at least 1"), True)]),
        (
            {"include": [{"class": "cow", "count": 3}], "exclude": [{"class": "cow", "count": 4}]},
            [(COUNT.format("cow", "exactly 3"), True)],
        ),
        ({"include": [{"class": "cow", "count": 2}]}, [(COUNT.format("cow", "exactly 2"), True)]),
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
    ("relation", "words"),
    [("left of", "to the left of"), ("right of", "to the right of"), ("above", "above"), ("below", "below")],
)
def test_each_relation_is_asked_for_in_words(relation, words):
    clauses = [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]}]
    assert atoms({"include": clauses})[-1].text.startswith(f'Is a "dog" {words} a "cow" in this image?')


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "no 'include' clauses"),
        ({"include": [{"class": "", "count": 1}]}, "class ''"),
        ({"include": [{"class": "  ", "count": 1}]}, "class '  '"),
        ({"include": [{"class": ["cow"], "count": 1}]}, "class ['cow']"),
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


@pytest.mark.parametrize(("lowest", "strict"), [(0.3, 0), (0.5, 0), (0.51, 1)])
def test_strict_asks_whether_the_least_certain_answer_is_rather_right(lowest, strict):
    metadata = {"include": [{"class": "cow", "count": 1, "color": "red"}]}

    def respond(request):
        yes = lowest if "colour red" in asked_text(request) else 0.9
        return chat("", [{"Yes": yes, "No": 1 - yes}])

    with Stub(judge_of(respond)) as stub:
        result = judge(stub, preset="geneval_atoms")(batch(1, [metadata]))
    assert result.details["strict"].tolist() == [strict]
    assert result.scores.item() == pytest.approx((lowest + 0.9) / 2)


def test_an_own_preset_can_ask_for_each_thing_without_a_question_of_its_own():
    metadata = {"include": [{"class": "cow", "count": 1}]}
    with Stub(judge_of(chat("Yes"))) as stub:
        result = judge(stub, preset="own", mode="atoms")(batch(1, [metadata]))
    assert result.scores.tolist() == [1]


def test_of_several_questions_without_an_answer_the_first_is_told():
    metadata = {"include": [{"class": "cow", "count": 1, "color": "red"}]}
    with Stub(judge_of(lambda r: chat("colourless" if "colour" in asked_text(r) else "hm"))) as stub:
        result = judge(stub, preset="geneval_atoms")(batch(1, [metadata]))
    assert result.errors == {0: "the answer is neither yes nor no: hm"}


def test_the_reason_names_the_beginning_of_a_long_prompt():
    with Stub(judge_of(chat("Yes"))) as stub:
        result = judge(stub, preset="geneval_atoms")(batch(1, prompts=["a cow\n" + "very " * 1000]))
    assert result.errors[0].startswith("prompt 'a cow very very")
    assert len(result.errors[0]) < 400


def test_an_image_with_one_unanswered_question_has_no_score():
    metadata = {"include": [{"class": "cow", "count": 1, "color": "red"}]}
    with Stub(judge_of(lambda r: chat("hm") if "colour" in asked_text(r) else chat("Yes"))) as stub:
        result = judge(stub, preset="geneval_atoms")(batch(1, [metadata]))
    assert result.scores.isnan().all()
    assert result.details["strict"].isnan().all()
    assert "neither yes nor no" in result.errors[0]
