"""Ballots, scores, and the board of open groups."""

import threading
from contextlib import suppress

import pytest
from densegrpo.engine.votes.ballots import MODES, ballot_scores, check_ballot, group_scores
from densegrpo.engine.votes.board import PRESENCE, Board, ClosedError, Group, group_id
from hypothesis import given
from hypothesis import strategies as st

NAMES = ["a", "b", "c", "d"]
LIKE_A = {"likes": ["a"]}


class Clock:
    """Time that passes when told."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def board(clock):
    return Board(now=clock)


def group(name="g", mode="like", needed=1, seconds=60.0):
    return Group(name, mode, "a red circle", NAMES, 1, 1, None, needed, seconds)


@st.composite
def ballots(draw, mode):
    """(images, a ballot on them that a page could send)."""
    names = [str(i) for i in range(draw(st.integers(1, 12)))]
    marked = draw(st.permutations(names))[: draw(st.integers(1, len(names)))]
    if mode == "rank":
        return names, {"order": marked}
    cut = draw(st.integers(0, len(marked)))
    return names, {"likes": marked[:cut], "dislikes": marked[cut:]}


def test_liked_beats_untouched_beats_disliked():
    assert ballot_scores("like", NAMES, {"likes": ["b"], "dislikes": ["d", "a"]}) == [0, 1, 0.5, 0]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (["c"], [1 / 3, 1 / 3, 1, 1 / 3]),
        (["c", "a"], [2 / 3, 1 / 6, 1, 1 / 6]),
        (["c", "a", "b"], [2 / 3, 1 / 3, 1, 0]),
        (["c", "a", "b", "d"], [2 / 3, 1 / 3, 1, 0]),
    ],
)
def test_ranked_images_get_even_places_and_the_rest_shares_theirs(order, expected):
    assert ballot_scores("rank", NAMES, {"order": order}) == pytest.approx(expected)


def test_a_single_image_has_nothing_to_be_compared_with():
    assert ballot_scores("rank", ["a"], {"order": ["a"]}) == [0.5]


@given(ballots("rank"))
def test_ranks_keep_the_order_and_their_mean_is_one_half(given_):
    images, ballot = given_
    scores = dict(zip(images, ballot_scores("rank", images, ballot), strict=True))
    ranked = [scores[name] for name in ballot["order"]]
    assert ranked == sorted(ranked, reverse=True)
    assert len(set(ranked)) == len(ranked)
    assert all(scores[name] < ranked[-1] for name in images if name not in ballot["order"])
    assert sum(scores.values()) / len(images) == pytest.approx(0.5)


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_any_page_ballot_passes_and_gives_scores_in_bounds(mode, data):
    images, ballot = data.draw(ballots(mode))
    scores = ballot_scores(mode, images, check_ballot(mode, images, ballot))
    assert all(0 <= score <= 1 for score in scores)


@given(st.permutations([{"order": [name]} for name in NAMES[:3]]))
def test_the_order_of_voters_does_not_matter(voters):
    assert group_scores("rank", NAMES, voters) == group_scores("rank", NAMES, [{"order": [n]} for n in NAMES[:3]])


def test_voters_are_averaged():
    assert group_scores("like", NAMES, [{"likes": ["a"], "dislikes": []}, {"likes": [], "dislikes": ["a", "b"]}]) == [
        0.5,
        0.25,
        0.5,
        0.5,
    ]


@pytest.mark.parametrize(
    ("mode", "data", "reason"),
    [
        ("like", [], "has the parts likes, dislikes"),
        ("like", {"order": ["a"]}, "has the parts likes, dislikes"),
        ("like", {"likes": "a"}, "must be lists"),
        ("like", {"likes": []}, "mark at least one image, or skip"),
        ("like", {"likes": ["z"]}, "not in this group"),
        ("like", {"likes": [["a"]]}, "not in this group"),
        ("like", {"likes": ["a"], "dislikes": ["a"]}, "an image twice"),
        ("rank", {"order": ["a", "b", "a"]}, "an image twice"),
    ],
)
def test_impossible_ballots_are_refused(mode, data, reason):
    with pytest.raises(ValueError, match=reason):
        check_ballot(mode, NAMES, data)


def test_one_answer_settles_a_group(board):
    board.put(group(), {})
    assert not board.settled()
    board.answer("me", "g", LIKE_A)
    assert board.settled()
    assert board.take_down() == {"g": {"me": {"likes": ["a"], "dislikes": []}}}


def test_a_group_waits_for_as_many_people_as_are_needed_and_one_person_counts_once(board):
    board.put(group(needed=2), {})
    board.answer("me", "g", LIKE_A)
    board.answer("me", "g", {"likes": ["b"]})
    assert not board.settled()
    board.answer("you", "g", None)
    assert board.settled()
    assert board.take_down()["g"] == {"me": {"likes": ["b"], "dislikes": []}, "you": None}


def test_answers_from_before_count(board):
    board.put(group(), {"me": LIKE_A})
    assert board.settled()


def test_a_second_tab_is_told_that_it_is_too_late(board):
    board.put(group(), {})
    board.answer("me", "g", LIKE_A)
    with pytest.raises(ClosedError):
        board.answer("you", "g", LIKE_A)
    assert board.take_down()["g"].keys() == {"me"}


def test_an_impossible_ballot_or_one_that_cannot_be_kept_does_not_count(clock):
    def record(group, voter, ballot):
        raise OSError("disk full")

    board = Board(record, now=clock)
    board.put(group(), {})
    with pytest.raises(ValueError, match="twice"):
        board.answer("me", "g", {"likes": ["a", "a"]})
    with pytest.raises(OSError, match="disk full"):
        board.answer("me", "g", LIKE_A)
    assert not board.settled()


def test_nobody_there_closes_all_groups_at_once(board, clock):
    board.put(group("g"), {})
    board.put(group("h"), {})
    clock.time += 59
    assert not board.settled()
    clock.time += 1
    assert board.settled()
    assert board.take_down() == {"g": {}, "h": {}}


def test_time_that_ran_out_leaves_the_answers_there_are(board, clock):
    board.put(group(needed=3), {})
    board.answer("me", "g", LIKE_A)
    clock.time += 60
    assert board.settled()
    assert board.take_down()["g"].keys() == {"me"}


@pytest.mark.parametrize("sign", ["move", "answer"])
def test_a_sign_of_life_restarts_the_clock_of_all_groups(board, clock, sign):
    board.put(group("g"), {})
    board.put(group("h"), {})
    clock.time += 50
    board.move() if sign == "move" else board.answer("me", "g", LIKE_A)
    clock.time += 50
    assert not board.settled()
    clock.time += 10
    assert board.settled()


def test_groups_put_up_after_a_long_training_step_get_their_whole_time(board, clock):
    clock.time += 1000
    board.put(group(), {})
    assert board.view("me", None)["group"]["left"] == 60
    clock.time += 59
    assert not board.settled()


def test_looking_alone_is_no_sign_of_life(board, clock):
    board.put(group(), {})
    for _ in range(7):
        clock.time += 10
        board.view("an unattended page", "g")
    assert board.settled()


def test_a_move_after_the_end_does_not_open_a_group_again(board, clock):
    board.put(group(), {})
    clock.time += 60
    board.move()
    assert board.settled()


def test_people_get_different_groups_and_keep_theirs(board, clock):
    board.put(group("g"), {})
    board.put(group("h"), {})
    assert board.view("me", None)["group"]["id"] == "g"
    assert board.view("you", None)["group"]["id"] == "h"
    assert board.view("me", None)["group"]["id"] == "g", "another tab of mine"
    board.answer("me", "g", LIKE_A)
    assert board.view("me", "g")["group"]["id"] == "h", "better than nothing to do"
    clock.time += PRESENCE
    assert board.view("she", None)["group"]["id"] == "h"


def test_who_left_does_not_keep_a_group(board, clock):
    board.put(group("g"), {})
    board.put(group("h"), {})
    board.view("me", None)
    clock.time += PRESENCE
    assert board.view("you", None)["group"]["id"] == "g"
    assert board.view("me", "g")["group"]["id"] == "g", "whoever comes back keeps what is on the page"


def test_when_several_people_must_answer_they_start_alike(board):
    board.put(group("g", needed=2), {})
    board.put(group("h", needed=2), {})
    assert [board.view(voter, None)["group"]["id"] for voter in ("me", "you")] == ["g", "g"]
    board.answer("me", "g", LIKE_A)
    view = board.view("me", "g")
    assert (view["group"]["id"], view["mine"], view["open"]) == ("h", 1, 2)
    assert board.view("you", "g")["group"]["answers"] == 1


def test_the_page_is_told_what_comes_next(board):
    board.put(group("g"), {})
    assert board.view("me", None)["next"] == []
    board.put(group("h"), {})
    assert board.view("me", None)["next"] == NAMES


def test_many_threads_voting_at_once_settle_every_group_with_one_vote():
    recorded = []
    board = Board(lambda group, voter, ballot: recorded.append(group.id))
    ids = [f"g{i}" for i in range(20)]
    for name in ids:
        board.put(group(name), {})

    def vote(voter):
        for name in ids:
            with suppress(ClosedError):
                board.answer(voter, name, LIKE_A)

    threads = [threading.Thread(target=vote, args=(f"v{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert board.settled()
    assert sorted(recorded) == sorted(ids)
    assert [len(answers) for answers in board.take_down().values()] == [1] * 20


def test_a_group_is_known_by_mode_prompt_and_images_in_any_order():
    known = group_id("like", "p", ["a", "b"])
    assert known == group_id("like", "p", ["b", "a"])
    assert len({known, group_id("rank", "p", ["a", "b"]), group_id("like", "q", ["a", "b"])}) == 3
    assert known != group_id("like", "p", ["ab"])
