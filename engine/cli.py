"""Headless training: ``densegrpo``, ``python -m densegrpo.engine.cli`` or
``accelerate launch -m densegrpo.engine.cli``.
"""

import argparse
import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from .calibrate import calibration_options
from .checkpoint import SaveError
from .cli_rewards import add_reward_commands
from .config import SECTIONS, RunConfig, make_config, read_config, read_data
from .knobs import Choice, Knob, Numbers, Option, options_of
from .models import MODELS, model_options, model_settings
from .profiles import MODELS as PROFILE_MODELS
from .profiles import profile
from .recipes import RECIPES, parts_of
from .rewards import MODEL_REWARDS, OTHER_REWARDS, REWARDS, reward_class, reward_options
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
    resume.add_argument("--ignore-alarms", action="store_true", help="do not stop at the guard's alarm any more")
    report = add("report", report_command, "draw report.html of a run again")
    report.add_argument("run", type=Path, help="the run's folder, e.g. runs/demo")
    recipes = add("recipes", recipes_command, "list methods, rewards and models with their options and defaults")
    recipes.add_argument("method", nargs="?", help="show the options of this method")
    recipes.add_argument("--profile", help="what it uses with a model, as part of a configuration: sd35, flux, demo")
    add_reward_commands(add)
    compare = add("compare", compare_command, "train several methods side by side and report how they differ")
    compare.add_argument("plan", type=Path, help="a JSON file, described in engine/compare_plan.py")
    compare.add_argument("--processes", type=int, help="runs at a time (default: one per core; on a GPU 1)")
    calibrate = add("calibrate", calibrate_command, "find the noise each step bears, for the option noise_table")
    calibrate.add_argument("config", type=Path, help="a JSON file as for train; its model, method, rewards, prompts")
    calibrate.add_argument(
        "--out", type=Path, default=Path("noise_table.json"), help="the table; its picture is put beside it"
    )
    for name, option in calibration_options().items():
        text = f"{describe(option)}; default {json.dumps(option.default)}"
        calibrate.add_argument(f"--{name}", type=option.kind, metavar=name.upper(), help=text.replace("%", "%%"))
    for sub in (train, demo, compare):
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
        run = run.continued(options.iterations)
    if options.ignore_alarms:
        run = run.adopt(replace(run.config, evaluation=replace(run.config.evaluation, stop_when_gamed=False)))
    return watch(run, join_world(), resume=True)


def compare_command(options: argparse.Namespace) -> int:
    """``densegrpo compare plan.json``: given again, it goes on with the runs that are missing."""
    from .compare import compare, default_processes, why
    from .compare_plan import read_comparison

    start, comparison = time.monotonic(), read_comparison(options.plan)
    processes = default_processes() if options.processes is None else options.processes
    try:
        finished, failed = compare(comparison, options.out, options.plan.resolve().parent, processes)
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, the same command goes on with the others", file=sys.stderr)
        return 130
    for job in failed:
        print(f"densegrpo: {why(job)}", file=sys.stderr)
    if finished:
        print(f"report: {options.out / comparison.name / 'comparison.html'}, and .md, .csv, .png beside it")
    minutes = (time.monotonic() - start) / 60
    print(f"{len(finished)} runs are finished, {len(failed)} failed; this took {minutes:.1f} min")
    return 1 if failed else 0


def calibrate_command(options: argparse.Namespace) -> int:
    """``densegrpo calibrate config.json``: a table that the configuration names already is made anew."""
    import torch
    from tqdm import tqdm

    from .calibrate import Round, calibrate, make_calibration
    from .calibration_picture import save_table
    from .models import load_model
    from .noise_table import describe as table_as_text
    from .noise_table import make_table
    from .prompts import load_prompts
    from .recipes import make_recipe
    from .rewards import make_panel

    if options.out.suffix != ".json" or not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out must be a .json file in a folder that exists, got {options.out}")
    given = {key: getattr(options, key) for key in calibration_options()}
    settings, rule = make_calibration({key: value for key, value in given.items() if value is not None})
    data = read_data(options.config)
    if isinstance(data, dict) and isinstance(data.get("method"), dict):
        data["method"].pop("noise_table", None)
    config = make_config(data)
    training, recipe = config.training, make_recipe(**config.method)
    prompts = load_prompts(config.prompts, options.config.resolve().parent)
    panel = make_panel(config.rewards, config.reward_mode)
    model = load_model(seed=training.seed, lora=config.lora, **config.model)
    cond = model.encode([prompt.text for prompt in prompts])
    size = {"num_steps": training.num_steps, "seed": training.seed, "batch": training.sample_batch}
    rounds = calibrate(model, cond, prompts, panel, recipe, settings, rule, **size)
    print(f"at most {settings.evaluations(training.num_steps)} model evaluations", file=sys.stderr)
    with tqdm(total=settings.rounds + 2, unit="round", desc="calibrate", dynamic_ncols=True) as bar:

        def follow(found: Round) -> None:
            bar.update()
            bar.set_postfix_str(f"imbalance {found.balance.imbalance.abs().mean():.2f}")

        what = {"kernel": recipe.noise.kernel, "model": config.model, "rewards": config.rewards}
        try:
            table = make_table(rounds, follow, settings, **what)
        except KeyboardInterrupt:
            bar.close()
            print(f"stopped; nothing was written to {options.out}", file=sys.stderr)
            return 130
        except torch.OutOfMemoryError as problem:
            raise ValueError(
                f"out of memory ({problem}); lower training.sample_batch, now {training.sample_batch}, or the model's "
                "resolution, and calibrate again"
            ) from problem
    save_table(options.out, table)
    print(table_as_text(table))
    print(f"table: {options.out}   picture: {options.out.with_suffix('.png')}")
    print(
        f'to train with it, put "noise_table": "{options.out.name}" into "method", and the file beside {options.config}'
    )
    return 0


def report_command(options: argparse.Namespace) -> int:
    """``densegrpo report RUN``."""
    from .report import write_report
    from .run import Run

    write_report(Run.open(options.run))
    print(options.run / "report.html")
    return 0


def recipes_command(options: argparse.Namespace) -> int:
    """``densegrpo recipes [METHOD [--profile NAME]]``: everything a configuration can hold."""
    if options.method:
        return method_command(options.method, options.profile)
    print('Methods, for "method": {"name": ...}; `densegrpo recipes METHOD` shows the options of one\n')
    for name, recipe in RECIPES.items():
        print(f"{name}: {first_line(recipe)}")
    print(f'\nTheir settings by model, for "profile": ...\n\n{", ".join(PROFILE_MODELS)}\n')
    print('Rewards, for "rewards": [{"name": ..., "weight": 1.0}]\n')
    for name in (*REWARDS, *MODEL_REWARDS, *OTHER_REWARDS):
        show(f"{name}: {first_line(reward_class(name))}", reward_options(name))
    print('Models, for "model": {"name": ...}\n')
    for name in MODELS:
        show(f"{name}: {first_line(model_settings(name))}", model_options(name))
    print("Other sections of a configuration\n")
    for name, section in SECTIONS.items():
        show(f'"{name}": {first_line(section)}', options_of(section))
    return 0


def method_command(name: str, profile_name: str | None) -> int:
    """Options of one method, or its profile as JSON to start a configuration from."""
    parts = parts_of(name)
    if profile_name is None:
        print(f"{name}: {inspect.cleandoc(RECIPES[name].__doc__ or '')}\n")
        for part, value in parts.items():
            own = {key: o._replace(default=getattr(value, key)) for key, o in options_of(type(value)).items()}
            show(f"{part}: {first_line(type(value))}", own)
        for model in PROFILE_MODELS:
            print(f'    "profile": "{model}"    {profile(name, model).source}')
        return 0
    found = profile(name, profile_name)
    print(json.dumps(found.sections, indent=2))
    print(f"source: {found.source}", file=sys.stderr)
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
    if isinstance(limits, Numbers):
        return f"{limits.tip} ({limits.low}..{limits.high})"
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
    from .run import Run, check_processes
    from .watch import watch

    world = join_world()
    check_processes(config, world)
    if world.rank == 0:
        Run.create(config, out, base)
    world.wait()
    return watch(Run.open(out / config.name), world, resume=False)


def entry() -> NoReturn:
    """What the program ``densegrpo`` does."""
    end_process(main())


def end_process(status: int) -> NoReturn:
    """Exit; at once when a launcher started several processes.

    Threads of torch's process group let go of tensors late, for which they need the interpreter. One that meets an
    interpreter which is being taken down aborts the process ("terminate called without an active exception"), and the
    launcher then calls a run failed that is saved and complete.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    entry()
