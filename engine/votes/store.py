"""Votes on disk, in ``<run>/votes``: a data set that outlives the run.

- ``votes.jsonl``: one line for each answer of a person, complete in itself::

    {"time": "2026-01-31T12:00:00+00:00", "group": "<sha256>", "mode": "like", "prompt": "a red circle",
     "iteration": 3, "images": ["<sha256>", ...], "voter": "k3v...", "ballot": {"likes": [...], "dislikes": []}}

  ``ballot`` is null when the person skipped; in mode ``rank`` it is ``{"order": [best, second, ...]}``. A later line
  of the same voter on the same group replaces the earlier one.
- ``images/<sha256>.png``: every image that was voted on, lossless, named by its pixels.
- ``scores.jsonl``: what ``write_scores`` makes of them, one line for each image of each group::

    {"image": "images/<sha256>.png", "prompt": "a red circle", "score": 0.75, "voters": 2, "group": "<sha256>"}

  ``score`` is in 0..1 (see ballots.py) and comparable within its group only.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..checkpoint import SaveError, flush, write_text
from ..pictures import to_pil
from .ballots import MODES, Ballot, check_ballot, group_scores
from .board import Group, group_id

VOTES, IMAGES, SCORES = "votes.jsonl", "images", "scores.jsonl"
NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Vote:
    """One line of ``votes.jsonl``."""

    time: str
    group: str
    mode: str
    prompt: str
    iteration: int | None
    images: Sequence[str]
    voter: str
    ballot: Ballot | None


class Score(NamedTuple):
    """What people think of one image."""

    image: Path
    prompt: str
    score: float
    """0..1, comparable within the group only."""
    voters: int
    group: str


def encode(image: Tensor) -> tuple[str, bytes]:
    """[3, H, W] in 0..1 -> its name, which is the sha256 of size and 8-bit pixels, and its PNG file."""
    picture, file = to_pil(image), BytesIO()
    picture.save(file, "PNG", compress_level=1)  # thrice as fast as the default, a tenth larger
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest(), file.getvalue()


class Store:
    """The votes of one run.

    Raises ValueError when the file of votes is damaged, SaveError when nothing can be written here.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            (folder / IMAGES).mkdir(parents=True, exist_ok=True)
            drop_cut_off_line(folder / VOTES)
        except OSError as problem:
            raise SaveError(f"could not open {folder} for votes: {problem}; make room for it") from problem
        self.known: dict[str, dict[str, Ballot | None]] = {}
        for vote in read_votes(folder):
            self.known.setdefault(vote.group, {})[vote.voter] = vote.ballot

    def answers(self, group: str) -> Mapping[str, Ballot | None]:
        """Voter -> ballot of what was answered already."""
        return self.known.get(group, {})

    def save(self, group: Group, voter: str, ballot: Ballot | None, files: Mapping[str, bytes]) -> None:
        """Keep an answer, and the images it is about, before it counts. Raises SaveError; nothing is kept then."""
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        vote = Vote(time, group.id, group.mode, group.prompt, group.iteration, list(group.images), voter, ballot)
        try:
            for name in group.images if ballot is not None else ():
                write_image(self.folder / IMAGES / f"{name}.png", files[name])
            append(self.folder / VOTES, json.dumps(asdict(vote)) + "\n")
        except OSError as problem:
            raise SaveError(f"could not save the vote in {self.folder}: {problem}; free some space, vote again") from (
                problem
            )
        self.known.setdefault(group.id, {})[voter] = ballot


def drop_cut_off_line(path: Path) -> None:
    """Remove what a crash left of a last line, so that the next one does not grow on it."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            os.truncate(path, len(whole[0]) + len(whole[1]))


def append(path: Path, line: str) -> None:
    """Add a whole line that is on the disk afterwards, or nothing."""
    with path.open("ab") as file:
        before = file.tell()
        try:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, before)
            raise


def write_image(path: Path, data: bytes) -> None:
    """Write a file in one step, unless it is there: its name says what is in it."""
    if path.exists():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    flush(temporary)
    temporary.replace(path)


def read_votes(folder: Path) -> list[Vote]:
    """All answers, oldest first; a last line cut off by a crash is left out.

    Raises ValueError naming the line that is damaged.
    """
    path = folder / VOTES
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [parse_vote(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def parse_vote(line: str, place: str) -> Vote:
    """One line of ``votes.jsonl``. Raises ValueError when it is not one that ``Store`` wrote."""
    try:
        vote = Vote(**json.loads(line))
        if vote.mode not in MODES or not all(NAME.fullmatch(name) for name in vote.images):
            raise ValueError("unknown mode, or a name that no image has")
        if vote.group != group_id(vote.mode, vote.prompt, vote.images) or not isinstance(vote.voter, str):
            raise ValueError("the group is not that of the prompt and images")
        if vote.ballot is not None:
            check_ballot(vote.mode, vote.images, vote.ballot)
    except (ValueError, TypeError, RecursionError) as problem:
        raise ValueError(f"{place} is no vote ({problem}); remove that line") from None
    return vote


def write_scores(folder: Path) -> Path:
    """Write ``scores.jsonl`` from all votes in ``folder``. Raises ValueError when there are none, SaveError."""
    groups: dict[str, dict[str, Vote]] = {}
    for vote in read_votes(folder):
        groups.setdefault(vote.group, {})[vote.voter] = vote
    rows = [row for answers in groups.values() for row in score_rows(list(answers.values()))]
    if not rows:
        raise ValueError(f"{folder} holds no votes; give the folder of a run in which people voted, such as runs/demo")
    write_text(folder / SCORES, "".join(json.dumps(row) + "\n" for row in rows))
    return folder / SCORES


def score_rows(answers: Sequence[Vote]) -> list[dict[str, Any]]:
    """The lines of one group; none when everybody skipped it."""
    ballots, vote = [answer.ballot for answer in answers if answer.ballot is not None], answers[0]
    if not ballots:
        return []
    known = {"prompt": vote.prompt, "voters": len(ballots), "group": vote.group}
    scores = group_scores(vote.mode, vote.images, ballots)
    return [
        {"image": f"{IMAGES}/{name}.png", "score": score} | known
        for name, score in zip(vote.images, scores, strict=True)
    ]


def read_scores(file: Path) -> list[Score]:
    """A ``scores.jsonl``; the paths lead to its images.

    Raises ValueError naming a line that is damaged, or an image that is missing or outside the folder of the file.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            score = Score(file.parent / row["image"], row["prompt"], float(row["score"]), row["voters"], row["group"])
        except (ValueError, TypeError, KeyError) as problem:
            raise ValueError(f"{file}, line {number} is no score ({problem!r}); write the file again") from None
        if not score.image.resolve().is_relative_to(file.parent.resolve()) or not score.image.is_file():
            raise ValueError(f"{file}, line {number}: {row['image']!r} is no image in the folder of that file")
        found.append(score)
    return found
