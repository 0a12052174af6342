"""Prompt lists: one prompt per line (.txt), or one JSON object per line with ``prompt`` and metadata (.jsonl)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .data import Prompt

HERE = Path(__file__).resolve().parent
BUILT_IN = {
    "demo:train": HERE / "demo" / "train.jsonl",
    "demo:held_out": HERE / "demo" / "held_out.jsonl",
    "set:colours": HERE / "prompt_sets" / "colours.jsonl",
    "set:counting": HERE / "prompt_sets" / "counting.jsonl",
    "set:position": HERE / "prompt_sets" / "position.jsonl",
    "set:text": HERE / "prompt_sets" / "text.jsonl",
}
"""Lists that come with the package: ``demo`` for the demo model, ``set`` for the rewards geneval and ocr."""


def load_prompts(source: str | Sequence[str | Mapping[str, Any]], folder: Path) -> list[Prompt]:
    """Prompts from a list of texts or records, a built-in list or a file (relative to ``folder``).

    Raises ValueError naming file and line of the first problem.
    """
    if not isinstance(source, str):
        entries = [e if isinstance(e, str) else record(e, f"prompt {n}") for n, e in enumerate(source, 1)]
        return checked([Prompt(e, {}) if isinstance(e, str) else e for e in entries], "the list of prompts")
    path = BUILT_IN.get(source, folder / source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(
            f"prompt file {path} does not exist; give a .txt or .jsonl file, a list of prompts, "
            f"or one of {', '.join(BUILT_IN)}"
        ) from None
    except OSError as problem:
        raise ValueError(f"prompt file {path} cannot be read ({problem.strerror}); is it a file of yours?") from None
    except UnicodeDecodeError as problem:
        raise ValueError(f"prompt file {path} is not UTF-8 text ({problem}); save it as UTF-8") from None
    # Not splitlines(): it also splits at separators that users type inside of prompts, such as U+2028.
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        return checked([parse(line, f"{path}, line {n}") for n, line in lines], f"prompt file {path}")
    if path.suffix == ".txt":
        return checked([Prompt(line, {}, f"{path}, line {n}") for n, line in lines], f"prompt file {path}")
    raise ValueError(f"prompt file {path} must end in .txt or .jsonl")


def parse(line: str, place: str) -> Prompt:
    """One line of a .jsonl file."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as problem:
        raise ValueError(f"{place}: not JSON ({problem.msg}); write one object per line") from None
    return record(entry, place)


def record(entry: Any, place: str) -> Prompt:
    """A prompt with its metadata from ``{"prompt": ..., ...}``."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'{place}: needs an object with a text "prompt", got {str(entry)[:60]}')
    if not entry["prompt"].strip():
        raise ValueError(f"{place}: the prompt is empty; remove it or write one")
    return Prompt(entry["prompt"].strip(), {k: v for k, v in entry.items() if k != "prompt"}, place)


def checked(prompts: list[Prompt], title: str) -> list[Prompt]:
    """The same prompts. Raises ValueError when there are none or one is empty."""
    if not prompts:
        raise ValueError(f"{title} has no prompts; add at least one line")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.text.strip():
            raise ValueError(f"{title}: prompt {number} is empty; remove it or write one")
    return prompts


def dump(prompts: Iterable[Prompt]) -> str:
    """The .jsonl text of a prompt list."""
    return "".join(json.dumps({"prompt": p.text, **p.metadata}) + "\n" for p in prompts)
