"""Noise tables: the JSON file that a calibration writes, and what it may be used for."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from .calibrate import Balance, CalibrationSettings, Round
from .checkpoint import write_text
from .knobs import noise_table_problem
from .models import model_options

FORMAT, VERSION = "densegrpo-noise-table", 1
NoiseTable = Mapping[str, Any]
"""The object in the file; also the value of the option ``noise_table`` and what travels between nodes."""

INDIFFERENT = {
    "cfg_grad",
    "gradient_checkpointing",
    "decode_batch",
    "dtype",
    "schedule",
    "scheduler",
    "shift",
}
"""Settings of a model that do not bind a table. The first ones say how gradients are computed, and memory and speed;
the last ones only set the noise levels, which are compared themselves, so that the same levels fit however made.
Everything else binds: weights, image size and guidance all change what noise does to an image."""


def make_table(
    rounds: Iterable[Round],
    follow: Callable[[Round], None],
    settings: CalibrationSettings,
    *,
    kernel: str,
    model: Mapping[str, Any],
    rewards: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Carry out a calibration and return its table, plain finite JSON data; ``follow`` sees every round.

    ``model``: the model section of a configuration. When it ends early, by Ctrl-C or anything else, there is no table:
    nobody has measured whether rates from the midst of a search are any good.
    """
    first = last = None
    for last in rounds:
        first = first or last
        follow(last)
    assert first is not None
    assert last is not None
    return {
        "format": FORMAT,
        "version": VERSION,
        "kernel": kernel,
        "sigmas": plain(first.sigmas),
        "rates": plain(last.rates),
        "model": identity(model),
        "rewards": [dict(entry) for entry in rewards],
        **asdict(settings),
        "before": measured(first),
        "after": measured(last),
    }


def measured(found: Round) -> dict[str, list[float]]:
    """Rates and the shares of trajectories that gained and lost, [T] each."""
    balance: Balance = found.balance
    count = balance.scored.clamp(min=1)
    return {
        "rates": plain(found.rates),
        "positive": plain(balance.positive / count),
        "negative": plain(balance.negative / count),
    }


def plain(values: Tensor) -> list[float]:
    """As JSON numbers."""
    return [round(value, 6) for value in values.tolist()]


def write_table(path: Path, table: NoiseTable) -> None:
    """Replace the file in one step. Raises SaveError."""
    write_text(path, json.dumps(table, indent=2, allow_nan=False) + "\n")


def read_table(path: Path) -> dict[str, Any]:
    """The table in a file. Raises ValueError that names the file and what is wrong with it."""
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig")) or {}
    except FileNotFoundError:
        raise ValueError(f"noise table {path} does not exist; make it with `densegrpo calibrate`") from None
    except OSError as problem:
        raise ValueError(f"noise table {path} cannot be read: {problem}") from None
    except ValueError as problem:
        raise ValueError(f"noise table {path} is not JSON ({problem}); calibrate again") from None
    wrong = noise_table_problem(table) or wrong_measurements(table)
    if wrong:
        raise ValueError(f"noise table {path} {wrong}")
    written = (table.get("format", FORMAT), table.get("version", VERSION))
    if written != (FORMAT, VERSION):
        raise ValueError(
            f"noise table {path} has format {written[0]!r}, version {written[1]!r}; known is {FORMAT!r}, version "
            f"{VERSION}; calibrate again"
        )
    return table


def wrong_measurements(table: NoiseTable) -> str | None:
    """What is wrong with what a table says beside its rates, or None; a table made by hand may say nothing."""

    def numbers(side: Any, key: str) -> bool:
        values = side.get(key) if isinstance(side, dict) else None
        return (
            isinstance(values, list)
            and len(values) == len(table["rates"])
            and all(type(n) in (int, float) and 0 <= n < 100 for n in values)
        )

    for name in ("before", "after"):
        if name in table and not all(numbers(table[name], key) for key in ("rates", "positive", "negative")):
            return f'is damaged: "{name}" must hold T "rates", "positive" and "negative"; calibrate again'
    if not isinstance(table.get("model", {}), dict):
        return 'is damaged: "model" must be an object; calibrate again'
    return None


def identity(model: Mapping[str, Any]) -> dict[str, Any]:
    """What of a model section a table is bound to, with defaults filled in."""
    defaults = {key: option.default for key, option in model_options(model["name"]).items()}
    return {key: value for key, value in (defaults | dict(model)).items() if key not in INDIFFERENT}


def check_table(table: NoiseTable | None, model: Mapping[str, Any], num_steps: int) -> None:
    """Raise ValueError when ``table`` belongs to another model section or another number of steps.

    A table without "model", made by hand, fits every model. The noise levels are compared when the model is there, by
    ``schedule.table_rate``.
    """
    if table is None:
        return
    then, now = table.get("model", {}), identity(model)
    keys = ["name"] if then.get("name", now["name"]) != now["name"] else list(now)
    changed = [f"{key} was {then[key]!r}, is {now[key]!r}" for key in keys if key in then and then[key] != now[key]]
    if changed:
        raise ValueError(
            f"the noise table was calibrated for another model ({'; '.join(changed)}); calibrate again, or remove "
            "(disconnect) noise_table"
        )
    if len(table["rates"]) != num_steps:
        raise ValueError(
            f"the noise table has {len(table['rates'])} rates but num_steps (denoising steps) is {num_steps}; "
            f"calibrate again, or set num_steps to {len(table['rates'])}"
        )


def describe(table: NoiseTable) -> str:
    """The table as text, one line per noisy step; shares in percent."""
    if "before" not in table or "after" not in table:
        columns = list(zip(table["sigmas"], table["rates"], strict=False))[:-1]
        rows = [f"{t:4d}  {sigma:5.3f}  {rate:6.3f}" for t, (sigma, rate) in enumerate(columns)]
        return "\n".join(["step  sigma   noise", *rows])
    before, after = table["before"], table["after"]
    lines = ["step  sigma   noise             images that gained / lost"]
    for t in range(len(table["rates"]) - 1):
        noise = f"{before['rates'][t]:6.3f} -> {after['rates'][t]:6.3f}"
        lines.append(f"{t:4d}  {table['sigmas'][t]:5.3f}  {noise}   {shares(before, t)}  ->  {shares(after, t)}")
    lines.append(
        f"imbalance {imbalance(before):.2f} -> {imbalance(after):.2f} (0: as many gain as lose; 1: all one way)"
    )
    return "\n".join(lines)


def shares(side: Mapping[str, Sequence[float]], t: int) -> str:
    """Of one step, in percent."""
    return f"{100 * side['positive'][t]:3.0f} / {100 * side['negative'][t]:3.0f} %"


def imbalance(side: Mapping[str, Sequence[float]]) -> float:
    """|positive - negative| / (positive + negative) over the noisy steps; steps that change more count more."""
    pairs = list(zip(side["positive"], side["negative"], strict=True))[:-1]
    return sum(abs(up - down) for up, down in pairs) / max(sum(up + down for up, down in pairs), 1e-12)
