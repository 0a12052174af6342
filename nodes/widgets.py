"""Options of the engine as widgets: one declaration gives the range, the default and the tooltip."""

from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from ..engine.config import check_name
from ..engine.knobs import Choice, Knob, Option

CATEGORY = "DenseGRPO"


def name_problem(name: str | None) -> str | bool:
    """For ``validate_inputs``: True, or why that is no file or folder name; None comes over a link, checked later."""
    try:
        return name is None or bool(check_name(name))
    except ValueError as problem:
        return str(problem)


def widget(name: str, option: Option) -> Any:
    """The widget of one option."""
    limits, default = option.limits, option.default
    tooltip = limits.tip[0].upper() + limits.tip[1:] + "."
    if isinstance(limits, Choice):
        if set(limits.allowed) == {False, True}:
            return io.Boolean.Input(name, default=default, tooltip=tooltip)
        return io.Combo.Input(name, options=list(limits.allowed), default=default, tooltip=tooltip)
    if not isinstance(limits, Knob):
        return io.String.Input(name, default=default, tooltip=tooltip)
    if option.kind is int:
        return io.Int.Input(name, default=default, min=int(limits.low), max=int(limits.high), tooltip=tooltip)
    step = 10.0 ** min(-2, -len(f"{default:.10f}".rstrip("0").partition(".")[2])) if default else 0.001
    return io.Float.Input(
        name, default=float(default), min=limits.low, max=limits.high, step=step, round=False, tooltip=tooltip
    )


def widgets(known: Mapping[str, Option], names: Sequence[str] = ()) -> list[Any]:
    """The widgets of several options, all of them or those of ``names`` in that order."""
    return [widget(name, known[name]) for name in names or known]
