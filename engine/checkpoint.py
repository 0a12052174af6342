"""Checkpoints: written whole or not at all, safetensors and JSON only."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class SaveError(RuntimeError):
    """Something could not be written; what was saved before is still there."""


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make ``folder`` by filling a temporary one beside it and renaming it.

    Raises SaveError naming the folder and the reason; nothing half-written is left.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        for path in temporary.iterdir():
            flush(path)
        temporary.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"could not save {folder}: {problem}; free some space, then resume the run") from problem


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step. Raises SaveError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise SaveError(
            f"could not save {path}: {problem}; free some space or see to the folder; a run can be resumed then"
        ) from problem


def flush(path: Path) -> None:
    """Make the system write a file or folder to the disk; Windows cannot do that for folders."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(folder: Path, iteration: int, state: dict[str, Tensor], keep: int) -> Path:
    """Write ``step_<iteration>`` into ``folder`` and drop the oldest beyond ``keep``."""
    target = folder / f"step_{iteration:06d}"
    if target.exists():
        return target  # the same iteration of the same run is the same state

    def fill(temporary: Path) -> None:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary / "state.safetensors")
        (temporary / "position.json").write_text(json.dumps({"iteration": iteration}), encoding="utf-8")

    write_folder(target, fill)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def load_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The newest state. Raises ValueError when there is none or it is damaged."""
    found = checkpoints(folder)
    if not found:
        raise ValueError(f"{folder} holds no checkpoint, so the run cannot be resumed; start it again")
    newest = found[-1]
    try:
        position = json.loads((newest / "position.json").read_text(encoding="utf-8"))
        state = load_file(newest / "state.safetensors")
        if position["iteration"] != int(state["iteration"]):
            raise ValueError("its two files disagree")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as problem:
        fallback = f"to resume from {found[-2].name}" if len(found) > 1 else "and start the run again"
        raise ValueError(f"checkpoint {newest} is damaged ({problem}); delete that folder {fallback}") from None
    return state
