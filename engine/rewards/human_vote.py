"""People judge the images while a run trains, on a page of their own or in the host's."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch

from ..knobs import Choice, Knob
from ..protocols import RewardBatch, RewardResult
from ..votes.ballots import MODES, group_scores
from ..votes.board import Group, group_id
from ..votes.room import Room, open_room
from ..votes.store import encode

NOT_HERE = "human votes are asked for in training only; score images with another reward"


class Sheet(NamedTuple):
    """The images of one group."""

    prompt: str
    rows: Sequence[int]
    """Their indices in the batch."""
    names: Sequence[str]
    """Name of each; equal images have one name."""
    files: Mapping[str, bytes]
    """Name -> PNG."""

    @property
    def images(self) -> list[str]:
        """Each image once, in an order that says nothing about how it came to be."""
        return sorted(self.files)


@dataclass(frozen=True, slots=True)
class HumanVote:
    """People like or rank the images of a group, on a web page while training waits for them.

    Scores are 0..1 and compare images of one group only, see votes/ballots.py. A group that nobody votes on in time,
    or that is skipped, has no score and teaches nothing. Votes are kept in the run's folder, see votes/store.py:
    after a crash nobody is asked the same twice.
    """

    interactive: ClassVar[bool] = True

    mode: Annotated[str, Choice(MODES, "like: mark good and bad images, rank: order the best ones")] = "like"
    timeout: Annotated[int, Knob(1, 604_800, "seconds without a sign of life until open groups are skipped")] = 600
    min_voters: Annotated[int, Knob(1, 100, "people who must answer before a group is closed")] = 1
    port: Annotated[int, Knob(0, 65535, "of the page on this machine, outside ComfyUI; 0: any free one")] = 8189
    rooms: list[Room] = field(default_factory=list, init=False, repr=False, compare=False)
    """The room of the run that goes on, if one does."""

    @contextmanager
    def session(self, folder: Path) -> Iterator[None]:
        """Ask people while the run in ``folder`` is trained.

        Raises ValueError when its stored votes are damaged, SaveError when votes cannot be kept there.
        """
        with open_room(folder, self.port) as room:
            self.rooms.append(room)
            try:
                yield
            finally:
                self.rooms.remove(room)

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Wait for people's scores of every image; those of groups that nobody voted on are skipped.

        Raises KeyboardInterrupt when somebody presses Stop, Interrupted when that is a host's business.
        """
        scores = torch.full((len(batch.prompts),), torch.nan)
        if not self.rooms:
            return RewardResult(scores, errors=dict.fromkeys(range(len(scores)), NOT_HERE))
        room, sheets, skipped = self.rooms[-1], [], set()
        ballots = room.ask(self.groups(batch, room.next_iteration(), sheets))
        for group, sheet in sheets:
            given = ballots[group]
            if not given:
                skipped.update(sheet.rows)
                continue
            worth = dict(zip(sheet.images, group_scores(self.mode, sheet.images, given), strict=True))
            scores[list(sheet.rows)] = torch.tensor([worth[name] for name in sheet.names])
        return RewardResult(scores, skipped=frozenset(skipped))

    def groups(
        self, batch: RewardBatch, iteration: int | None, sheets: list[tuple[str, Sheet]]
    ) -> Iterator[tuple[Group, Mapping[str, bytes]]]:
        """Each group as soon as its images are encoded, which takes a while; noted in ``sheets``, too."""
        members = rows_of(batch)
        for number, rows in enumerate(members, 1):
            sheet = make_sheet(batch, rows)
            group = group_id(self.mode, sheet.prompt, sheet.images)
            sheets.append((group, sheet))
            place, terms = (number, len(members), iteration), (self.min_voters, float(self.timeout))
            yield Group(group, self.mode, sheet.prompt, sheet.images, *place, *terms), sheet.files

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Any prompt will do."""
        return []


def rows_of(batch: RewardBatch) -> list[list[int]]:
    """The indices of each group, in order; images of one prompt when groups are not known."""
    numbers = range(len(batch.prompts))
    keys = batch.prompts if batch.groups is None else batch.groups.tolist()
    return [[i for i in numbers if keys[i] == key] for key in dict.fromkeys(keys)]


def make_sheet(batch: RewardBatch, rows: Sequence[int]) -> Sheet:
    """One group, encoded."""
    encoded = [encode(image) for image in batch.images[list(rows)]]
    return Sheet(batch.prompts[rows[0]], rows, [name for name, _ in encoded], dict(encoded))
