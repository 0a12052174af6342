"""Waiting for others - a server, a person - without becoming deaf to a wish to stop."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")
INTERRUPTS: list[Callable[[], object]] = []
"""A host appends a function that raises when its user wants to stop; asked several times a second."""
PERIOD = 0.1
"""Seconds between two looks."""


class Interrupted(BaseException):
    """The host's user wants to stop. No ``except Exception`` on the way may take it for a failure."""

    def __init__(self, reason: BaseException):
        super().__init__(str(reason))
        self.reason = reason
        """What the host raised, and wants to see again."""


def check_interrupts() -> None:
    """Raise Interrupted when the host's user wants to stop."""
    try:
        for check in INTERRUPTS:
            check()
    except Exception as reason:
        raise Interrupted(reason) from None


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether ``done`` became true within that time. Raises Interrupted."""
    end = time.monotonic() + seconds
    while not done():
        check_interrupts()
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(PERIOD, left))
    return True


def result_of(future: "Future[T]") -> T:
    """What a background job returns or raises. Raises Interrupted and then lets the job end alone."""
    while True:
        check_interrupts()
        try:
            return future.result(PERIOD)
        except NotYet:
            if future.done():  # the job itself raised a TimeoutError
                raise


class Worker:
    """A background thread that does jobs one after the other. The process may end before they are done."""

    def __init__(self):
        self.jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self.waiting: list[Future[Any]] = []
        # Not an executor of the library: the interpreter would wait for its threads, and a server may take minutes.
        Thread(target=self.work, daemon=True).start()

    def submit(self, job: Callable[[], T]) -> "Future[T]":
        """Do it after those before."""
        future: Future[Any] = Future()
        self.waiting.append(future)
        self.jobs.put((future, job))
        return future

    def close(self) -> None:
        """Drop the jobs that have not begun."""
        for future in self.waiting:
            future.cancel()
        self.waiting.clear()
        self.jobs.put(None)

    def work(self) -> None:
        """What the thread does."""
        while (item := self.jobs.get()) is not None:
            future, job = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as problem:  # it is raised where the result is asked for
                future.set_exception(problem)
            del item, future, job  # the traceback has this frame: exception and job would keep each other
