"""Measurements on this machine: ``make bench``, or ``python -m densegrpo.engine.bench``.

On a CPU the shipped demo model is measured; on a CUDA device also random-weight SD3.5-medium and FLUX.1 shapes in
bfloat16 (no download). Rewards are measured in ``bench_rewards.py``. Counts are exact; times are the best of several
runs, one thread.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Plan, Prompt, Trajectory, join
from .distributed import Solo
from .learner import Learner, OptimizerSettings
from .lora import LoraSettings
from .models.tiny import DemoSettings
from .probe import score
from .prompts import load_prompts
from .protocols import FlowModel
from .random_weights import SHAPES, RandomModel, Shape
from .recipes import RECIPES, Recipe, make_recipe
from .rewards import Panel, make_reward
from .rollout import finish_by_ode, rollout
from .train import Clock, Counted, TrainSettings, train
from .update import batches

TIMED = ("flow_grpo", "dense_grpo", "tempflow_grpo", "g2rpo")
"""One of each kind; the other methods run the same code on other tables."""


class CallCounted(Counted):
    """Also counts the batched calls."""

    calls = 0

    def velocity(self, x: Tensor, sigma: Tensor, cond: Any, rows: Tensor) -> Tensor:
        """Count and pass on."""
        self.calls += 1
        return super().velocity(x, sigma, cond, rows)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Shortest wall time of ``work`` after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def one_group(model: FlowModel, recipe: Recipe, num_steps: int) -> tuple[Plan, Tensor]:
    """The plan of one prompt and the schedule."""
    sigmas = model.schedule(num_steps)
    return join([recipe.plan(model.latent_shape, sigmas, (0, 0, 0))]), sigmas


def probe_one_by_one(model: FlowModel, cond: Any, traj: Trajectory, chunk: int) -> None:
    """What the wave replaces: finish each state by itself."""
    for k in range(len(traj.sigmas) - 1):
        finish_by_ode(model, cond, traj.states[:, k], traj.sigmas[k:], traj.plan.prompt, chunk)


def count_table(model: FlowModel, cond: Any, num_steps: int) -> None:
    """What one prompt costs, by method."""
    say(f"cost of one prompt, T = {num_steps}, group sizes of the papers: evaluations and batched calls of sampling,")
    say("images to score, transitions that are trained and the states they share (one training forward each)")
    for name in RECIPES:
        recipe = make_recipe(name)
        plan, sigmas = one_group(model, recipe, num_steps)
        counted: Any = CallCounted(model)
        traj, finals = rollout(counted, cond, plan, sigmas, recipe.noise.step, recipe.probe, chunk=10**6)
        states = sum(len(batch.state_chain) for batch in batches(traj, plan.train, 10**6))
        say(
            f"  {name:14} {counted.evaluations:6} evaluations  {counted.calls:4} calls  {len(finals.latents):5} images"
            f"  {int(plan.train.sum()):5} transitions  {states:5} states"
        )


def wave_table(model: FlowModel, cond: Any, num_steps: int, chunk: int, sizes: tuple[int, ...]) -> None:
    """Wall time of probing one by one over that of the wave, by number of chains."""
    say(f"time of one-by-one probing / time of the wave, T = {num_steps}, at most {chunk} rows per call")
    for size in sizes:
        wave_row(model, cond, num_steps, chunk, size)


def wave_row(model: FlowModel, cond: Any, num_steps: int, chunk: int, size: int) -> None:
    """One line of ``wave_table``."""
    recipe = make_recipe("dense_grpo", group_size=max(size, 2))
    plan, sigmas = one_group(model, recipe, num_steps)
    plan = join([first_chains(plan, size)])
    plain = make_recipe("flow_grpo", group_size=max(size, 2))
    traj, _ = rollout(model, cond, plan, sigmas, plain.noise.step, plain.probe, chunk)

    def wave() -> None:
        rollout(model, cond, plan, sigmas, recipe.noise.step, recipe.probe, chunk)

    def singly() -> None:
        rollout(model, cond, plan, sigmas, plain.noise.step, plain.probe, chunk)
        probe_one_by_one(model, cond, traj, chunk)

    in_wave, one_by_one = best_seconds(wave, model.device), best_seconds(singly, model.device)
    say(f"  {size:3} chains  {one_by_one / in_wave:5.2f}   ({one_by_one:.3f} s / {in_wave:.3f} s)")


def first_chains(plan: Plan, count: int) -> Plan:
    """The first chains of a plan."""
    rows = {n: getattr(plan, n)[:count] for n in ("noise", "prompt", "root", "rate", "train", "group", "seed", "key")}
    return Plan(**rows)


def forward_rate(model: FlowModel, cond: Any, sizes: tuple[int, ...]) -> float:
    """Best forward rate over batch sizes, evaluations per second: the floor that the rest is measured against."""
    rates = []
    for size in sizes:
        x = torch.randn(size, *model.latent_shape, device=model.device)
        sigma, rows = torch.full((size,), 0.5, device=model.device), torch.zeros(size, dtype=torch.long)
        with torch.no_grad():
            seconds = best_seconds(lambda x=x, s=sigma, r=rows: model.velocity(x, s, cond, r), model.device)
        rates.append(size / seconds)
    return max(rates)


def train_table(model: FlowModel, cond: Any, prompts: list[Prompt], panel: Panel, settings: TrainSettings) -> None:
    """Speed, memory and where the time goes, by method."""
    floor = forward_rate(model, cond, tuple({settings.train_batch, settings.sample_batch, 48}))
    say(f"best forward rate {floor:.0f} evaluations/s; a trained transition counts 3 (forward and backward)")
    for name in TIMED:
        recipe = make_recipe(name, group_size=6 if name == "tempflow_grpo" else 12)
        counted: Any = CallCounted(model)
        clock = Clock(model.device)
        plan, sigmas = one_group(model, recipe, settings.num_steps)
        _, finals = rollout(counted, cond, plan, sigmas, recipe.noise.step, recipe.probe, settings.sample_batch)
        score(model, finals, prompts, panel, settings.sample_batch, clock)
        learner = Learner(model.lora, OptimizerSettings())
        rows: list[dict[str, Any]] = [
            dict(it.stats) for it in train(model, cond, prompts, panel, recipe, learner, settings, Solo())
        ][1:]
        mean = {k: sum(r[k] for r in rows) / len(rows) for k in rows[0] if k.startswith(("seconds", "transitions"))}
        evaluations = counted.evaluations * settings.groups
        images = len(finals.latents) * settings.groups
        share = {part: mean[f"seconds_{part}"] / mean["seconds"] for part in ("rollout", "update", "decode", "reward")}
        say(
            f"  {name:12} {mean['seconds']:.2f} s per iteration;"
            f" rollout {images / mean['seconds_rollout']:.0f} images/s ="
            f" {100 * evaluations / mean['seconds_rollout'] / floor:.0f} % of the forward rate;"
            f" training {mean['transitions'] / mean['seconds_update']:.0f} transitions/s ="
            f" {100 * 3 * mean['transitions'] / mean['seconds_update'] / floor:.0f} %;"
            f" time: {', '.join(f'{k} {100 * v:.0f} %' for k, v in share.items())}"
        )
    say(f"peak memory {peak_memory(model.device) / 2**20:.0f} MiB")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device, or of the process on a CPU (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def bench_demo() -> None:
    """The shipped demo model."""
    model = DemoSettings().load(LoraSettings(rank=8, alpha=16.0), 0)
    prompts = load_prompts("demo:train", Path())[:4]
    cond = model.encode([p.text for p in prompts])
    panel = Panel([("shapes", make_reward("shapes", score="partial"), 1.0)])
    size = sum(p.numel() for p in model.network.parameters()) / 1e6
    say(f"\ndemo model, {size:.1f} M parameters, {model.device.type}, {model.dtype}")
    count_table(model, cond, 10)
    wave_table(model, cond, 10, 64, (1, 12, 48))
    settings = TrainSettings(iterations=5, groups=4, num_steps=8, sample_batch=64, train_batch=64)
    train_table(model, cond, prompts, panel, settings)


def bench_shape(title: str, shape: Shape, device: torch.device, dtype: torch.dtype, settings: TrainSettings) -> None:
    """Random weights in a real model's shape."""
    model = RandomModel(shape, device, dtype, guidance=4.5, cfg_grad="detach")
    size = sum(p.numel() for p in model.network.parameters()) / 1e9
    say(f"\n{title}: {size:.2f} G random parameters, {device.type}, {dtype}, guidance {model.scale}")
    prompts = [Prompt("a prompt", {})] * 4
    panel = Panel([("brightness", make_reward("brightness"), 1.0)])
    count_table(model, None, settings.num_steps)
    wave_table(model, None, settings.num_steps, settings.sample_batch, (1, 12))
    train_table(model, None, prompts, panel, settings)


def bench_shapes() -> None:
    """SD3.5-medium and FLUX.1 with random weights, where there is a GPU."""
    if not torch.cuda.is_available():
        say("\nno GPU here: the SD3.5-medium and FLUX.1 shapes are measured on one")
        return
    for title, shape in SHAPES.items():
        settings = TrainSettings(iterations=3, groups=1, num_steps=10, sample_batch=24, train_batch=8)
        bench_shape(title, shape, torch.device("cuda"), torch.bfloat16, settings)
        torch.cuda.empty_cache()


def main() -> None:
    """Everything this machine can run, or a part of it."""
    from .bench_rewards import bench_rewards  # which imports this module

    parts = {"demo": bench_demo, "shapes": bench_shapes, "rewards": bench_rewards}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=parts, help="measure this part; without it all of them")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    say(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread{accelerator}")
    for name, part in parts.items():
        if only in (None, name):
            part()


if __name__ == "__main__":
    main()
