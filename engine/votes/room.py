"""Where one run and the people who vote on its images meet."""

import logging
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..metrics import last_row
from ..waiting import INTERRUPTS, check_interrupts, wait_until
from .ballots import Ballot
from .board import Board, Group
from .server import serve
from .store import Store

log = logging.getLogger("densegrpo.votes")


class Host(NamedTuple):
    """Something that shows the page itself, such as ComfyUI."""

    where: str
    """Tells a user where to vote."""
    changed: Callable[[], object]
    """Tells open pages to look again."""
    stop: Callable[[], object]
    """Ends the run as if its user cancelled it: ``waiting.check_interrupts`` raises soon after."""


HOSTS: list[Host] = []
"""A host appends itself; without one, a run opens a small page of its own."""
ROOMS: list["Room"] = []
"""Runs that ask for votes now, newest last."""


class Room:
    """The board, store and images of a run."""

    def __init__(self, folder: Path):
        """``folder``: of the run. Raises ValueError or SaveError when its votes cannot be read or kept."""
        self.folder, self.store = folder, Store(folder / "votes")
        self.board = Board(self.record, announce)
        self.key = secrets.token_hex(16)
        """Only a page of this run can stop it."""
        self.files: dict[str, bytes] = {}
        """Name -> PNG of what is asked about now."""
        self.late: dict[str, bytes] = {}
        """What was asked about before: a page may be loading it at the moment somebody else closes the last group."""
        self.stopped = False

    def record(self, group: Group, voter: str, ballot: Ballot | None) -> None:
        """Keep an answer on disk before it counts."""
        self.store.save(group, voter, ballot, self.files)

    def ask(self, sheets: Iterator[tuple[Group, Mapping[str, bytes]]]) -> Mapping[str, Sequence[Ballot]]:
        """Show groups as they come and wait until all are settled; returns group -> ballots, none when skipped.

        Groups that were answered before are not shown again. Raises KeyboardInterrupt or Interrupted to stop.
        """
        check_interrupts()
        try:
            for group, files in sheets:
                self.files |= files
                self.board.put(group, self.store.answers(group.id))
            wait_until(self.board.settled, math.inf)
        finally:
            answers = self.board.take_down()
            self.late, self.files = self.files, {}  # in this order: pages look meanwhile
        return {group: [b for b in ballots.values() if b is not None] for group, ballots in answers.items()}

    def image(self, name: str) -> bytes | None:
        """The PNG of that name, if it is or was just asked about. The name never becomes a path."""
        return self.files.get(name) or self.late.get(name)

    def state(self, voter: str, showing: str | None = None) -> dict[str, Any]:
        """What a page of that voter shows; ``showing`` is the group on it."""
        view = self.board.view(voter, showing)
        state = "stopping" if self.stopped else "voting" if view["open"] else "waiting"
        return {"state": state, "run": self.folder.name, "key": self.key, **view}

    def stop(self) -> None:
        """A person wants the run to end; what was learnt is saved by whoever runs it."""
        self.stopped = True
        for host in HOSTS:
            host.stop()
        announce()

    def check_stop(self) -> None:
        """Raise KeyboardInterrupt, as Ctrl-C would, when a person pressed Stop and no host sees to it."""
        if self.stopped and not HOSTS:
            raise KeyboardInterrupt

    def next_iteration(self) -> int | None:
        """The iteration that the run works on, by its metrics; None when there are none."""
        row = last_row(self.folder)
        return row["iteration"] + 1 if row and "iteration" in row else None


def announce() -> None:
    """Tell the pages of hosts to look again."""
    for host in HOSTS:
        host.changed()


@contextmanager
def open_room(folder: Path, port: int) -> Iterator[Room]:
    """The room of the run in ``folder``; its page is shown by a host, or on ``port`` of this machine.

    Several rewards of one run share it. Raises ValueError or SaveError as ``Room`` does.
    """
    shared = [room for room in ROOMS if room.folder == folder]
    if shared:
        yield shared[0]
        return
    room = Room(folder)
    ROOMS.append(room)
    INTERRUPTS.append(room.check_stop)
    try:
        if HOSTS:
            log.warning("people are asked to vote on images: %s", ", ".join(host.where for host in HOSTS))
            yield room
        else:
            with serve(room, port) as address:
                log.warning("people are asked to vote on images: open %s in a browser on this machine", address)
                yield room
    finally:
        INTERRUPTS.remove(room.check_stop)
        ROOMS.remove(room)
        announce()
