"""Waiting for others - a server, a person - without becoming deaf to a wish to stop."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import TypeVar

T = TypeVar("T")
INTERRUPTS: list[Callable[[], object]] = []
"""A host appends a function that raises when its user wants to stop; asked several times a second."""
PERIOD = 0.1
"""Seconds between two looks."""


def check_interrupts() -> None:
    """Raise what the host raises when its user wants to stop."""
    for check in INTERRUPTS:
        check()


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether ``done`` became true within that time. Raises what the host raises to stop."""
    end = time.monotonic() + seconds
    while not done():
        check_interrupts()
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(PERIOD, left))
    return True


def result_of(future: "Future[T]") -> T:
    """What a background job returns or raises. Raises what the host raises to stop, and lets the job end alone."""
    while True:
        check_interrupts()
        try:
            return future.result(PERIOD)
        except NotYet:
            if future.done():  # the job itself raised a TimeoutError
                raise
