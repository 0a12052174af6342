"""Working on a run: training, evaluating, saving, from its start or from where it stopped."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError

from .checkpoint import SaveError, checkpoints, load_checkpoint, save_checkpoint
from .config import RunConfig
from .distributed import Solo, World
from .evaluate import Evaluation, evaluate
from .guard import Guard
from .learner import Learner
from .lora import LoraTensors, tensors_of, write_lora
from .metrics import append_row, write_rows
from .models import load_model
from .pictures import grid
from .protocols import FlowModel
from .recipes import make_recipe
from .reward_stats import Idleness
from .rewards import members, published
from .run import HELD_OUT, Run, check_processes, evaluation_panel, evaluation_row, training_panel
from .train import Iteration, train

log = logging.getLogger("densegrpo.run")
LORA, BEST_LORA = "lora.safetensors", "lora_best.safetensors"
"""The newest, and the best on held-out rewards."""


@dataclass(slots=True)
class Progress:
    """What ``execute`` yields: an iteration, an evaluation, or both."""

    number: int
    total: int
    iteration: Iteration | None = None
    evaluation: Evaluation | None = None
    alarms: list[str] = field(default_factory=list)
    """What the guard says of the evaluation."""
    warnings: list[str] = field(default_factory=list)
    """What else to see to: images without a score, rewards that teach nothing."""


def make_guard(config: RunConfig) -> Guard:
    """Compares the trained and the held-out rewards of evaluations."""
    trained = {one.label: one.weight for one in members(config.rewards)}
    held_out = {one.label: one.weight for one in members(config.held_out_rewards, HELD_OUT)}
    return Guard(trained, held_out, config.evaluation.alarm_after)


def missing_scores(evaluation: Evaluation) -> list[str]:
    """Which rewards could not score all images of an evaluation, which says less of them then, and why."""
    count = evaluation.num_images
    return [
        f"{label}: {round(share * count)} of {count} held-out images have no score: {evaluation.reasons[label]}"
        for label, share in evaluation.missing.items()
    ]


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
        check_processes(config, self.world)
        self.guard, self.idleness = make_guard(config), Idleness()
        self.told: set[str] = set()
        """Alarms and warnings that were logged."""
        self.cond = self.model.encode([p.text for p in run.prompts])
        self.held_out_cond = self.model.encode([p.text for p in run.held_out]) if run.held_out else None
        self.writes = self.world.rank == 0
        if resume:
            self.learner.load_state(load_checkpoint(run.folder / "checkpoints"))
            self.guard.load(run.folder, self.learner.iteration)
        self.gamed = False

    def execute(self) -> Iterator[Progress]:
        """Train to the end, saving on the way and when it ends early, by Ctrl-C or anything else.

        Raises what ended it; what was learnt until the last whole iteration is in the newest checkpoint.
        """
        self.clean_up()
        total = self.run.config.training.iterations
        try:
            with self.panel.session(self.run.folder):
                if self.learner.iteration == 0 and not self.run.metrics():
                    yield self.record(self.judged(Progress(0, total, None, self.evaluate("before"))))
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
            progress.warnings += [f"some images have no score: {reason}" for reason in iteration.errors]
            progress.warnings += self.idleness.add(iteration.stats)
            try:
                progress.evaluation = self.due_evaluation(iteration.number)
                self.judged(progress)
            finally:  # when the evaluation is cancelled or fails, the iteration still counts
                self.record(progress)
            if iteration.number % config.saving.every == 0:
                self.save()
            yield progress
            if self.gamed:
                return

    def judged(self, progress: Progress) -> Progress:
        """The same with the guard's alarms; the best so far on held-out rewards is kept."""
        if progress.evaluation is None:
            return progress
        progress.warnings += missing_scores(progress.evaluation)
        settings, folder = self.run.config.evaluation, self.run.folder
        last = progress.number == self.training.iterations
        progress.alarms = self.guard.add(progress.number, progress.evaluation.scores, last=last)
        progress.warnings += self.guard.unjudged()
        self.gamed = bool(progress.alarms) and settings.stop_when_gamed
        if self.writes:
            self.guard.save(folder)
            if self.guard.is_best():
                save_checkpoint(folder / "best", progress.number, self.learner.state(), 1)
                self.export(BEST_LORA)
        return progress

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
        before = rows[-1].get("warnings", [])
        progress = self.judged(Progress(number, self.training.iterations, None, evaluation, warnings=before))
        if self.writes:
            rows[-1] |= self.said(progress)
            write_rows(self.run.folder, rows)
        return progress

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
        row |= self.said(progress)
        if self.writes:
            append_row(self.run.folder, row)
        return progress

    def said(self, progress: Progress) -> dict[str, Any]:
        """What an evaluation, alarms and warnings add to a line of metrics; new ones are logged, by one process."""
        for sentence in (*progress.alarms, *progress.warnings):
            if self.writes and sentence not in self.told:
                log.warning("iteration %d: %s", progress.number, sentence)
            self.told.add(sentence)
        row = evaluation_row(progress.evaluation, self.run.config) if progress.evaluation else {}
        lists = {"alarms": progress.alarms, "warnings": progress.warnings}
        return row | {name: found for name, found in lists.items() if found}

    def save(self) -> None:
        """Checkpoint the state after the last whole iteration and export the LoRA."""
        if not self.writes:
            return
        config, number = self.run.config, self.learner.iteration
        save_checkpoint(self.run.folder / "checkpoints", number, self.learner.state(), config.saving.keep)
        self.export(LORA)

    def export(self, name: str) -> None:
        """Write the LoRA as it is now into the run's folder."""
        try:
            write_lora(self.run.folder / name, self.trained())
        except (OSError, SafetensorError) as problem:
            raise SaveError(f"could not save {self.run.folder / name}: {problem}") from problem

    def trained(self) -> LoraTensors:
        """The LoRA with the averaged weights, as generation loads it, and what it is."""
        config, rows = self.run.config, [row for row in self.run.metrics() if row.get("evaluation_reward") is not None]
        metadata = {
            "format": "pt",
            "densegrpo.run": config.name,
            "densegrpo.method": config.method["name"],
            "densegrpo.model": json.dumps(config.model),
            "densegrpo.rewards": json.dumps([published(entry) for entry in config.rewards]),
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
        for best in checkpoints(self.run.folder / "best"):
            if int(best.name.removeprefix("step_")) > self.learner.iteration:
                shutil.rmtree(best, ignore_errors=True)
        rows = [row for row in self.run.metrics() if row["iteration"] <= self.learner.iteration]
        if not checkpoints(self.run.folder / "checkpoints"):
            rows = []
        write_rows(self.run.folder, rows)
