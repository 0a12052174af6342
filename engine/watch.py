"""What a person at a terminal sees of a run."""

import sys

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .distributed import World
from .run import HELD_OUT, Run
from .session import BEST_LORA, LORA, Progress, Session


def watch(run: Run, world: World, resume: bool) -> int:
    """Train ``run`` with a progress bar; returns the exit status.

    Ctrl-C saves and says how to go on; so does running out of memory, with what to lower.
    """
    quiet = world.rank != 0
    session = Session(run, world, resume=resume)
    total = run.config.training.iterations
    bar = tqdm(total=total, disable=quiet, unit="iteration", desc=run.config.name, dynamic_ncols=True)
    try:
        with logging_redirect_tqdm():  # a message, such as the address of the vote page, gets a line of its own
            for progress in session.execute():
                bar.update(progress.number - bar.n)
                bar.set_postfix_str(postfix(progress))
    except (KeyboardInterrupt, torch.OutOfMemoryError) as reason:
        bar.close()
        if not quiet:
            print(stopped(run, session, reason), file=sys.stderr)
        return 130 if isinstance(reason, KeyboardInterrupt) else 1
    finally:
        bar.close()
    if not quiet:
        print(f"run folder: {run.folder}   LoRA: {LORA}   report: report.html")
        summary(run, session)
    return 0


def postfix(progress: Progress) -> str:
    """The numbers beside the bar."""
    parts = []
    if progress.iteration:
        reward = progress.iteration.stats["reward"]
        parts.append(f"reward {reward:.3f}" if reward == reward else "no reward")
    if progress.evaluation:
        means = progress.evaluation.means.items()
        parts.append("held-out " + ", ".join(f"{name.removeprefix(HELD_OUT)} {mean:.3f}" for name, mean in means))
    if progress.alarms:
        parts.append("GAMED")
    return ", ".join(parts)


def stopped(run: Run, session: Session, reason: BaseException) -> str:
    """What was saved and what to do next."""
    saved = f"saved after iteration {session.learner.iteration}; continue with: densegrpo resume {run.folder}"
    if isinstance(reason, KeyboardInterrupt):
        return f"stopped; {saved}"
    training = session.training
    return (
        f"out of memory with training.train_batch = {training.train_batch} and training.sample_batch = "
        f"{training.sample_batch}, after trying larger ones; lower the model's resolution, close other programs that "
        f"use the GPU, or take a smaller model; {saved}"
    )


def summary(run: Run, session: Session) -> None:
    """The closing lines: held-out reward before and after, and what the guard against gaming said."""
    every = run.metrics()
    rows = [row for row in every if row.get("evaluation_reward") is not None]
    if rows:
        base, trained = rows[0]["evaluation_reward"], rows[-1]["evaluation_reward"]
        images = rows[-1]["evaluation_images"]
        before, after = rows[0]["evaluation"], rows[-1]["evaluation"]
        for name in (name for name, mean in before.items() if name.startswith(HELD_OUT) and mean is not None):
            if after.get(name) is not None:
                print(f"only measured: {name.removeprefix(HELD_OUT)} {before[name]:.3f} -> {after[name]:.3f}")
        print(f"held-out reward: base {base:.3f} -> trained {trained:.3f} ({images} images)")
    alarms = [alarm for row in every for alarm in row.get("alarms", ())]
    if alarms:
        print(f"{len(alarms)} times a held-out reward fell while the trained one rose; the last: {alarms[-1]}")
        if (run.folder / BEST_LORA).exists():
            print(f"the LoRA that was best on held-out rewards: {BEST_LORA}")
    if session.gamed:
        print(f"stopped there (stop_when_gamed); to go on all the same: densegrpo resume {run.folder} --ignore-alarms")
