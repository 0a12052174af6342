"""Documented, bounded options. One declaration gives the check, the error text, the CLI help and the widget.

An option is a parameter of a function or a field of a dataclass, annotated with a ``Knob``, ``Choice``, ``Text``,
``Numbers`` or ``Table``.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, get_type_hints


class Knob(NamedTuple):
    """Limits and meaning of one number."""

    low: float
    high: float
    tip: str

    def wrong(self, value: Any, kind: type) -> str | None:
        """What is wrong with ``value``, or None."""
        numbers = (int,) if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, numbers) or not self.low <= value <= self.high:
            return f"({self.tip}) must be {'a whole number' if kind is int else 'a number'} in {self.low}..{self.high}"
        return None


class Choice(NamedTuple):
    """Allowed values and meaning of one switch."""

    allowed: tuple[Any, ...]
    tip: str

    def wrong(self, value: Any, kind: type) -> str | None:
        """What is wrong with ``value``, or None."""
        known = any(value == a and type(value) is type(a) for a in self.allowed)
        return None if known else f"({self.tip}) must be one of {', '.join(map(repr, self.allowed))}"


class Text(NamedTuple):
    """Meaning of a free text."""

    tip: str

    def wrong(self, value: Any, kind: type) -> str | None:
        """What is wrong with ``value``, or None."""
        return None if isinstance(value, str) else f"({self.tip}) must be a text"


class Numbers(NamedTuple):
    """Limits and meaning of a few whole numbers, written ``1, 2, 3``."""

    low: int
    high: int
    tip: str

    def wrong(self, value: Any, kind: type) -> str | None:
        """What is wrong with ``value``, or None."""
        try:
            known = all(self.low <= number <= self.high for number in whole_numbers(value))
        except (AttributeError, ValueError):
            known = False
        return None if known else f'({self.tip}) must be whole numbers in {self.low}..{self.high} such as "1, 2, 3"'


class Table(NamedTuple):
    """Meaning of a noise table: the contents of a file that ``densegrpo calibrate`` wrote, or None."""

    tip: str

    def wrong(self, value: Any, kind: type) -> str | None:
        """What is wrong with ``value``, or None."""
        return noise_table_problem(value) and f"({self.tip}) {noise_table_problem(value)}"


class Option(NamedTuple):
    """One option of a function or dataclass."""

    kind: type
    limits: Knob | Choice | Text | Numbers | Table
    default: Any


def flag(tip: str) -> Choice:
    """A yes / no option."""
    return Choice((False, True), tip)


def whole_numbers(text: str) -> tuple[int, ...]:
    """``"1, 2, 3"`` -> (1, 2, 3). Raises ValueError for anything else."""
    return tuple(int(part) for part in text.split(","))


def noise_table_problem(value: Any) -> str | None:
    """What is wrong with a noise table, or None."""
    if value is None:
        return None
    if not isinstance(value, dict):
        return "must be a noise table made by `densegrpo calibrate`"
    columns: list[Any] = [value.get(key) for key in ("sigmas", "rates")]
    plain = all(isinstance(c, list) and all(type(n) in (int, float) and 0 <= n < 100 for n in c) for c in columns)
    if not plain or len(columns[0]) != len(columns[1]) + 1 or value.get("kernel") not in ("sde", "cps"):
        return (
            'must be a noise table made by `densegrpo calibrate`: "kernel", T+1 "sigmas" and T "rates", all in 0..100'
        )
    return None


def options_of(owner: Callable[..., Any]) -> dict[str, Option]:
    """Name -> option of each annotated parameter or field of ``owner``."""
    hints = get_type_hints(owner, include_extras=True)
    return {
        name: Option(hints[name].__origin__, hints[name].__metadata__[0], parameter.default)
        for name, parameter in inspect.signature(owner).parameters.items()
        if hasattr(hints.get(name), "__metadata__")
    }


def check(title: str, known: Mapping[str, Option], given: Mapping[str, Any]) -> None:
    """Raise ValueError that names the wrong option, its value and what is allowed."""
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{title} has no option {name!r}{suggest(name, known)}; it has: {', '.join(known)}")
        problem = known[name].limits.wrong(value, known[name].kind)
        if problem:
            raise ValueError(f"{title}: {name} {problem}, got {value!r}")


def suggest(name: str, known: Mapping[str, Any]) -> str:
    """A hint for typing errors, or nothing."""
    close = get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
