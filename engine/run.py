"""A run on disk: ``<out>/<name>/`` with config, prompts, metrics, samples, checkpoints, LoRA and report."""

import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .checkpoint import SaveError, checkpoints, load_checkpoint, save_checkpoint, write_text
from .config import RunConfig, make_config
from .data import Prompt
from .distributed import Solo, World
from .evaluate import Evaluation, evaluate
from .learner import Learner
from .lora import LoraTensors, tensors_of, write_lora
from .models import load_model
from .pictures import grid
from .prompts import dump, load_prompts
from .protocols import FlowModel
from .recipes import make_recipe
from .rewards import Panel, make_panel, member
from .train import Iteration, train

log = logging.getLogger("densegrpo.run")
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
        if held_out:
            evaluation_panel(config).validate(held_out)
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

    def with_iterations(self, iterations: int) -> "Run":
        """The same run, longer or shorter; recorded in its config."""
        config = replace(self.config, training=replace(self.config.training, iterations=iterations))
        write_text(self.folder / "config.json", config.to_json())
        return replace(self, config=config)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``; a line cut off by a crash is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]


@dataclass(slots=True)
class Progress:
    """What ``execute`` yields: an iteration, an evaluation, or both."""

    number: int
    total: int
    iteration: Iteration | None = None
    evaluation: Evaluation | None = None


def training_panel(config: RunConfig) -> Panel:
    """The rewards that are trained on."""
    return make_panel(config.rewards, config.reward_mode)


def evaluation_panel(config: RunConfig) -> Panel:
    """The rewards that evaluations score: the trained ones and the held-out ones."""
    members = [member(entry) for entry in config.rewards]
    return Panel([*members, *(member(entry, HELD_OUT) for entry in config.held_out_rewards)])


def trained_score(evaluation: Evaluation, config: RunConfig) -> float:
    """The weighted sum of the trained rewards of an evaluation."""
    return sum(weight * evaluation.means[label] for label, _, weight in map(member, config.rewards))


def evaluation_row(evaluation: Evaluation, config: RunConfig) -> dict[str, Any]:
    """What ``metrics.jsonl`` says of an evaluation."""
    return {
        "evaluation": evaluation.means,
        "evaluation_reward": trained_score(evaluation, config),
        "evaluation_images": evaluation.num_images,
    }


def finite(value: Any) -> Any:
    """The same with null for numbers that are none: JSON has no NaN, and browsers refuse it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Session:
    """One process working on a run, from its start or from its newest checkpoint.

    Raises ValueError when there is nothing to resume from.
    """

    def __init__(self, run: Run, world: World | None = None, *, resume: bool = False, model: FlowModel | None = None):
        self.run, self.world = run, world or Solo()
        config = run.config
        self.training = config.training
        seed = config.training.seed
        options = {k: v for k, v in config.model.items() if k != "name"}
        self.model = model or load_model(config.model["name"], config.lora, seed, **options)
        self.recipe = make_recipe(**config.method)
        self.learner = Learner(self.model.lora, config.optimizer)
        self.panel, self.evaluation_panel = training_panel(config), evaluation_panel(config)
        self.cond = self.model.encode([p.text for p in run.prompts])
        self.held_out_cond = self.model.encode([p.text for p in run.held_out]) if run.held_out else None
        self.writes = self.world.rank == 0
        if resume:
            self.learner.load_state(load_checkpoint(run.folder / "checkpoints"))

    def execute(self) -> Iterator[Progress]:
        """Train to the end, saving on the way and when it ends early, by Ctrl-C or anything else.

        Raises what ended it; what was learnt until the last whole iteration is in the newest checkpoint.
        """
        self.clean_up()
        total = self.run.config.training.iterations
        try:
            if self.learner.iteration == 0 and not self.run.metrics():
                yield self.record(Progress(0, total, None, self.evaluate("before")))
            elif missed := self.missed_evaluation():
                yield missed
            yield from self.iterations()
        except BaseException:
            self.save()
            raise
        self.save()
        if self.writes:
            self.report()
        self.world.wait()

    def iterations(self) -> Iterator[Progress]:
        """The training iterations; with smaller batches when memory runs out."""
        while True:
            try:
                yield from self.loop()
                return
            except torch.OutOfMemoryError as problem:  # noqa: PERF203
                self.use_less_memory(problem)

    def use_less_memory(self, problem: torch.OutOfMemoryError) -> None:
        """Halve the batches, which changes no result but speed; raises ``problem`` when they are 1 already."""
        if self.world.size > 1 or self.training.train_batch == self.training.sample_batch == 1:
            raise problem
        train_batch, sample_batch = (max(1, n // 2) for n in (self.training.train_batch, self.training.sample_batch))
        self.training = replace(self.training, train_batch=train_batch, sample_batch=sample_batch)
        torch.cuda.empty_cache()
        log.warning("out of memory: going on with train_batch %d, sample_batch %d", train_batch, sample_batch)

    def loop(self) -> Iterator[Progress]:
        """Iterations until the end, or until memory runs out."""
        config, total = self.run.config, self.training.iterations
        loop = train(
            self.model,
            self.cond,
            self.run.prompts,
            self.panel,
            self.recipe,
            self.learner,
            self.training,
            self.world,
        )
        for iteration in loop:
            progress = Progress(iteration.number, total, iteration)
            try:
                progress.evaluation = self.due_evaluation(iteration.number)
            finally:  # when the evaluation is cancelled or fails, the iteration still counts
                self.record(progress)
            if iteration.number % config.saving.every == 0:
                self.save()
            yield progress

    def due_evaluation(self, number: int) -> Evaluation | None:
        """The evaluation after that iteration, if there is to be one."""
        every, last = self.run.config.evaluation.every, number == self.training.iterations
        if last or (every and number % every == 0):
            return self.evaluate("after" if last else f"step_{number:06d}")
        return None

    def missed_evaluation(self) -> Progress | None:
        """Make up for an evaluation that was cut short by what ended the run; its row of metrics is completed."""
        number, rows = self.learner.iteration, self.run.metrics()
        if not rows or rows[-1]["iteration"] != number or "evaluation" in rows[-1]:
            return None
        evaluation = self.due_evaluation(number)
        if evaluation is None:
            return None
        if self.writes:
            rows[-1] |= evaluation_row(evaluation, self.run.config)
            write_text(self.run.folder / "metrics.jsonl", "".join(json.dumps(finite(row)) + "\n" for row in rows))
        return Progress(number, self.training.iterations, None, evaluation)

    def evaluate(self, name: str) -> Evaluation | None:
        """Score held-out images with the averaged weights and keep a grid of them."""
        if self.held_out_cond is None:
            return None
        try:
            result = self.sample_held_out()
        except torch.OutOfMemoryError as problem:
            self.use_less_memory(problem)
            return self.evaluate(name)
        if self.writes:
            path = self.run.folder / "samples" / f"{name}.png"
            picture = grid(result.images, [self.run.held_out[i].text for i in result.shown], columns=4, smallest=192)
            try:
                path.parent.mkdir(exist_ok=True)
                picture.save(path)
            except OSError as problem:
                raise SaveError(f"could not save {path}: {problem}; free some space, then resume the run") from problem
        return result

    def sample_held_out(self) -> Evaluation:
        """Held-out images of the averaged weights, scored."""
        settings = self.run.config.evaluation
        with self.learner.averaged():
            return evaluate(
                self.model,
                self.held_out_cond,
                self.run.held_out,
                self.evaluation_panel,
                self.world,
                num_steps=settings.num_steps,
                images_per_prompt=settings.images_per_prompt,
                batch=self.training.sample_batch,
            )

    def record(self, progress: Progress) -> Progress:
        """Append one line to ``metrics.jsonl``."""
        row: dict[str, Any] = {"iteration": progress.number}
        if progress.iteration:
            row |= progress.iteration.stats
        if progress.evaluation:
            row |= evaluation_row(progress.evaluation, self.run.config)
        if self.writes:
            path = self.run.folder / "metrics.jsonl"
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(finite(row)) + "\n")
            except OSError as problem:
                raise SaveError(f"could not write {path}: {problem}; free some space, then resume the run") from problem
        return progress

    def save(self) -> None:
        """Checkpoint the state after the last whole iteration and export the LoRA."""
        if not self.writes:
            return
        config, number = self.run.config, self.learner.iteration
        save_checkpoint(self.run.folder / "checkpoints", number, self.learner.state(), config.saving.keep)
        try:
            write_lora(self.run.folder / "lora.safetensors", self.trained())
        except (OSError, SafetensorError) as problem:
            raise SaveError(f"could not save {self.run.folder / 'lora.safetensors'}: {problem}") from problem

    def trained(self) -> LoraTensors:
        """The LoRA with the averaged weights, as generation loads it, and what it is."""
        config, rows = self.run.config, [row for row in self.run.metrics() if "evaluation_reward" in row]
        metadata = {
            "format": "pt",
            "densegrpo.run": config.name,
            "densegrpo.method": config.method["name"],
            "densegrpo.model": json.dumps(config.model),
            "densegrpo.rewards": json.dumps(config.rewards),
            "densegrpo.iterations": str(self.learner.iteration),
        }
        if rows:
            metadata["densegrpo.held_out_reward_before"] = str(rows[0]["evaluation_reward"])
            metadata["densegrpo.held_out_reward_after"] = str(rows[-1]["evaluation_reward"])
        with self.learner.averaged() as lora:
            return tensors_of(lora, self.model.lora_prefix, metadata)

    def report(self) -> None:
        """Draw the report, where matplotlib is installed: it comes with the command line, not with ComfyUI."""
        if find_spec("matplotlib") is None:
            log.info("no report.html: it needs matplotlib")
            return
        from .report import write_report

        write_report(self.run)

    def clean_up(self) -> None:
        """Drop what a crash left behind: half-written checkpoints and metrics after the last one."""
        if not self.writes:
            return
        for leftover in (self.run.folder / "checkpoints").glob(".step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        rows = [row for row in self.run.metrics() if row["iteration"] <= self.learner.iteration]
        if not checkpoints(self.run.folder / "checkpoints"):
            rows = []
        write_text(self.run.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
