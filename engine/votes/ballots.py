"""What one person says of one group of images, and what several of them make of it.

Only order and distance within a group matter, since advantages are normalised within groups.

- ``like``: a liked image counts 1, a disliked one 0, any other 0.5. To pass over an image in a group that one did
  answer is an opinion, too: worse than what was liked, better than what was disliked. Without it (NaN) somebody who
  only marks favourites would leave nothing to compare them with.
- ``rank``: the best images in order of preference; the rest are tied. The best counts 1, the worst 0, places between
  them lie evenly, and tied images share the mean of the places they take. So a group's mean is always 0.5: raw
  scores show no progress, evaluate another reward beside it for that.

Several voters are averaged. A ballot without any mark is refused: it says nothing that skipping does not say.
"""

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any

Ballot = Mapping[str, Sequence[str]]
"""Part of the ballot -> names of images."""
PARTS = {"like": ("likes", "dislikes"), "rank": ("order",)}
"""Mode -> parts of its ballots."""
MODES = tuple(PARTS)


def check_ballot(mode: str, images: Sequence[str], data: Any) -> Ballot:
    """The ballot that came from outside, with all its parts. Raises ValueError for one that no page would send."""
    parts = PARTS[mode]
    if not isinstance(data, dict) or not data.keys() <= set(parts):
        raise ValueError(f"a ballot of mode {mode!r} has the parts {', '.join(parts)} and no others")
    ballot = {part: data.get(part, []) for part in parts}
    if not all(isinstance(names, list) for names in ballot.values()):
        raise ValueError(f"the parts of a ballot ({', '.join(parts)}) must be lists of image names")
    marked = [name for names in ballot.values() for name in names]
    if not marked:
        raise ValueError("the ballot is empty; mark at least one image, or skip the group")
    if not all(isinstance(name, str) and name in images for name in marked):
        raise ValueError("the ballot names an image that is not in this group")
    if len(set(marked)) < len(marked):
        raise ValueError("the ballot names an image twice")
    return ballot


def ballot_scores(mode: str, images: Sequence[str], ballot: Ballot) -> list[float]:
    """The score of each image in 0..1."""
    if mode == "like":
        worth = dict.fromkeys(ballot["likes"], 1.0) | dict.fromkeys(ballot["dislikes"], 0.0)
        return [worth.get(name, 0.5) for name in images]
    last, num_ranked = len(images) - 1, len(ballot["order"])
    place = {name: float(i) for i, name in enumerate(ballot["order"])}
    return [1 - place.get(name, (num_ranked + last) / 2) / last if last else 0.5 for name in images]


def group_scores(mode: str, images: Sequence[str], ballots: Sequence[Ballot]) -> list[float]:
    """The mean over voters for each image; the order of voters cannot matter, not even by a rounding."""
    columns = zip(*(ballot_scores(mode, images, ballot) for ballot in ballots), strict=True)
    return [fsum(column) / len(ballots) for column in columns]
