"""Patience with servers, and its end."""

import socket
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from densegrpo.engine import waiting
from densegrpo.engine.rewards.remote import parallel, patience, transport
from densegrpo.engine.rewards.remote.address import connect
from densegrpo.engine.rewards.remote.parallel import Failure, in_parallel, interruptibly, stop_all
from densegrpo.engine.rewards.remote.patience import Limits, RemoteError, UnreachableError
from densegrpo.engine.rewards.remote.transport import exchange, retry_after
from stub_servers import Answer, Stub, dead_url, wire

KEY = "sk-very-secret-0123456789"
QUICK = Limits(timeout=2, patience=0.2)
GOOD = Answer({"fine": True})


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)


def ask(url, limits=QUICK, path="/compute", payload=None, given_up=None, key_variable=""):
    payload = {"x": 1} if payload is None else payload
    return exchange(connect(url, key_variable), path, payload, limits, given_up or threading.Event())


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status):
    with Stub(Answer({}, status), Answer({}, status), GOOD) as stub:
        assert ask(stub.url) == {"fine": True}
    assert len(stub.requests) == 3
    assert [request.data for request in stub.requests] == [{"x": 1}] * 3


@pytest.mark.parametrize(
    "broken",
    [
        Answer(raw=b'{"fine": tr', promised=14),
        Answer(raw=b"<html>starting</html>"),
        Answer(raw=b"[" * 100_000),
        Answer(raw=b"1" * 5000),
        Answer(raw=b"\xff\xfe"),
        Answer(hang_up=True),
    ],
)
def test_a_damaged_answer_is_asked_for_again(broken):
    with Stub(broken, GOOD) as stub:
        assert ask(stub.url) == {"fine": True}
    assert len(stub.requests) == 2


def test_attempts_are_bounded_and_the_last_problem_is_told():
    with Stub(Answer({"detail": "still loading"}, 503)) as stub:
        with pytest.raises(
            UnreachableError,
            match=r'/compute: no usable answer in \d+ attempts \(patience 0\.2 s\); HTTP 503: \{"detail": "still',
        ):
            ask(stub.url)
    assert 3 < len(stub.requests) < 20


@pytest.mark.parametrize(
    ("status", "all_would_fail"), [(500, False), (409, False), (200, False), (503, True), (429, True)]
)
def test_what_may_be_the_fault_of_one_request_is_no_outage(status, all_would_fail):
    with Stub(Answer(raw=b"oops", status=status)) as stub, pytest.raises(RemoteError) as failed:
        ask(stub.url)
    assert isinstance(failed.value, UnreachableError) is all_would_fail
    assert (len(stub.requests) == 3) is not all_would_fail


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_is_final_and_shows_what_the_server_says(status):
    with Stub(Answer({"error": "no model\nof that name" + "x" * 5000}, status)) as stub:
        with pytest.raises(RemoteError, match=rf"HTTP {status}: .*no model\\nof that name") as refused:
            ask(stub.url)
    assert not isinstance(refused.value, UnreachableError)
    assert len(stub.requests) == 1
    assert len(str(refused.value)) < 400


def test_control_characters_of_a_server_are_not_passed_on():
    with Stub(Answer(raw=b"\x1b[31mred\r\n\x00 text", status=400)) as stub:
        with pytest.raises(RemoteError) as refused:
            ask(stub.url)
    assert str(refused.value).isprintable()


def test_a_redirect_is_not_followed():
    with Stub(GOOD) as other, Stub(Answer({}, 307, {"Location": other.url})) as stub:
        with pytest.raises(
            RemoteError, match="HTTP 307: it sends us elsewhere, which could be a host that is not allowed"
        ):
            ask(stub.url)
    assert len(stub.requests) == 1
    assert not other.requests


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", dead_url())
    monkeypatch.setenv("HTTP_PROXY", dead_url())
    monkeypatch.delenv("no_proxy", raising=False)
    with Stub(GOOD) as stub:
        assert ask(stub.url) == {"fine": True}


def test_a_dead_port_fails_soon():
    start = time.monotonic()
    with pytest.raises(UnreachableError, match=r"\(patience 0\.2 s\); ConnectionRefusedError"):
        ask(dead_url())
    assert time.monotonic() - start < 10


def test_a_slow_answer_is_given_up():
    with Stub(Answer({}, delay=30)) as stub:
        with pytest.raises(UnreachableError, match=r"attempts \(patience 0\.2 s\); no answer within 0\.1 s"):
            ask(stub.url, Limits(0.1, 0.2))
    assert 2 <= len(stub.requests) <= 4


TRICKLES = {
    "headers": (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "no headers": (b"HTTP/1.1 100 Continue\r\n\r\n",),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" "),
}


@pytest.mark.parametrize("parts", TRICKLES.values(), ids=TRICKLES)
def test_an_answer_that_trickles_is_given_up(parts):
    """Each byte arrives in time, the whole does not."""
    start = time.monotonic()
    with wire(*parts, gap=0.05, last=400) as url:
        with pytest.raises(UnreachableError, match=r"one attempt; no answer within 0\.3 s"):
            ask(url, Limits(0.3, 0))
    assert time.monotonic() - start < 10


def test_a_server_that_does_not_read_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        with pytest.raises(UnreachableError, match=r"no answer within 0\.3 s"):
            ask(f"http://127.0.0.1:{listener.getsockname()[1]}", Limits(0.3, 0), payload="x" * 2**25)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("status", [200, 500])
def test_a_huge_answer_is_refused(status, monkeypatch):
    monkeypatch.setattr(transport, "MAX_ANSWER", 2**20)
    with Stub(Answer(raw=b"x" * (2**20 + 1), status=status)) as stub:
        with pytest.raises(RemoteError, match="more than 1 MiB"):
            ask(stub.url)
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("0", 0, 0),
        (" 120 ", 120, 120),
        ("999999999", 999999999, 999999999),
        ("Wed, 21 Oct 2015 07:28:00", 0, 0),
    ],
)
def test_when_to_come_back_is_seconds_or_a_date(text, low, high):
    assert low <= retry_after(text) <= high


@pytest.mark.parametrize(("minutes", "low", "high"), [(10, 590, 601), (-10, 0, 0)])
def test_when_to_come_back_can_be_a_date_from_now_on(minutes, low, high):
    date = format_datetime(datetime.now(timezone.utc) + timedelta(minutes=minutes), usegmt=True)
    assert low <= retry_after(date) <= high


@pytest.mark.parametrize("text", [None, "", "soon", "-5", "1.5", "nan", "\u00b2", "9" * 30, "Wed, 99 Foo 2015"])
def test_nonsense_about_when_to_come_back_is_ignored(text):
    assert retry_after(text) is None


def test_waiting_for_the_next_attempt_ends_when_it_is_given_up(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 600)
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 600)
    given_up = threading.Event()
    threading.Timer(0.1, given_up.set).start()
    start = time.monotonic()
    with pytest.raises(UnreachableError, match="in one attempt"):
        ask(dead_url(), Limits(60, 600), given_up=given_up)
    assert time.monotonic() - start < 10


def test_the_key_is_sent_and_never_shown_even_if_the_server_repeats_it(monkeypatch, caplog):
    monkeypatch.setenv("DENSEGRPO_API_KEY", KEY)

    def echo(request):
        return Answer({"error": "x" * 170 + request.headers["Authorization"]}, 401)

    with Stub(echo) as stub, caplog.at_level(0), pytest.raises(RemoteError, match="401") as refused:
        ask(stub.url, key_variable="DENSEGRPO_API_KEY")
    assert stub.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    for length in (len(KEY), 8):
        assert KEY[:length] not in str(refused.value) + caplog.text


def test_a_key_in_an_answer_that_is_no_http_is_not_shown_and_neither_are_its_control_characters(monkeypatch):
    monkeypatch.setenv("DENSEGRPO_API_KEY", KEY)
    with wire(f"HTTP/1.1 abc \x1b[31m Bearer {KEY}\r\n".encode()) as url:
        with pytest.raises(UnreachableError, match=r"BadStatusLine: HTTP/1\.1 abc .* Bearer \*\*\*") as failed:
            ask(url, key_variable="DENSEGRPO_API_KEY")
    assert str(failed.value).isprintable()


def test_without_a_variable_no_key_is_sent(monkeypatch):
    monkeypatch.setenv("DENSEGRPO_API_KEY", KEY)
    with Stub(GOOD) as stub:
        ask(stub.url)
    assert "Authorization" not in stub.requests[0].headers


def test_answers_come_in_the_order_of_the_questions_whoever_is_first():
    def job(number):
        return lambda given_up: time.sleep(0.02 * (9 - number)) or number

    assert in_parallel([job(n) for n in range(10)], 4) == list(range(10))


def test_no_more_jobs_run_at_a_time_than_allowed():
    running, most, lock = 0, 0, threading.Lock()

    def job(given_up):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    in_parallel([job] * 12, 3)
    assert most == 3


def test_one_failure_is_one_failure():
    def bad(given_up):
        raise ValueError("junk")

    def refused(given_up):
        raise RemoteError("HTTP 400")

    def good(given_up):
        return 5

    assert in_parallel([bad, good, refused, good], 1) == [Failure("ValueError: junk"), 5, Failure("HTTP 400"), 5]


def test_after_an_outage_the_rest_is_not_asked():
    asked = []

    def job(number):
        def run(given_up):
            asked.append(number)
            if number == 2:
                raise UnreachableError("the server is gone")
            return number

        return run

    results = in_parallel([job(n) for n in range(50)], 1)
    assert results[:3] == [0, 1, Failure("the server is gone")]
    assert asked == [0, 1, 2]
    assert all(r.reason == "it was not asked, because another request failed: the server is gone" for r in results[3:])


def test_a_dead_server_does_not_cost_every_image_its_patience():
    with Stub(Answer({}, delay=30)) as stub:
        start = time.monotonic()
        job = lambda given_up: ask(stub.url, Limits(0.2, 0.3), given_up=given_up)  # noqa: E731
        results = in_parallel([job] * 200, 4)
        assert time.monotonic() - start < 10  # patience for each would take 25
    assert all(isinstance(result, Failure) for result in results)
    assert len(stub.requests) <= 12


def test_waiting_can_be_stopped_from_outside_and_what_is_there_is_kept():
    blocked = threading.Event()
    threading.Timer(0.2, stop_all).start()
    start = time.monotonic()
    results = in_parallel([lambda given_up: 1, lambda given_up: blocked.wait(20), lambda given_up: 3], 2)
    blocked.set()
    assert time.monotonic() - start < 10
    assert results == [1, Failure("it was not asked, because waiting was stopped"), 3]
    assert not parallel.RUNNING


def test_a_check_can_be_interrupted_by_the_hosts_user(monkeypatch):
    class CancelledError(Exception):
        pass

    def check():
        raise CancelledError

    monkeypatch.setattr(waiting, "INTERRUPTS", [check])
    start = time.monotonic()
    with pytest.raises(CancelledError):
        interruptibly(lambda: time.sleep(20))
    assert time.monotonic() - start < 10


def test_a_background_thread_never_asks_the_host_whether_to_stop(monkeypatch):
    monkeypatch.setattr(waiting, "INTERRUPTS", [lambda: pytest.fail("asked")])
    assert in_parallel([lambda given_up: 1], 1) == [1]


def test_requests_under_way_do_not_delay_the_end_of_the_process():
    with Stub(Answer({}, delay=120)) as stub:
        code = (
            "import threading, _thread\n"
            "from densegrpo.engine.rewards.remote.address import connect\n"
            "from densegrpo.engine.rewards.remote.parallel import in_parallel\n"
            "from densegrpo.engine.rewards.remote.patience import Limits\n"
            "from densegrpo.engine.rewards.remote.transport import exchange\n"
            f"server = connect({stub.url!r})\n"
            "job = lambda stop: exchange(server, '/compute', {}, Limits(100, 300), stop)\n"
            "threading.Timer(0.5, _thread.interrupt_main).start()\n"
            "in_parallel([job] * 20, 8)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert b"KeyboardInterrupt" in done.stderr


def test_numbers_that_json_does_not_know_are_not_sent():
    with pytest.raises(ValueError, match="JSON"):
        ask(dead_url(), payload={"x": float("nan")})
