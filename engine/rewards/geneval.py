"""GenEval's rules (Ghosh et al., arXiv 2310.11513): is what was detected what the prompt asked for?

Independent of the detector. As in Flow-GRPO's reward server a count must be exact. Unlike there, the partial
count is never negative, a wrong relation is one failed part, and ``exclude`` counts for strict.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

RELATIONS = ("left of", "right of", "above", "below")


class Detection(NamedTuple):
    """One object; the best comes first in a list of them."""

    name: str
    color: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in any unit; y points down."""


class Verdict(NamedTuple):
    """Both scores in 0..1."""

    strict: float
    """1 when everything holds, else 0."""
    partial: float
    """Mean over all counts, colours and relations that were asked for."""


def judge(found: Sequence[Detection], metadata: Mapping[str, Any]) -> Verdict:
    """Score detections against the clauses of ``metadata``."""
    clauses = metadata["include"]
    chosen = [[d for d in found if d.name == c["class"]] for c in clauses]
    parts = []
    for clause, objects in zip(clauses, chosen, strict=True):
        count = clause["count"]
        parts.append(max(0.0, 1 - abs(count - len(objects)) / count))
        if "color" in clause:
            parts.append(min(sum(d.color == clause["color"] for d in objects[:count]), count) / count)
        if "position" in clause:
            relation, other = clause["position"]
            targets = chosen[other][: clauses[other]["count"]]
            pairs = [(a, b) for a in objects[:count] for b in targets]
            parts.append(float(bool(pairs) and all(relation in relations(a, b) for a, b in pairs)))
    forbidden = any(sum(d.name == c["class"] for d in found) >= c["count"] for c in metadata.get("exclude", ()))
    return Verdict(float(min(parts) == 1 and not forbidden), sum(parts) / len(parts))


def relations(a: Detection, b: Detection) -> set[str]:
    """How ``a`` lies to ``b``: nothing when they overlap too much; two relations on a diagonal."""
    offset, reach = [], []
    for low, high in ((0, 2), (1, 3)):
        offset.append((a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2)
        reach.append(a.box[high] - a.box[low] + b.box[high] - b.box[low])
    beyond = [max(abs(o) - 0.1 * r, 0.0) * (1 if o > 0 else -1) for o, r in zip(offset, reach, strict=True)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    dx, dy = (value / length for value in beyond)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {relation for relation, true in zip(RELATIONS, holds, strict=True) if true}


def problems(metadata: Mapping[str, Any], names: Sequence[str], colors: Sequence[str]) -> str | None:
    """What is wrong with a prompt's clauses, or None."""
    clauses, exclude = metadata.get("include"), metadata.get("exclude", [])
    if not isinstance(clauses, list) or not clauses:
        return "it has no 'include' clauses; use a .jsonl file with GenEval metadata, or prompts such as 'a red circle'"
    if not isinstance(exclude, list):
        return f"'exclude' {exclude!r} is not a list of clauses"
    for index, clause in enumerate([*clauses, *exclude]):
        if not isinstance(clause, dict):
            return f"clause {clause!r} is not an object with class and count"
        if clause.get("class") not in names:
            return f"class {clause.get('class')!r} is not one of {', '.join(names)}"
        if type(clause.get("count")) is not int or clause["count"] < 1:
            return f"count {clause.get('count')!r} is not a whole number above 0"
        if "color" in clause and clause["color"] not in colors:
            return f"color {clause['color']!r} is not one of {', '.join(colors)}"
        if "position" in clause and not _is_position(clause["position"], index, len(clauses)):
            return f"position {clause['position']!r} is not [one of {', '.join(RELATIONS)}; index of another clause]"
    return None


def _is_position(value: Any, own: int, num_clauses: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and value[0] in RELATIONS
        and type(value[1]) is int
        and 0 <= value[1] < num_clauses
        and value[1] != own
    )
