"""Waiting for others without becoming deaf."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
from densegrpo.engine import waiting
from densegrpo.engine.rewards.remote.patience import Absences, PassingError
from densegrpo.engine.waiting import Interrupted, Worker, check_interrupts, result_of, wait_until


class CancelledError(Exception):
    """What a host raises."""


@pytest.fixture
def cancel(monkeypatch):
    """Set it, and the host's user wants to stop."""
    wish = threading.Event()

    def check():
        if wish.is_set():
            wish.clear()  # as ComfyUI does
            raise CancelledError

    monkeypatch.setattr(waiting, "INTERRUPTS", [check])
    return wish


def test_it_waits_until_something_happens():
    event = threading.Event()
    threading.Timer(0.2, event.set).start()
    assert wait_until(event.is_set, 10)


def test_it_gives_up_in_time():
    start = time.monotonic()
    assert not wait_until(lambda: False, 0.3)
    assert 0.3 <= time.monotonic() - start < 5


def test_a_wish_to_stop_is_heard_while_waiting(cancel):
    threading.Timer(0.2, cancel.set).start()
    with pytest.raises(Interrupted) as stop:
        wait_until(lambda: False, 10)
    assert isinstance(stop.value.reason, CancelledError)


def test_a_wish_to_stop_is_heard_while_a_job_is_at_work(cancel):
    worker, never = Worker(), threading.Event()
    job = worker.submit(lambda: never.wait(30))
    threading.Timer(0.2, cancel.set).start()
    with pytest.raises(Interrupted):
        result_of(job)
    never.set()


def test_no_except_exception_takes_the_wish_for_a_failure(cancel):
    cancel.set()

    def careless():
        try:
            check_interrupts()
        except Exception:
            pytest.fail("it was swallowed")

    with pytest.raises(Interrupted):
        careless()


def test_jobs_are_done_in_order_and_their_results_kept():
    worker, done = Worker(), []
    futures = [worker.submit(lambda i=i: (done.append(i), i * i)[1]) for i in range(5)]
    assert [result_of(future) for future in futures] == [0, 1, 4, 9, 16]
    assert done == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("problem", [ValueError("no"), TimeoutError("late"), KeyboardInterrupt()])
def test_what_a_job_raises_is_raised_where_its_result_is_asked_for(problem):
    def fail():
        raise problem

    worker = Worker()
    failing, next_one = worker.submit(fail), worker.submit(lambda: "well")
    with pytest.raises(type(problem)):
        result_of(failing)
    assert result_of(next_one) == "well"


def test_a_closed_worker_drops_what_has_not_begun():
    worker, begin, done = Worker(), threading.Event(), []
    first = worker.submit(lambda: begin.wait(10))
    second = worker.submit(lambda: done.append(2))
    assert wait_until(first.running, 5)
    worker.close()
    begin.set()
    assert result_of(first)
    assert wait_until(second.cancelled, 5)
    time.sleep(0.1)
    assert not done


def test_a_job_that_failed_is_forgotten_with_its_failure():
    """It may hold many images; the garbage collector may be a long time coming."""

    class Job:
        def __call__(self):
            raise ValueError("no")

    def ask(job):
        worker = Worker()
        try:
            worker.submit(job).result(10)
        finally:
            worker.close()

    def asked():
        job = Job()
        with pytest.raises(ValueError, match="no"):
            ask(job)
        return weakref.ref(job)

    gc.disable()
    try:
        left = asked()
        assert wait_until(lambda: left() is None, 5)
    finally:
        gc.enable()


def test_an_absence_that_ended_meanwhile_is_not_told(caplog):
    absences = Absences()
    absences.start("http://127.0.0.1:1", 0.0)
    absences.over("http://127.0.0.1:1")  # another request was answered
    absences.tell("http://127.0.0.1:1", PassingError("HTTP 503"), 100)
    absences.over("http://127.0.0.1:1")
    assert not caplog.text


def test_the_process_ends_while_a_job_is_still_at_work():
    code = "import time; from densegrpo.engine.waiting import Worker; Worker().submit(lambda: time.sleep(60))"
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert time.monotonic() - start < 30
