"""How long a server that is away or busy is waited for.

A server may be restarted, or limit its rate, while a run trains for days. What counts is how long it has answered
nobody: a request that waits while others are served is only in a queue, and once a server has been away for too long
the requests after the first need not wait all that time again.
"""

import logging
import random
import time
from datetime import datetime, timedelta
from threading import Lock
from typing import Annotated, NamedTuple

from ...knobs import Knob

TRIES = 3
"""How often a request is made on which a server fails that is there: most likely it always will."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
"""Seconds before the second attempt, doubled each time up to the longest."""
GRACE = 10.0
"""Seconds for a request to a server that has been away for too long already: it may be back."""
QUIET = 5.0
"""Seconds of waiting that nobody needs to hear of."""

Timeout = Annotated[float, Knob(0.1, 3600, "seconds to wait for one answer")]
PatienceOption = Annotated[float, Knob(0, 86400, "seconds to go on trying while the server is away or busy")]

log = logging.getLogger("densegrpo.rewards")


class Limits(NamedTuple):
    """Seconds that are waited."""

    timeout: float
    """For one answer."""
    patience: float
    """For a server that answers nobody; 0: there is one attempt only."""


class RemoteError(RuntimeError):
    """The server gave no answer that can be used."""


class UnreachableError(RemoteError):
    """It kept failing in a way that has nothing to do with the request: others would fail as well."""


class PassingError(RemoteError):
    """One attempt failed; another one may not."""

    def __init__(self, reason: str, wait: float | None = None, *, answered: bool = False):
        super().__init__(reason)
        self.answered = answered
        """Whether the server is there and failed on this request."""
        self.wait = wait
        """Seconds the server asks for; None: it does not say."""


class Absences:
    """Since when servers answer nobody, and who was told. Safe in several threads."""

    def __init__(self):
        self.since: dict[str, float] = {}
        self.told: set[str] = set()
        self.lock = Lock()

    def start(self, url: str, now: float) -> float:
        """When the server's absence began; now, if it was there."""
        with self.lock:
            return min(self.since.setdefault(url, now), now)

    def tell(self, url: str, problem: PassingError, seconds: float) -> None:
        """Log how long it is waited for, once for each absence."""
        with self.lock:
            if url in self.told or url not in self.since:  # another request was answered just now
                return
            self.told.add(url)
        until = f"{datetime.now().astimezone() + timedelta(seconds=seconds):%H:%M:%S}"
        log.warning("reward server %s: no usable answer (%s); trying again until %s (patience)", url, problem, until)

    def over(self, url: str) -> None:
        """The server answers."""
        with self.lock:
            since, told = self.since.pop(url, 0.0), url in self.told
            self.told.discard(url)
        if told:
            log.warning("reward server %s: it answers again, after %.0f s", url, time.monotonic() - since)


ABSENCES = Absences()
"""Of all servers this process asks."""


class Attempts:
    """The attempts of one request."""

    def __init__(self, url: str, limits: Limits):
        self.url, self.limits = url, limits
        self.number = self.failed = 0
        self.first: float | None = None
        """When the first of them had failed."""

    def pause(self, problem: PassingError) -> float | None:
        """Seconds until the next attempt, now that one has failed; None: there shall be none."""
        now = time.monotonic()
        self.number += 1
        self.first = now if self.first is None else self.first
        self.failed += problem.answered
        start = self.first if problem.answered else ABSENCES.start(self.url, now)
        end = max(start + self.limits.patience, self.first + min(GRACE, self.limits.patience))
        if now >= end or self.failed == TRIES:
            return None
        seconds = min(wish(problem, self.number), end - now)
        if not problem.answered and now + seconds - start > QUIET:
            ABSENCES.tell(self.url, problem, end - now)
        return seconds

    def failure(self, path: str, problem: PassingError) -> RemoteError:
        """What is raised when there are no more."""
        times = "one attempt" if self.number == 1 else f"{self.number} attempts"
        if problem.answered:
            return RemoteError(f"{self.url}{path}: no usable answer in {times}; {problem}")
        given = f" (patience {self.limits.patience:g} s)" if self.limits.patience else ""
        return UnreachableError(f"{self.url}{path}: no usable answer in {times}{given}; {problem}")


def wish(problem: PassingError, number: int) -> float:
    """Seconds before the next attempt: those the server asks for, or more each time.

    They are spread, so that not all threads come at once.
    """
    spread = random.SystemRandom().uniform(0.5, 1)  # its own source: a run's random state stays untouched
    if problem.wait is not None:
        return problem.wait + FIRST_PAUSE * spread
    return min(FIRST_PAUSE * 2 ** min(number - 1, 20), LONGEST_PAUSE) * spread
