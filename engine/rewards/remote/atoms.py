"""GenEval's metadata as questions to a judge, one for each thing that was asked for.

The idea is Soft-TIFA of GenEval 2 (arXiv 2512.16853): a vision-language model instead of a detector, and the
probability of the right answer instead of a hard one. The questions here are our own, all answered by yes or no, so
that any class and colour can be named; GenEval 2 takes the geometric mean, here the arithmetic one is the reward.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..geneval import problems

SIDES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
ENDING = "Please answer Yes or No."


class Question(NamedTuple):
    """What is asked about one image."""

    text: str
    expected: bool = True
    """Whether yes is the right answer."""


def atoms(metadata: Mapping[str, Any]) -> list[Question]:
    """The questions of one prompt: counts, colours, relations and exclusions. Raises ValueError for wrong clauses.

    One object of a kind may have company; two or more must be exactly that many, which answers an exclusion of one
    more of them as well.
    """
    wrong = problem_with(metadata)
    if wrong:
        raise ValueError(wrong)
    clauses = metadata["include"]
    exact = {(clause["class"], clause["count"] + 1) for clause in clauses if clause["count"] > 1}
    forbidden = [c for c in metadata.get("exclude", ()) if (c["class"], c["count"]) not in exact]
    asked = [question for clause in clauses for question in included(clause, clauses)]
    asked += [Question(counting(clause, f"{clause['count']} or more"), False) for clause in forbidden]
    return [question._replace(text=f"{question.text} {ENDING}") for question in asked]


def included(clause: Mapping[str, Any], clauses: list[Mapping[str, Any]]) -> Iterator[Question]:
    """The questions of one include clause."""
    name, count = clause["class"], clause["count"]
    yield Question(counting(clause, "at least 1" if count == 1 else f"exactly {count}"))
    if "color" in clause:
        yield Question(f'Look at each "{name}" in this image. Is its colour {clause["color"]}?')
    if "position" in clause:
        relation, other = clause["position"]
        yield Question(f'Is a "{name}" {SIDES[relation]} a "{clauses[other]["class"]}" in this image?')


def counting(clause: Mapping[str, Any], number: str) -> str:
    """A question for how many there are; without plurals, which not every class forms alike."""
    return f'Count what can be called "{clause["class"]}" in this image. Is the number of them {number}?'


def problem_with(metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with the clauses, or None; every class and colour is allowed."""
    lists = [value for key in ("include", "exclude") if isinstance(value := metadata.get(key), list)]
    clauses = [clause for value in lists for clause in value if isinstance(clause, dict)]
    return problems(metadata, words(clauses, "class"), words(clauses, "color"))


def words(clauses: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    """The texts that clauses have there."""
    return sorted({value for clause in clauses if isinstance(value := clause.get(key), str) and value.strip()})
