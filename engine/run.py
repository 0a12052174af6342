"""A run on disk: ``<out>/<name>/`` with config, prompts, metrics, samples, checkpoints, LoRA and report."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import SaveError, write_text
from .config import RunConfig, make_config
from .data import Prompt
from .distributed import World
from .evaluate import Evaluation
from .metrics import last_row, read_rows
from .prompts import dump, load_prompts
from .rewards import Panel, make_panel, members

HELD_OUT = "held-out/"
"""Prefix of rewards that are only evaluated."""


@dataclass(frozen=True, slots=True)
class Run:
    """The folder of one run and what it was started with."""

    folder: Path
    config: RunConfig
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]

    @staticmethod
    def create(config: RunConfig, out: Path, base: Path) -> "Run":
        """A new run in ``out``; prompt files are read relative to ``base`` and copied into the run.

        Raises ValueError when the folder exists, or a prompt list does not suit a reward; SaveError when the
        folder cannot be made.
        """
        folder = out / config.name
        if folder.exists():
            raise ValueError(
                f"run folder {folder} exists; continue it with `densegrpo resume {folder}` or choose another name"
            )
        prompts = load_prompts(config.prompts, base)
        held_out = load_prompts(config.held_out_prompts, base) if config.held_out_prompts else []
        training_panel(config).validate(prompts)
        if held_out and (panel := evaluation_panel(config)):
            panel.validate(held_out)
        try:
            folder.mkdir(parents=True)
        except OSError as problem:
            raise SaveError(f"could not make the run folder {folder}: {problem}; make room for it") from problem
        write_text(folder / "prompts.jsonl", dump(prompts))
        if held_out:
            write_text(folder / "held_out.jsonl", dump(held_out))
        write_text(folder / "config.json", config.to_json())
        return Run(folder, config, prompts, held_out)

    @staticmethod
    def open(folder: Path) -> "Run":
        """An existing run, with the prompts it was started with. Raises ValueError when it is not one."""
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is not a run: it has no config.json; give a folder such as runs/demo")
        try:
            data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as problem:
            raise ValueError(f"{folder / 'config.json'} is damaged: {problem}") from None
        held_out = folder / "held_out.jsonl"
        prompts = load_prompts("prompts.jsonl", folder)
        return Run(folder, make_config(data), prompts, load_prompts(held_out.name, folder) if held_out.exists() else [])

    def continued(self, iterations: int) -> "Run":
        """The same run, longer or shorter; recorded in its config."""
        return self.adopt(replace(self.config, training=replace(self.config.training, iterations=iterations)))

    def adopt(self, config: RunConfig) -> "Run":
        """The same run, going on as ``config`` says; recorded."""
        write_text(self.folder / "config.json", config.to_json())
        return replace(self, config=config)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of its record so far."""
        return read_rows(self.folder)

    def last_row(self) -> dict[str, Any] | None:
        """The newest of them."""
        return last_row(self.folder)


def training_panel(config: RunConfig) -> Panel:
    """The rewards that are trained on."""
    return make_panel(config.rewards, config.reward_mode)


def evaluation_panel(config: RunConfig) -> Panel | None:
    """The rewards that evaluations score: the trained ones and the held-out ones, without those people give."""
    every = [*members(config.rewards), *members(config.held_out_rewards, HELD_OUT)]
    automatic = [one for one in every if not getattr(one.reward, "interactive", False)]
    return Panel(automatic) if automatic else None


def check_processes(config: RunConfig, world: World) -> None:
    """Raise ValueError when this run needs one process and there are more."""
    if world.size > 1 and training_panel(config).interactive:
        raise ValueError("people vote on the images of one process; start this run without accelerate launch")


def trained_score(evaluation: Evaluation, config: RunConfig) -> float:
    """The weighted sum of the trained rewards of an evaluation; NaN when none of them is evaluated."""
    known = [one for one in members(config.rewards) if one.label in evaluation.means]
    return sum(one.weight * evaluation.means[one.label] for one in known) if known else math.nan


def evaluation_row(evaluation: Evaluation, config: RunConfig) -> dict[str, Any]:
    """What ``metrics.jsonl`` says of an evaluation."""
    return {
        "evaluation": evaluation.means,
        "evaluation_reward": trained_score(evaluation, config),
        "evaluation_images": evaluation.num_images,
        "evaluation_missing": evaluation.missing,
        "statistics": evaluation.statistics,
    }
