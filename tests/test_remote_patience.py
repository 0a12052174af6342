"""Servers that are restarted, busy, or away for good."""

import logging
import re
import threading
import time
from urllib.parse import urlsplit

import pytest
import torch
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards.remote import patience
from densegrpo.engine.rewards.remote.address import connect
from densegrpo.engine.rewards.remote.http_reward import RemoteHttp
from densegrpo.engine.rewards.remote.judge import VlmJudge
from densegrpo.engine.rewards.remote.parallel import in_parallel, stop_all
from densegrpo.engine.rewards.remote.patience import ABSENCES, Attempts, Limits, PassingError
from densegrpo.engine.rewards.remote.transport import exchange
from stub_servers import Answer, Stub, dead_url, grey_rewards

URL = "http://127.0.0.1:8090"
AWAY, BUSY = PassingError("no connection"), PassingError("HTTP 429", 30.0)
REFUSED, FAILED = PassingError("HTTP 500", answered=True), PassingError("HTTP 500", 30.0, answered=True)


class Clock:
    """Stands for the module ``time``."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(patience, "time", made)
    monkeypatch.setattr(patience, "ABSENCES", patience.Absences())
    return made


def waited(clock, *problems, seconds=300.0, meanwhile=lambda: None):
    """The pauses of a request that fails with ``problems`` in turn, until it is given up or a thousand times."""
    attempts, pauses = Attempts(URL, Limits(60, seconds)), []
    while len(pauses) < 1000 and (pause := attempts.pause(problems[len(pauses) % len(problems)])) is not None:
        pauses.append(pause)
        clock.now += pause
        meanwhile()
    return pauses


@pytest.mark.parametrize("kind", [RemoteHttp, VlmJudge])
def test_unless_told_otherwise_a_server_may_be_away_for_minutes_and_is_found_again_soon(kind, clock):
    pauses = waited(clock, AWAY, seconds=kind().patience)
    assert sum(pauses) == pytest.approx(300)
    assert max(pauses) <= 10


def test_pauses_double_up_to_the_longest_and_are_spread(clock):
    found = []
    for _ in range(60):
        found.append(waited(clock, AWAY, seconds=100.0))
        patience.ABSENCES.over(URL)
    for number, longest in enumerate([0.5, 1, 2, 4, 8, 10, 10]):
        pauses = [pauses[number] for pauses in found]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
        assert max(pauses) - min(pauses) > longest / 4


def test_a_wait_the_server_asks_for_is_kept_and_uses_up_no_attempts(clock):
    pauses = waited(clock, BUSY)
    assert all(30 <= pause <= 30.5 for pause in pauses[:-1])
    assert len(pauses) == 10
    assert sum(pauses) == pytest.approx(300)


def test_a_server_that_wants_to_be_left_alone_for_longer_is_asked_once_more_at_the_end(clock):
    assert waited(clock, PassingError("HTTP 503", 86400.0)) == [300]


def test_a_request_that_a_server_fails_on_is_given_up_soon(clock):
    assert sum(waited(clock, REFUSED)) < 2
    assert len(waited(clock, REFUSED)) == 2
    assert len(waited(clock, AWAY, REFUSED)) == 5


def test_without_patience_there_is_one_attempt(clock):
    assert waited(clock, AWAY, seconds=0) == waited(clock, BUSY, seconds=0) == waited(clock, REFUSED, seconds=0) == []


def test_a_request_in_a_queue_waits_on_while_others_are_answered(clock):
    """A server that serves one at a time and turns away the others."""
    pauses = waited(clock, BUSY, meanwhile=lambda: patience.ABSENCES.over(URL))
    assert len(pauses) == 1000


def test_a_server_that_was_away_for_too_long_is_not_waited_for_as_long_again(clock):
    assert sum(waited(clock, AWAY)) == pytest.approx(300)
    clock.now += 5
    assert sum(waited(clock, AWAY)) == pytest.approx(10)
    assert sum(waited(clock, AWAY, seconds=2.0)) == pytest.approx(2)
    patience.ABSENCES.over(URL)
    assert sum(waited(clock, AWAY)) == pytest.approx(300)


def test_requests_that_fail_together_are_given_up_together(clock):
    first, second = (Attempts(URL, Limits(60, 300)) for _ in range(2))
    assert first.pause(AWAY) is not None
    clock.now += 200
    assert second.pause(AWAY) is not None
    clock.now += 100
    assert first.pause(AWAY) is second.pause(AWAY) is None


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_waiting_for_long_is_told_once_with_what_and_until_when(clock, caplog):
    for _ in range(3):
        waited(clock, AWAY, seconds=60.0)
    (line,) = lines(caplog)
    start, _, until = line.removesuffix(" (patience)").rpartition(" ")
    assert start == f"reward server {URL}: no usable answer (no connection); trying again until"
    until = time.strptime(until, "%H:%M:%S")
    left = (until.tm_hour * 3600 + until.tm_min * 60 + until.tm_sec - seconds_of_day()) % 86400
    assert 45 < left <= 60
    patience.ABSENCES.over(URL)
    assert re.fullmatch(rf"reward server {URL}: it answers again, after \d+ s", lines(caplog)[1])
    patience.ABSENCES.over(URL)
    assert len(lines(caplog)) == 2
    waited(clock, AWAY, seconds=60.0)
    assert lines(caplog)[2].startswith(start)


def seconds_of_day():
    now = time.localtime()
    return now.tm_hour * 3600 + now.tm_min * 60 + now.tm_sec


def test_a_long_wait_is_told_before_it_begins(clock, caplog):
    Attempts(URL, Limits(60, 300)).pause(BUSY)
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize(("problem", "seconds"), [(AWAY, 0.0), (AWAY, 4.0), (REFUSED, 300.0), (FAILED, 300.0)])
def test_what_takes_no_time_or_concerns_one_request_is_not_told(problem, seconds, clock, caplog):
    waited(clock, problem, seconds=seconds)
    patience.ABSENCES.over(URL)
    assert not lines(caplog)


# with real servers


def batch(num):
    levels = torch.linspace(0, 1, num).view(-1, 1, 1, 1)
    return RewardBatch(levels.expand(num, 3, 8, 8).clone(), ["a"] * num, [{}] * num)


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)


def test_a_server_that_is_restarted_in_the_middle_costs_no_score(short_pauses):
    """Requests under way are cut off, and for a while nobody listens."""
    gone = threading.Event()

    def until_it_goes(request):
        if len(first.requests) < 5:
            return grey_rewards(request)
        gone.set()
        return Answer(hang_up=True)

    second: list[Stub] = []

    def restart():
        gone.wait(5)
        first.__exit__()
        time.sleep(0.4)
        second.append(Stub(grey_rewards, port=urlsplit(first.url).port))
        second[0].__enter__()

    first = Stub(until_it_goes)
    first.__enter__()
    thread = threading.Thread(target=restart)
    thread.start()
    result = RemoteHttp(url=first.url, batch_size=1, workers=3, timeout=2.0)(batch(12))
    thread.join()
    second[0].__exit__()
    assert not result.errors
    torch.testing.assert_close(result.scores, torch.linspace(0, 1, 12), atol=0.5 / 255 + 1e-6, rtol=0)
    assert len(second[0].posts()) == 8


def test_a_server_that_serves_one_at_a_time_and_turns_away_the_others_scores_all(short_pauses):
    """Each of four requests at a time would have used up its patience."""
    lock = threading.Lock()

    def busy(request):
        if not lock.acquire(blocking=False):
            return Answer({}, 429, {"Retry-After": "0"})
        try:
            time.sleep(0.05)
            return grey_rewards(request)
        finally:
            lock.release()

    with Stub(busy) as stub:
        result = RemoteHttp(url=stub.url, batch_size=1, workers=4, patience=0.2)(batch(10))
    assert not result.errors
    assert len(stub.posts()) > 10


def test_the_wait_a_server_asks_for_is_kept():
    with Stub(Answer({}, 429, {"Retry-After": "1"}), grey_rewards) as stub:
        start = time.monotonic()
        result = RemoteHttp(url=stub.url, timeout=0.9)(batch(2))
        assert 1 <= time.monotonic() - start < 8
    assert not result.errors


@pytest.mark.parametrize("problem", [Answer({}, 503, {"Retry-After": "200"}), None])
def test_whoever_waits_for_a_server_can_stop_at_once(problem, monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 100.0)
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 100.0)
    before = set(threading.enumerate())
    with Stub(problem or grey_rewards) as stub:
        url = stub.url if problem else dead_url()
        threading.Timer(0.3, stop_all).start()
        start = time.monotonic()
        result = RemoteHttp(url=url)(batch(3))
        assert time.monotonic() - start < 10
    assert len(result.errors) == 3
    time.sleep(0.1)
    left = [thread for thread in threading.enumerate() if thread not in before and thread.name == "densegrpo-reward"]
    assert not left


@pytest.mark.parametrize("status", [429, 500, 503])
def test_checks_before_training_ask_once_however_much_patience_there_is(status):
    with Stub(Answer({}, status, {"Retry-After": "100"})) as stub:
        reward = RemoteHttp(url=stub.url)
        (problem,) = reward.validate([], [])
        assert f"in one attempt; HTTP {status}" in problem
        assert reward.test_connection().startswith("NOT CONNECTED. ")
    assert len(stub.requests) == 2


@pytest.mark.parametrize("kind", ["http", "judge"])
def test_trying_a_connection_asks_for_one_score_once(kind):
    def answer(request):
        return Answer(
            {"data": [{"id": "m"}]} if request.method == "GET" else {}, 200 if request.method == "GET" else 503
        )

    with Stub(answer) as stub:
        reward = RemoteHttp(url=stub.url) if kind == "http" else VlmJudge(base_url=stub.url, model="m")
        assert "in one attempt; HTTP 503" in reward.test_connection()
    assert len(stub.posts()) == 1


@pytest.mark.parametrize("answer", [Answer({}, 404), Answer({}, 500), Answer({"x": 1}), Answer(raw=b"no JSON")])
def test_a_server_that_answers_anything_is_back(answer):
    ABSENCES.since.clear()
    with Stub(Answer({}, 503), answer) as stub:
        server = connect(stub.url)
        for _ in range(2):
            in_parallel([lambda given_up: exchange(server, "/x", {}, Limits(2, 0), given_up)], 1)
    assert not ABSENCES.since


def test_what_is_told_is_a_warning_of_our_own_log(clock, caplog):
    caplog.set_level(logging.DEBUG)
    waited(clock, BUSY)
    assert [(record.name, record.levelno) for record in caplog.records] == [("densegrpo.rewards", logging.WARNING)]
