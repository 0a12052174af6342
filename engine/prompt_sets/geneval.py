"""Prompts with the grammar and metadata of GenEval (Ghosh et al., arXiv 2310.11513).

The grammar is that of its official prompts, with its plurals: ``two benchs``, ``four knifes``, ``three buses``. A
different English would be another test.
"""

from ..rewards.geneval import RELATIONS
from ..rewards.geneval_words import CLASSES, COLOURS
from . import Kind, Record

NUMBERS = {2: "two", 3: "three", 4: "four"}
COLOURED = tuple(name for name in CLASSES if name != "person")
"""Nobody is asked to paint people."""


def with_article(words: str) -> str:
    """``an apple``, ``a bench``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    """As GenEval has it."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def pair(number: int, size: int) -> tuple[int, int]:
    """Number below size * (size - 1) -> two different numbers below size, in order."""
    first, second = divmod(number, size - 1)
    return first, second + (second >= first)


def clause(name: str, count: int = 1) -> Record:
    """One clause of ``include`` or ``exclude``."""
    return {"class": name, "count": count}


def record(tag: str, words: str, *include: Record) -> Record:
    """One line."""
    return {"tag": tag, "include": list(include), "prompt": f"a photo of {words}"}


def single_object(number: int) -> Record:
    """A photo of a bench."""
    return record("single_object", with_article(CLASSES[number]), clause(CLASSES[number]))


def two_object(number: int) -> Record:
    """A photo of a bench and a sports ball."""
    a, b = (CLASSES[i] for i in pair(number, len(CLASSES)))
    return record("two_object", f"{with_article(a)} and {with_article(b)}", clause(a), clause(b))


def counting(number: int) -> Record:
    """A photo of two clocks: and not of three."""
    which, more = divmod(number, len(NUMBERS))
    name, count = CLASSES[which], list(NUMBERS)[more]
    made = record("counting", f"{NUMBERS[count]} {plural(name)}", clause(name, count))
    return {**made, "exclude": [clause(name, count + 1)]}


def colors(number: int) -> Record:
    """A photo of a red apple."""
    which, paint = divmod(number, len(COLOURS))
    name, colour = COLOURED[which], COLOURS[paint]
    return record("colors", f"{with_article(colour)} {name}", {**clause(name), "color": colour})


def position(number: int) -> Record:
    """A photo of a bench left of a bear: the clause of the bench points at that of the bear."""
    which, way = divmod(number, len(RELATIONS))
    a, b = (CLASSES[i] for i in pair(which, len(CLASSES)))
    words = f"{with_article(a)} {RELATIONS[way]} {with_article(b)}"
    return record("position", words, clause(b), {**clause(a), "position": [RELATIONS[way], 0]})


def color_attr(number: int) -> Record:
    """A photo of a red apple and a blue car: two things, two colours."""
    things, paints = divmod(number, len(COLOURS) * (len(COLOURS) - 1))
    a, b = (COLOURED[i] for i in pair(things, len(COLOURED)))
    one, other = (COLOURS[i] for i in pair(paints, len(COLOURS)))
    words = f"{with_article(one)} {a} and {with_article(other)} {b}"
    return record("color_attr", words, {**clause(a), "color": one}, {**clause(b), "color": other})


NUM_PAIRS = len(CLASSES) * (len(CLASSES) - 1)
KINDS = {
    "position": Kind(7, NUM_PAIRS * len(RELATIONS), position),
    "counting": Kind(5, len(CLASSES) * len(NUMBERS), counting),
    "color_attr": Kind(3, len(COLOURED) * (len(COLOURED) - 1) * len(COLOURS) * (len(COLOURS) - 1), color_attr),
    "colors": Kind(1, len(COLOURED) * len(COLOURS), colors),
    "two_object": Kind(1, NUM_PAIRS, two_object),
    "single_object": Kind(0, len(CLASSES), single_object),
}
"""Shares as in the training set of Flow-GRPO (arXiv 2505.05470), which has no single objects."""
