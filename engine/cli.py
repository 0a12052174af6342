"""Headless training: ``densegrpo``, ``python -m densegrpo.engine.cli`` or
``accelerate launch -m densegrpo.engine.cli``.
"""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .checkpoint import SaveError
from .config import SECTIONS, RunConfig, make_config, read_config
from .knobs import Choice, Knob, Option, options_of
from .models import MODELS, model_options, model_settings
from .recipes import RECIPES, recipe_options
from .rewards import REWARDS, reward_class, reward_options
from .train import RewardError

DEMO_CONFIG = Path(__file__).resolve().parent / "demo" / "demo.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake ends in one sentence, not in a traceback."""
    options = parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, SaveError, RewardError) as problem:
        if os.environ.get("DENSEGRPO_TRACEBACK"):
            raise
        print(f"densegrpo: {problem}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="densegrpo", description="GRPO post-training of flow-matching image models.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    train = add("train", train_command, "start the run that a configuration describes")
    train.add_argument("config", type=Path, help="a JSON file; see `densegrpo recipes` and the README")
    demo = add("demo", demo_command, "train the shipped demo model: no download, a few minutes on a CPU")
    resume = add("resume", resume_command, "continue a run where its newest checkpoint stands")
    resume.add_argument("run", type=Path, help="the run's folder, e.g. runs/demo")
    report = add("report", report_command, "draw report.html of a run again")
    report.add_argument("run", type=Path, help="the run's folder, e.g. runs/demo")
    add("recipes", recipes_command, "list methods, rewards and models with their options and defaults")
    for sub in (train, demo):
        sub.add_argument("--out", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    for sub in (train, demo, resume):
        sub.add_argument("--iterations", type=int, help="train this many iterations in all")
    return top


def train_command(options: argparse.Namespace) -> int:
    """``densegrpo train config.json``."""
    config = with_iterations(read_config(options.config), options.iterations)
    return start(config, options.out, options.config.resolve().parent)


def demo_command(options: argparse.Namespace) -> int:
    """``densegrpo demo``: an older demo run is kept beside the new one."""
    config = with_iterations(read_config(DEMO_CONFIG), options.iterations)
    folder = options.out / config.name
    if folder.exists():
        kept = next(f for n in range(1, 10_000) if not (f := folder.with_name(f"{folder.name}.{n}")).exists())
        folder.rename(kept)
        print(f"kept the older run as {kept}")
    return start(config, options.out, DEMO_CONFIG.parent)


def resume_command(options: argparse.Namespace) -> int:
    """``densegrpo resume RUN``."""
    from .distributed import join_world
    from .run import Run
    from .watch import watch

    run = Run.open(options.run)
    if options.iterations is not None:
        with_iterations(run.config, options.iterations)
        run = run.with_iterations(options.iterations)
    return watch(run, join_world(), resume=True)


def report_command(options: argparse.Namespace) -> int:
    """``densegrpo report RUN``."""
    from .report import write_report
    from .run import Run

    write_report(Run.open(options.run))
    print(options.run / "report.html")
    return 0


def recipes_command(options: argparse.Namespace) -> int:
    """``densegrpo recipes``: everything a configuration can hold."""
    print('Methods, for "method": {"name": ...}\n')
    for name, recipe in RECIPES.items():
        show(f"{name}: {first_line(recipe)}", recipe_options(name))
    print('Rewards, for "rewards": [{"name": ..., "weight": 1.0}]\n')
    for name in REWARDS:
        show(f"{name}: {first_line(reward_class(name))}", reward_options(name))
    print('Models, for "model": {"name": ...}\n')
    for name in MODELS:
        show(f"{name}: {first_line(model_settings(name))}", model_options(name))
    print("Other sections of a configuration\n")
    for name, section in SECTIONS.items():
        show(f'"{name}": {first_line(section)}', options_of(section))
    return 0


def first_line(thing: object) -> str:
    """Of its docstring."""
    return (thing.__doc__ or "").strip().splitlines()[0]


def show(title: str, known: Mapping[str, Option]) -> None:
    """A heading and one line per option."""
    print(title)
    for key, option in known.items():
        default = "required" if option.default is inspect.Parameter.empty else json.dumps(option.default)
        print(f"    {key} = {default}    {describe(option)}")
    print()


def describe(option: Option) -> str:
    """Meaning and allowed values."""
    limits = option.limits
    if isinstance(limits, Knob):
        return f"{limits.tip} ({limits.low:g}..{limits.high:g})"
    if isinstance(limits, Choice):
        return f"{limits.tip} ({', '.join(json.dumps(a) for a in limits.allowed)})"
    return limits.tip


def with_iterations(config: RunConfig, iterations: int | None) -> RunConfig:
    """The configuration with another length, checked like any other."""
    if iterations is None:
        return config
    data = json.loads(config.to_json())
    data["training"]["iterations"] = iterations
    return replace(config, training=make_config(data).training)


def start(config: RunConfig, out: Path, base: Path) -> int:
    """Create a run and train it; with several processes the first creates it."""
    from .distributed import join_world
    from .run import Run
    from .watch import watch

    world = join_world()
    if world.rank == 0:
        Run.create(config, out, base)
    world.wait()
    return watch(Run.open(out / config.name), world, resume=False)


if __name__ == "__main__":
    sys.exit(main())
