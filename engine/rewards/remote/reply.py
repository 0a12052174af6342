"""What a judge's answer says: numbers out of text and token probabilities that a stranger sent. Nothing is executed."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .patience import RemoteError
from .transport import excerpt

LEVELS = {"excellent": 1.0, "good": 0.75, "fair": 0.5, "poor": 0.25, "bad": 0.0}
"""The five words of opinion scores (ITU-T P.910), as in DeQA-Score (arXiv 2501.11561), here from 1 to 0."""
MIN_MASS = 0.01
"""Probability of yes and no together, below which the model was about to say something else."""
LEVEL_MASS = 0.5
"""The same for the five words; they may come later than first ("The quality is good")."""
MAX_TEXT = 2**16
"""Letters at the end of an answer that are looked at."""
NUMBER = r"(-?\d{1,9}(?:\.\d{1,30})?)"


class UnusableError(RemoteError):
    """The server answered, but not with a score."""


class Reply(NamedTuple):
    """What a chat model said."""

    text: str
    """After its thinking."""
    tokens: Sequence[Mapping[str, float]]
    """For each token of the answer: word (lower case, no spaces) -> probability; empty when the server has none."""
    finished: bool
    """False when it was cut off after max_tokens."""


def number(value: Any) -> float:
    """A finite number that float32 can hold. Raises UnusableError for anything else, also for texts and booleans."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 3e38:
        return float(value)
    what = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
    raise UnusableError(f"{what} is not a finite number")


def read_reply(data: Any) -> Reply:
    """The first choice of an OpenAI-compatible chat completion. Raises UnusableError when it has another shape."""
    try:
        choice = data["choices"][0]
        text = choice["message"]["content"] or ""
        finished = choice.get("finish_reason") != "length"
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UnusableError("the answer is no chat completion: it has no choices[0].message.content") from None
    if not isinstance(text, str):
        raise UnusableError(f"the answer is a {type(text).__name__} instead of a text")
    _, end, after = text.rpartition("</think>")
    if not end and "<think>" in text and not finished:
        raise UnusableError("the answer ends inside the model's thinking; raise max_tokens or set thinking to off")
    return Reply((after if end else text)[-MAX_TEXT:], probabilities(choice.get("logprobs")), finished)


def probabilities(logprobs: Any) -> list[dict[str, float]]:
    """Word -> probability for each token of ``logprobs``; nothing where it has another shape."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    found = []
    for token in content if isinstance(content, list) else ():
        words: dict[str, float] = {}
        top = token.get("top_logprobs") if isinstance(token, dict) else None
        for option in top if isinstance(top, list) else ():
            word, value = (option.get("token"), option.get("logprob")) if isinstance(option, dict) else (None, None)
            if isinstance(word, str) and isinstance(value, (int, float)) and value == value:
                key = word.strip(" \t\r\n\u2581\u0120").lower()  # two ways to write the space before a word
                words[key] = words.get(key, 0.0) + math.exp(min(value, 0.0))
        found.append(words)
    return found


def yes_probability(reply: Reply) -> float:
    """P(yes) / (P(yes) + P(no)) of the first token; without probabilities 1 or 0 by the text.

    As in VQAScore (arXiv 2404.01291), but of the two answers only. Raises UnusableError when it is neither.
    """
    first = reply.tokens[0] if reply.tokens else {}
    yes, no = first.get("yes", 0.0), first.get("no", 0.0)
    if yes + no >= MIN_MASS:
        return yes / (yes + no)
    said = re.match(r"\W{0,20}(yes|no)\b", reply.text, re.IGNORECASE)
    if not said:
        raise UnusableError(f"the answer is neither yes nor no: {excerpt(reply.text)}")
    return float(said[1].lower() == "yes")


def level(reply: Reply) -> float:
    """Expected value over the five levels, 0..1; without probabilities the last level in the text.

    Raises UnusableError when there is none.
    """
    for token in reply.tokens:
        mass = dict.fromkeys(LEVELS, 0.0)
        for word, probability in token.items():
            for name in LEVELS:
                if len(word) >= 2 and name.startswith(word):  # a tokenizer may split a word
                    mass[name] += probability
        total = sum(mass.values())
        if total >= LEVEL_MASS:
            return sum(LEVELS[name] * share for name, share in mass.items()) / total
    said = re.findall(rf"\b({'|'.join(LEVELS)})\b", reply.text, re.IGNORECASE)
    if not said:
        raise UnusableError(f"the answer names none of {', '.join(LEVELS)}: {excerpt(reply.text)}")
    return LEVELS[said[-1].lower()]


def rating(reply: Reply, label: str, low: float, high: float) -> float:
    """The last number after ``label`` in the text, ``low``..``high`` mapped to 0..1, clamped.

    The label is plain text, no pattern: a pattern from a stranger's workflow could keep this process busy forever.
    Raises UnusableError when there is none, or the answer was cut off.
    """
    if not reply.finished:
        raise UnusableError("the answer was cut off; raise max_tokens")
    before = rf"{re.escape(label)}[\s*_]{{0,8}}(?:\([^()\n]{{0,40}}\))?[\s*_:=\[]{{0,12}}" if label else ""
    said = re.findall(before + NUMBER, reply.text, re.IGNORECASE)
    if not said:
        what = f"no number after {label!r}" if label else "no number"
        raise UnusableError(f"the answer has {what}: {excerpt(reply.text)}")
    return (min(max(float(said[-1]), low), high) - low) / (high - low)
