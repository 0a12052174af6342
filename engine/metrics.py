"""``metrics.jsonl``: the record of a run, one line per iteration."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import SaveError, write_text

FILE = "metrics.jsonl"
TAIL = 65536
"""Bytes that are read first to find the last line; lines are shorter than that."""


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All lines of the run in ``folder``; one that was cut off by a crash is left out."""
    path = folder / FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def last_row(folder: Path) -> dict[str, Any] | None:
    """The last of them, without reading the others: that takes as long after 10,000 iterations as after one."""
    path, length = folder / FILE, TAIL
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = path.stat().st_size
        while True:
            start = max(0, size - length)
            file.seek(start)
            lines = file.read(length).splitlines(keepends=True)[1 if start else 0 :]  # the first may be half a line
            whole = [line for line in lines if line.endswith((b"}\n", b"}\r\n"))]
            if whole or start == 0:
                return json.loads(whole[-1]) if whole else None
            length *= 2


def append_row(folder: Path, row: Mapping[str, Any]) -> None:
    """One more line. Raises SaveError."""
    path = folder / FILE
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")
    except OSError as problem:
        raise SaveError(f"could not write {path}: {problem}; free some space, then resume the run") from problem


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """These lines in place of all others, whole or not at all. Raises SaveError."""
    write_text(folder / FILE, "".join(json.dumps(finite(row)) + "\n" for row in rows))


def finite(value: Any) -> Any:
    """The same with null for numbers that are none: JSON has no NaN, and browsers refuse it."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
