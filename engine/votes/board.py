"""The groups that wait for votes. Safe in several threads; knows nothing of files or the web."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from .ballots import Ballot, check_ballot

PRESENCE = 5.0
"""Seconds for which a page that got a group is taken to show it still."""


class ClosedError(Exception):
    """The group is not open any more: answered elsewhere, skipped, or timed out."""


@dataclass(frozen=True, slots=True)
class Group:
    """Images of one prompt, and how they are asked about."""

    id: str
    """See ``group_id``."""
    mode: str
    prompt: str
    images: Sequence[str]
    """Names of the distinct images."""
    number: int
    """Counted from 1 within its iteration."""
    total: int
    """Groups of that iteration."""
    iteration: int | None
    """None: not known."""
    needed: int
    """People who must answer."""
    seconds: float
    """Time without a sign of life after which it is closed."""


def group_id(mode: str, prompt: str, images: Sequence[str]) -> str:
    """The same for the same images in any order, in another process too."""
    return hashlib.sha256(json.dumps([mode, prompt, sorted(images)]).encode()).hexdigest()


@dataclass(slots=True)
class Case:
    """A group and its answers so far."""

    group: Group
    opened: float
    answers: dict[str, Ballot | None] = field(default_factory=dict)
    """Voter -> ballot; None: skipped."""


class Board:
    """Groups are put up, people answer, the training thread waits until all are settled and takes the answers down.

    A group is settled when ``needed`` people answered, skipping included, or when nobody gave a sign of life for
    ``seconds``; then what answers there are count. There is one clock for all groups: whoever works on the first
    one keeps the others from running out.
    """

    def __init__(
        self,
        record: Callable[[Group, str, Ballot | None], object] = lambda group, voter, ballot: None,
        changed: Callable[[], object] = lambda: None,
        now: Callable[[], float] = time.monotonic,
    ):
        """``record`` keeps an answer before it counts (when it raises, it does not); ``changed``: look again."""
        self.record, self.changed, self.now = record, changed, now
        self.lock = RLock()
        self.open: dict[str, Case] = {}
        self.settled_answers: dict[str, Mapping[str, Ballot | None]] = {}
        self.showing: dict[str, tuple[str, float]] = {}
        """Voter -> (group on the page, when it last asked)."""
        self.alive = now()
        """Last sign of life."""

    def put(self, group: Group, answers: Mapping[str, Ballot | None]) -> None:
        """Ask about a group, once if it is put up twice; ``answers`` were given before, e.g. ahead of a crash."""
        with self.lock:
            self.open[group.id] = Case(group, self.now(), dict(answers))
            self.settle()
        self.changed()

    def answer(self, voter: str, group: str, data: Any) -> None:
        """Take a ballot, or None to skip; a later one of the same voter replaces the earlier.

        Raises ClosedError when it comes too late, ValueError for an impossible ballot, and what ``record`` raises.
        """
        with self.lock:
            self.settle()
            case = self.open.get(group)
            if case is None:
                raise ClosedError("this group is closed already")
            ballot = None if data is None else check_ballot(case.group.mode, case.group.images, data)
            self.record(case.group, voter, ballot)
            case.answers[voter] = ballot
            self.alive = self.now()
            self.settle()
        self.changed()

    def move(self) -> None:
        """Somebody is here: the clock starts again."""
        with self.lock:
            self.settle()
            self.alive = self.now()

    def settle(self) -> None:
        """Close what has enough answers or ran out of time."""
        for case in list(self.open.values()):
            if len(case.answers) >= case.group.needed or self.left(case) <= 0:
                self.settled_answers[case.group.id] = self.open.pop(case.group.id).answers

    def left(self, case: Case) -> float:
        """Seconds until the group is closed."""
        return max(self.alive, case.opened) + case.group.seconds - self.now()

    def settled(self) -> bool:
        """Whether no group is open any more."""
        with self.lock:
            self.settle()
            return not self.open

    def take_down(self) -> Mapping[str, Mapping[str, Ballot | None]]:
        """Close everything and forget it; returns group -> voter -> ballot of what was settled."""
        with self.lock:
            found = self.settled_answers
            self.open, self.settled_answers, self.showing = {}, {}, {}
        self.changed()
        return found

    def view(self, voter: str, showing: str | None) -> dict[str, Any]:
        """What a page of that voter, on which group ``showing`` is, has to show now, and how much comes after it."""
        with self.lock:
            self.settle()
            mine = [case for case in self.open.values() if voter not in case.answers]
            chosen = self.choose(voter, showing, mine)
            if chosen:
                self.showing[voter] = (chosen.group.id, self.now())
            following = next((case.group.images for case in mine if case is not chosen), ())
            return {
                "open": len(self.open),
                "mine": len(mine),
                "group": chosen and self.describe(chosen),
                "next": list(following),
            }

    def choose(self, voter: str, showing: str | None, mine: Sequence[Case]) -> Case | None:
        """One of ``mine``: what the page has, else what nobody else works on, unless several people must answer."""
        now = self.now()
        self.showing = {v: seen for v, seen in self.showing.items() if now - seen[1] < PRESENCE}
        held = (showing, self.showing.get(voter, (None, 0))[0])
        taken = {group for group, _ in self.showing.values()}
        kept = [case for group in held for case in mine if case.group.id == group]
        free = [case for case in mine if case.group.needed > 1 or case.group.id not in taken]
        return next(iter([*kept, *free, *mine]), None)

    def describe(self, case: Case) -> dict[str, Any]:
        """A group for a page."""
        parts = ("id", "mode", "prompt", "number", "total", "iteration", "needed", "seconds")
        known = {part: getattr(case.group, part) for part in parts}
        return known | {
            "images": list(case.group.images),
            "answers": len(case.answers),
            "left": round(self.left(case), 1),
        }
