"""One run of a comparison in a process of its own: ``python -m densegrpo.engine.compare_worker FOLDER``.
With ``--attached`` it ends when its standard input does, so that it does not outlive a parent that was killed.

``FOLDER`` is a run with a ``budget.json``. It is trained until the budget is spent and measured on the way;
``result.json`` with all measurements is written in one step at the very end.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .checkpoint import write_text
from .compare import read_budget
from .evaluate import drift
from .metrics import finite
from .run import Run, evaluation_row
from .session import Session

Row = dict[str, Any]


def work(folder: Path) -> None:
    """Train and measure the run in ``folder``.

    A CPU is timed by the seconds this process computed, which other programs on the machine do not spoil; a GPU,
    which computes while the process waits, by the clock on the wall.
    """
    run = Run.open(folder)
    session = Session(run)
    on_cpu = session.model.device.type == "cpu"
    rows = list(measurements(session, time.process_time if on_cpu else time.monotonic))
    result = {"clock": "CPU seconds" if on_cpu else "seconds", "rows": finite(rows)}
    write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")


def measurements(session: Session, clock: Callable[[], float]) -> Iterator[Row]:
    """One row before training and one at each measure point of the budget.

    Keys: ``iteration``, ``evaluations`` and ``seconds`` spent on training so far, ``reward`` (held-out, as
    trained), ``scores`` (held-out, label -> mean), ``kl`` (see ``drift``), and ``training_reward``, its mean since the
    row before. Measuring is not counted.
    """
    budget = read_budget(session.run.folder)
    yield measured(session, 0, 0.0, 0.0) | {"training_reward": None}
    evaluations, seconds = 0.0, 0.0
    passed, recent = budget.points(0, 0), []
    start = clock()
    for progress in session.iterations():
        seconds += clock() - start
        assert progress.iteration is not None
        stats: Row = dict(progress.iteration.stats)
        evaluations += stats["evaluations"]
        recent.append(stats)
        points = budget.points(evaluations, seconds)
        if points != passed:
            training_reward = sum(stats["reward"] for stats in recent) / len(recent)
            yield measured(session, progress.number, evaluations, seconds) | {"training_reward": training_reward}
            passed, recent = points, []
        if min(points) == budget.measure_points:
            return
        start = clock()


def measured(session: Session, iteration: int, evaluations: float, seconds: float) -> Row:
    """The held-out scores of the averaged weights; the newest pictures are kept as ``samples/after.png``."""
    evaluation = session.evaluate("before" if iteration == 0 else "after")
    assert evaluation is not None, "a comparison has held-out prompts"
    found = evaluation_row(evaluation, session.run.config)
    spent = {"iteration": iteration, "evaluations": evaluations, "seconds": seconds}
    return spent | {"reward": found["evaluation_reward"], "scores": found["evaluation"], "kl": moved(session)}


def moved(session: Session) -> float:
    """How far the averaged weights are from the untrained model, on up to 32 held-out prompts."""
    prompts, num_steps = min(len(session.run.held_out), 32), session.run.config.evaluation.num_steps
    with session.learner.averaged():
        return drift(session.model, session.held_out_cond, prompts, num_steps, session.training.sample_batch)


def end_with_input() -> None:
    """Wait for the end of the standard input, then leave at once: nothing here is worth saving."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Read the command line and work, with one thread."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--attached", action="store_true")
    given = options.parse_args()
    if given.attached:
        threading.Thread(target=end_with_input, daemon=True).start()
    torch.set_num_threads(1)
    work(given.folder)


if __name__ == "__main__":
    main()
