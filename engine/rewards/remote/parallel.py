"""Several requests at a time, in threads that nobody has to wait for."""

from collections.abc import Callable, Iterator, Sequence
from threading import Event, Lock, Thread
from typing import Annotated, Generic, NamedTuple, TypeVar

from ...knobs import Knob
from ...waiting import PERIOD, Interrupted, Worker, result_of
from .patience import UnreachableError

Workers = Annotated[int, Knob(1, 256, "requests at a time")]
T = TypeVar("T")


class Failure(NamedTuple):
    """Why there is no answer."""

    reason: str


class Work(Generic[T]):
    """Jobs that daemon threads do; whoever waits for them can leave at any time."""

    def __init__(self, jobs: Sequence[Callable[[Event], T]]):
        self.jobs = jobs
        self.results: list[T | Failure] = [Failure("it was not asked, because waiting was stopped")] * len(jobs)
        self.indices: Iterator[int] = iter(range(len(jobs)))
        self.missing = len(jobs)
        self.lock = Lock()
        self.outage = ""
        """Why asking any further is of no use."""
        self.given_up = Event()
        """No new attempts."""
        self.ended = Event()
        """Nothing is waited for any more."""

    def labour(self) -> None:
        """Do one job after the other: what each thread runs."""
        while True:
            with self.lock:
                index = next(self.indices, None)
            if index is None:
                return
            result = self.result(self.jobs[index])
            with self.lock:
                if not self.ended.is_set():
                    self.results[index] = result
                    self.missing -= 1
                    if not self.missing:
                        self.ended.set()

    def result(self, job: Callable[[Event], T]) -> T | Failure:
        """What a job returns, or why it does not. After the first outage the rest is not even tried."""
        if self.given_up.is_set():
            return Failure(f"it was not asked, because another request failed: {self.outage}")
        try:
            return job(self.given_up)
        except UnreachableError as problem:
            self.outage = self.outage or str(problem)
            self.given_up.set()
            return Failure(str(problem))
        except Exception as problem:  # what a stranger sends must not end the thread that the others wait for
            return Failure(
                str(problem) if isinstance(problem, RuntimeError) else f"{type(problem).__name__}: {problem}"
            )

    def stop(self) -> None:
        """Do not wait for what is under way."""
        with self.lock:
            self.given_up.set()
            self.ended.set()


RUNNING: set[Work] = set()
RUNNING_LOCK = Lock()


def in_parallel(jobs: Sequence[Callable[[Event], T]], workers: int) -> list[T | Failure]:
    """What each job returns or why it fails, in the order of ``jobs``, ``workers`` at a time.

    A job gets the event that tells it to give up. Safe in any thread, and never raises what a host raises to stop: a
    background thread must not; ``stop_all`` ends the waiting instead.
    """
    work = Work(jobs)
    if not jobs:
        return []
    with RUNNING_LOCK:
        RUNNING.add(work)
    try:
        for _ in range(min(workers, len(jobs))):
            Thread(target=work.labour, name="densegrpo-reward", daemon=True).start()
        while not work.ended.wait(PERIOD):  # without a period Ctrl-C would not be noticed on Windows
            pass
    finally:
        work.stop()
        with RUNNING_LOCK:
            RUNNING.discard(work)
    return list(work.results)


def stop_all() -> None:
    """Let every reward that waits for a server return at once, with what it has.

    For whoever asked in the background and was interrupted; a thread that waits in vain would delay the exit.
    """
    with RUNNING_LOCK:
        for work in RUNNING:
            work.stop()


def interruptibly(job: Callable[[], T]) -> T:
    """What ``job`` returns or raises, done in a daemon thread. Raises what the host raises to stop."""
    worker = Worker()
    try:
        return result_of(worker.submit(job))
    except Interrupted as stop:
        raise stop.reason from None
    finally:
        worker.close()
