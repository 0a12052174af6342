"""Prompts made by rule, with the metadata that rewards need; the lists beside this file were written by hand.

Nothing is copied from public sets. A list is known by its seed: a shorter one is the beginning of a longer one, and
every beginning has the wanted mix.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from ..data import Prompt
from ..knobs import suggest
from ..prompts import dump, load_prompts

GENERATORS = {"geneval": ".geneval:KINDS", "text": ".quoted_text:KINDS"}
Record = dict[str, Any]
"""A line of a prompt file: prompt, tag and more."""


class Kind(NamedTuple):
    """All prompts of one tag, numbered."""

    weight: float
    """Its usual share."""
    size: int
    make: Callable[[int], Record]
    """Number below ``size`` -> prompt; no two are equal."""


class Made(NamedTuple):
    """A prompt file and what is in it."""

    text: str
    counts: Mapping[str, int]
    """Tag -> number of prompts."""


def make_file(name: str, count: int, seed: int, tags: str = "", without: str = "") -> Made:
    """The text of a .jsonl file of ``count`` prompts; ``without``: a prompt file or built-in list that shares
    none with it.

    ``tags``: such as ``counting=2,colors=1``; empty for the usual mix. Raises ValueError for unknown names and when
    there are not as many prompts.
    """
    if name not in GENERATORS:
        raise ValueError(
            f"unknown prompt generator {name!r}{suggest(name, GENERATORS)}; known: {', '.join(GENERATORS)}"
        )
    module, _, attribute = GENERATORS[name].partition(":")
    kinds: Mapping[str, Kind] = getattr(import_module(module, __package__), attribute)
    kept_out = load_prompts(without, Path()) if without else []
    records = draw(kinds, weights_of(tags, kinds), count, seed, [prompt.text for prompt in kept_out])
    found = [record["tag"] for record in records]
    prompts = [Prompt(record["prompt"], {k: v for k, v in record.items() if k != "prompt"}) for record in records]
    return Made(dump(prompts), {tag: found.count(tag) for tag in kinds if tag in found})


def weights_of(text: str, kinds: Mapping[str, Kind]) -> dict[str, float]:
    """``counting=2,colors`` -> share of each tag; a tag alone has 1, none named: the usual mix."""
    if not text.strip():
        return {tag: kind.weight for tag, kind in kinds.items() if kind.weight}
    weights: dict[str, float] = {}
    for part in text.split(","):
        tag, _, share = (piece.strip() for piece in part.partition("="))
        if tag not in kinds:
            raise ValueError(f"--tags: unknown tag {tag!r}{suggest(tag, kinds)}; known: {', '.join(kinds)}")
        weights[tag] = share_of(part, share or "1")
    return weights


def share_of(part: str, share: str) -> float:
    """A number above 0."""
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ValueError(f"--tags: {part.strip()!r} must be TAG or TAG=SHARE with a share above 0, such as counting=2")
    return value


def draw(
    kinds: Mapping[str, Kind], weights: Mapping[str, float], count: int, seed: int, without: Iterable[str] = ()
) -> list[Record]:
    """``count`` different prompts; each next one is of the tag that is furthest behind its share.

    When a tag has no more prompts the others go on. Raises ValueError when all are used up.
    """
    if count < 1:
        raise ValueError(f"--count must be above 0, got {count}")
    taken = {normal(prompt) for prompt in without}
    pools = {tag: fresh(kinds[tag], Random(f"{seed} {tag}"), taken) for tag in weights}
    dealt, records = dict.fromkeys(weights, 0), []
    while len(records) < count:
        if not pools:
            raise ValueError(
                f"there are only {len(records)} different prompts with the tags {', '.join(weights)}"
                f"{' that are not in the other file' if taken else ''}, not {count}; ask for fewer, or for more tags"
            )
        tag = min(pools, key=lambda t: (dealt[t] + 1) / weights[t])
        record = next(pools[tag], None)
        if record is None:
            del pools[tag]
        else:
            dealt[tag] += 1
            records.append(record)
    return records


def fresh(kind: Kind, random: Random, taken: set[str]) -> Iterator[Record]:
    """The prompts of one kind that are not taken, in random order."""
    for number in random.sample(range(kind.size), kind.size):
        record = kind.make(number)
        if normal(record["prompt"]) not in taken:
            yield record


def normal(prompt: str) -> str:
    """For comparing prompts: without case and extra spaces."""
    return " ".join(prompt.lower().split())
