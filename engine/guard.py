"""Guard against reward hacking: the trained reward rises while a reward that is not trained on falls.

Every evaluation makes its images from the same prompts and noise, so two of them are compared image by image, and a
change counts when it is larger than its own uncertainty.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import write_text

FILE = "evaluations.jsonl"
SIGMAS = 3.0
"""A change counts when its mean is this many standard errors from 0.

The best of all evaluations so far is what a fall is measured from, and the best of many is partly luck: with 3 and two
in a row, 20 evaluations of a reward that only fluctuates give an alarm in 1 % of simulated runs; with 2, in 29 %.
"""

FEWEST = 8
"""Images in both evaluations that a comparison needs: the spread of fewer says little."""


class Snapshot(NamedTuple):
    """One evaluation."""

    iteration: int
    scores: Mapping[str, Sequence[float | None]]
    """Label -> [N] scores of the same prompts and noise each time; None = no score."""


class Guard:
    """Watches the evaluations of a run; ``trained`` and ``held_out``: label -> weight."""

    def __init__(self, trained: Mapping[str, float], held_out: Mapping[str, float], in_a_row: int):
        self.trained, self.held_out, self.in_a_row = trained, held_out, in_a_row
        self.history: list[Snapshot] = []

    def load(self, folder: Path, until: int) -> None:
        """The evaluations of a run so far; later ones than iteration ``until`` are to be repeated and are dropped."""
        path = folder / FILE
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}\n")]
        self.history = [Snapshot(row["iteration"], row["scores"]) for row in rows if row["iteration"] <= until]

    def save(self, folder: Path) -> None:
        """Write them all, whole or not at all. Raises SaveError."""
        rows: list[dict[str, Any]] = [snapshot._asdict() for snapshot in self.history]
        write_text(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, iteration: int, scores: Mapping[str, Tensor], *, last: bool = False) -> list[str]:
        """One more evaluation: what it alarms about, a sentence each. ``last``: none will follow."""
        known = {label: [x if x == x else None for x in values.tolist()] for label, values in scores.items()}
        self.history = [s for s in self.history if s.iteration < iteration] + [Snapshot(iteration, known)]
        needed = min(self.in_a_row, len(self.history) - 1) if last else self.in_a_row
        if not 0 < needed < len(self.history):
            return []
        found = (self.fall(label, needed) for label in self.held_out)
        return [alarm for alarm in found if alarm]

    def fall(self, label: str, needed: int) -> str | None:
        """What to say when the last ``needed`` evaluations are worse than the best before them and train higher."""
        sign = -1.0 if self.held_out[label] < 0 else 1.0
        after = self.history[-needed:]
        before = [old for old in self.history[:-needed] if all(enough(old, now, label) for now in after)]
        if not before:
            return None
        best = min(before, key=lambda old: sign * mean(differences(old, after[-1], label)))
        if not all(change(best, now, label) * sign < -SIGMAS and self.risen(best, now) for now in after):
            return None
        risen = [course(best, after[-1], name) for name in self.rising(best, after[-1])]
        how = " and ".join(risen) if risen else "people's votes were trained on"
        return (
            f"{course(best, after[-1], label)} between iterations {best.iteration} and {after[-1].iteration} "
            f"while {how}: the reward is being gamed"
        )

    def unjudged(self) -> list[str]:
        """Of which rewards the newest evaluation and those before it share too few images to tell, a sentence each."""
        if not (self.held_out and self.in_a_row and len(self.history) > 1):
            return []
        *before, newest = self.history
        watched = [label for label in (*self.held_out, *self.trained) if label in newest.scores]
        most = {label: max(len(shared(old, newest, label)) for old in before) for label in watched}
        return [
            f"{label} has scores of {count} images that an earlier evaluation scored too: too few to tell whether a "
            f"reward is gamed; mend the reward, or make at least {FEWEST} held-out images"
            for label, count in most.items()
            if count < FEWEST
        ]

    def risen(self, old: Snapshot, new: Snapshot) -> bool:
        """Whether any trained reward improved; True when none of them is evaluated, as people's votes."""
        return not self.evaluated(old) or bool(self.rising(old, new))

    def rising(self, old: Snapshot, new: Snapshot) -> list[str]:
        """The trained rewards that improved."""
        both = [(label, weight) for label, weight in self.evaluated(old).items() if enough(old, new, label)]
        return [label for label, weight in both if change(old, new, label) * (-1 if weight < 0 else 1) > SIGMAS]

    def evaluated(self, snapshot: Snapshot) -> dict[str, float]:
        """The trained rewards that evaluations have, with their weights; people's votes are none."""
        return {label: weight for label, weight in self.trained.items() if label in snapshot.scores}

    def gain(self, old: Snapshot, new: Snapshot) -> float:
        """Weighted sum of the mean changes of held-out rewards, on images that both have scores of; NaN without any."""
        if not self.held_out or not all(enough(old, new, label) for label in self.held_out):
            return float("nan")
        return sum(weight * mean(differences(old, new, label)) for label, weight in self.held_out.items())

    def is_best(self) -> bool:
        """Whether the newest evaluation beats all before it, the untrained model included, on held-out rewards."""
        *before, newest = self.history
        gains = [self.gain(old, newest) for old in before]
        return any(gain == gain for gain in gains) and not any(gain <= 0 for gain in gains)


def shared(old: Snapshot, new: Snapshot, label: str) -> list[tuple[float, float]]:
    """Both scores of each image that both have one of; none when a configuration changed which images there are."""
    pair = old.scores.get(label, ()), new.scores.get(label, ())
    if len(pair[0]) != len(pair[1]):
        return []
    return [(a, b) for a, b in zip(*pair, strict=True) if a is not None and b is not None]


def differences(old: Snapshot, new: Snapshot, label: str) -> list[float]:
    """Of each image that both have a score of."""
    return [b - a for a, b in shared(old, new, label)]


def course(old: Snapshot, new: Snapshot, label: str) -> str:
    """How the mean of the images that both have a score of went."""
    before, after = (mean(scores) for scores in zip(*shared(old, new, label), strict=True))
    return f"{label} went from {before:.3f} to {after:.3f}"


def enough(old: Snapshot, new: Snapshot, label: str) -> bool:
    """Whether both scored as many of the same images as a comparison needs: ``FEWEST``, or all when there are fewer."""
    count = len(shared(old, new, label))
    return count > 0 and count >= min(FEWEST, len(new.scores[label]))


def change(old: Snapshot, new: Snapshot, label: str) -> float:
    """Mean change of a reward in standard errors; infinite when all images change alike, 0 for a handful of images."""
    found = torch.tensor(differences(old, new, label), dtype=torch.float64)
    if len(found) < FEWEST:
        return 0.0
    average, error = found.mean().item(), found.std().item() / len(found) ** 0.5
    return average / error if error > 0 else average * float("inf") if average else 0.0


def mean(scores: Sequence[float]) -> float:
    """Of all."""
    return sum(scores) / len(scores)
