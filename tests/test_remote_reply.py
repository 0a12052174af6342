"""What a judge's answer says."""

import json

import pytest
from densegrpo.engine.rewards.remote.reply import UnusableError, level, rating, read_reply, yes_probability
from stub_servers import chat


def reply(text="", tokens=None, finish="stop"):
    return read_reply(json.loads(json.dumps(chat(text, tokens, finish).data)))


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
