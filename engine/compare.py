"""Methods side by side: ``densegrpo compare plan.json``. Same prompts, same measurement, several seeds.

``compare_plan`` says what a plan holds, ``compare_worker`` does one run, ``compare_report`` draws the result.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .checkpoint import SaveError, write_text
from .compare_plan import Budget, Comparison, Job
from .packages import pip_install
from .run import Run

Worker = subprocess.Popen[bytes]


def compare(comparison: Comparison, out: Path, base: Path, processes: int) -> tuple[list[Job], list[Job]]:
    """Do what is missing of a comparison in ``out/<name>`` and draw its report; returns (finished, failed) runs.

    Raises ValueError when a configuration is wrong, or when the folder holds finished runs of another plan.
    """
    if processes < 1:
        raise ValueError(f"processes (runs at a time) must be at least 1, got {processes}")
    if find_spec("matplotlib") is None:
        raise ValueError(f"the report of a comparison needs matplotlib; get it with:  {pip_install('matplotlib')}")
    from .compare_report import write_comparison

    folder = out / comparison.name
    jobs = comparison.jobs(folder, base)
    missing = missing_jobs(jobs)
    failed = run_jobs(missing, len(jobs) - len(missing), base, processes)
    finished = [job for job in jobs if job.result.exists()]
    if finished:
        write_comparison(comparison, finished, folder)
    return finished, failed


def missing_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Those without a result. Raises ValueError when a finished run was made with another configuration.

    So a plan may grow by tasks, methods and seeds; finished runs are neither mixed with others nor thrown away.
    """
    missing = []
    for job in jobs:
        if not job.result.exists():
            missing.append(job)
            continue
        then, now = stored(job).facts(), job.facts()
        changed = [key for key in {**now, **then} if now.get(key) != then.get(key)]
        if changed:
            raise ValueError(
                f"{job.run.folder} is a finished run of another plan ({changes(changed[0], then, now)}); give another "
                "--out or another name, or delete that folder to run it again"
            )
    return missing


def changes(key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One difference in words."""
    if key in ("prompts", "held_out_prompts"):
        return f"its {key} were others"
    return f"{key} was {then.get(key, 'not given')!r}, is {now.get(key, 'not given')!r}"


def stored(job: Job) -> Job:
    """The same job as its folder has it."""
    return job._replace(run=Run.open(job.run.folder), budget=read_budget(job.run.folder))


def read_budget(folder: Path) -> Budget:
    """The budget of the run in ``folder``."""
    return Budget(**json.loads((folder / "budget.json").read_text(encoding="utf-8")))


def prepare(job: Job, base: Path) -> None:
    """Make the run's folder anew; what a run that did not finish left there is dropped."""
    folder = job.run.folder
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as problem:
        raise SaveError(f"could not empty {folder}: {problem}; delete it, then start again") from problem
    Run.create(job.run.config, folder.parent, base)
    write_text(folder / "budget.json", json.dumps(asdict(job.budget)) + "\n")


def run_jobs(jobs: Sequence[Job], num_finished: int, base: Path, processes: int) -> list[Job]:
    """Work on all ``jobs``, ``processes`` at a time, each in a process of its own; returns those that failed.

    ``num_finished`` others were finished earlier. When it ends by an exception, Ctrl-C included, the workers are
    stopped and finished runs are kept.
    """
    waiting, failed = list(jobs), []
    working: list[tuple[Job, Worker]] = []
    bar = tqdm(total=num_finished + len(jobs), initial=num_finished, unit="run", desc="compare", dynamic_ncols=True)
    try:
        while waiting or working:
            while waiting and len(working) < processes:
                job = waiting.pop(0)
                prepare(job, base)
                working.append((job, start_worker(job.run.folder)))
            time.sleep(0.05)
            ended = [job for job, worker in working if worker.poll() is not None]
            working = [(job, worker) for job, worker in working if worker.returncode is None]
            failed += [job for job in ended if not job.result.exists()]
            for job in ended:
                bar.update()
                bar.set_postfix_str(f"{job.task}, {job.method}, seed {job.seed}")
    finally:
        bar.close()
        for _, worker in working:
            worker.terminate()
        for _, worker in working:
            worker.wait()
    return failed


def start_worker(folder: Path) -> Worker:
    """A process with one thread that trains the run in ``folder``; what it says goes to ``worker.log`` there."""
    command = [sys.executable, "-m", f"{__package__}.compare_worker", str(folder), "--attached"]
    with (folder / "worker.log").open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closed by the system when this process ends, however it ends
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )


def default_processes() -> int:
    """One per core; one alone on a GPU, where runs side by side would spoil each other's seconds."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def why(job: Job) -> str:
    """The last words of a worker that failed."""
    path = job.run.folder / "worker.log"
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{job.task}, {job.method}, seed {job.seed}: {lines[-1] if lines else 'the process was ended'} (see {path})"
