"""The plan of a comparison: one JSON object, checked as a whole before the first run starts.


| key              | what it holds                                                                             |
|------------------|-------------------------------------------------------------------------------------------|
| "name"           | also the folder of the comparison                                                         |
| "base"           | a configuration of a run, as far as all runs agree                                        |
| "tasks"          | name -> what else the configuration holds there: rewards, prompts, held-out prompts; and  |
|                  | a "budget" of its own, an object with some of the last three keys below                   |
| "methods"        | name -> likewise, of ``METHOD_KEYS`` only; the first one is the baseline                  |
| "seeds"          | whole numbers; differences between methods are taken seed by seed                         |
| "evaluations"    | model evaluations that each run may spend; 0 = no such budget                             |
| "seconds"        | likewise seconds; with both, a run goes on until both are spent                           |
| "measure_points" | held-out measurements on the way along each budget                                        |

A method whose ``training`` says ``"shuffle_rewards": true`` is a control: nothing can be learnt from its rewards.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from .config import RunConfig, check_name, make_config
from .errors import errors_named
from .knobs import Knob, check, options_of, suggest
from .noise_table import read_table
from .prompts import load_prompts
from .recipes import make_recipe
from .run import Run, evaluation_panel, training_panel

METHOD_KEYS = ("method", "optimizer", "training", "lora", "reward_mode")
"""What may differ between methods; the rest belongs to the task, or they would not be compared on the same."""
OURS = {"training": ("iterations", "seed"), "evaluation": ("every",), "name": (), "saving": ()}
"""What the comparison itself sets: section -> its options, or nothing for the whole section."""
ENDLESS = 1_000_000
"""Iterations: more than any budget pays for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long each run goes on, and how often it is measured on the way."""

    evaluations: Annotated[float, Knob(0, 1e15, "model evaluations of each run; 0 = no such budget")] = 0
    seconds: Annotated[float, Knob(0, 1e9, "seconds of each run; 0 = no such budget")] = 0
    measure_points: Annotated[int, Knob(1, 1000, "held-out measurements along each budget")] = 8

    def points(self, evaluations: float, seconds: float) -> list[int]:
        """How many measure points lie behind on each budget that is set."""
        used = [(evaluations, self.evaluations), (seconds, self.seconds)]
        return [min(int(self.measure_points * spent / budget), self.measure_points) for spent, budget in used if budget]


class Job(NamedTuple):
    """One run of a comparison: what one worker process does."""

    task: str
    method: str
    seed: int
    run: Run
    budget: Budget

    @property
    def result(self) -> Path:
        """Written when the run is over: its measurements."""
        return self.run.folder / "result.json"

    def rows(self) -> list[dict[str, Any]]:
        """The measurements of the finished run, oldest first; the keys are described in ``compare_worker``."""
        return json.loads(self.result.read_text(encoding="utf-8"))["rows"]

    def clock(self) -> str:
        """What its seconds are: "CPU seconds" or "seconds"."""
        return json.loads(self.result.read_text(encoding="utf-8"))["clock"]

    def facts(self) -> dict[str, Any]:
        """Everything that determines the result, as plain values by name."""
        whole = json.loads(self.run.config.to_json()) | asdict(self.budget)
        sections = {name: value for name, value in whole.items() if isinstance(value, dict)}
        facts = {f"{name}.{key}": item for name, value in sections.items() for key, item in value.items()}
        facts |= {name: value for name, value in whole.items() if name not in sections}
        return facts | {"prompts": self.run.prompts, "held_out_prompts": self.run.held_out}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A checked plan."""

    name: str
    base: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    budget: Budget

    def config(self, task: str, method: str, seed: int) -> RunConfig:
        """The configuration of one run. Raises ValueError that names task and method."""
        fixed = {
            "name": f"seed_{seed}",
            "training": {"iterations": ENDLESS, "seed": seed},
            "evaluation": {"every": 0},
            "saving": {"every": ENDLESS},
        }
        with errors_named(f"task {task!r}, method {method!r}"):
            shared = {key: value for key, value in self.tasks[task].items() if key != "budget"}
            config = make_config(merged(self.base, shared, self.methods[method], fixed))
            make_recipe(**config.method)
            if not config.held_out_prompts:
                raise ValueError("held_out_prompts are missing; methods are compared on them, so add some")
        return config

    def budget_of(self, task: str) -> Budget:
        """The plan's, with what the task says."""
        title, own = f"tasks: {task}: budget", self.tasks[task].get("budget", {})
        if not isinstance(own, dict):
            raise ValueError(f'{title} must be an object such as {{"evaluations": 1000}}, got {own!r}')
        return make_budget(asdict(self.budget) | own, title)

    def jobs(self, folder: Path, base: Path) -> list[Job]:
        """All runs, whole seeds first, so that a comparison that is stopped early is still a fair one.

        ``folder`` is that of the comparison; prompt files are read relative to ``base``. Raises ValueError
        when a configuration is wrong or prompts do not suit a reward.
        """
        pairs = [(task, method) for task in self.tasks for method in self.methods]
        prompts = {}
        for task, method in pairs:
            config = self.config(task, method, self.seeds[0])
            with errors_named(f"task {task!r}, method {method!r}"):
                lists = load_prompts(config.prompts, base), load_prompts(config.held_out_prompts, base)
                training, evaluation = training_panel(config), evaluation_panel(config)
                if training.interactive or evaluation is None:
                    raise ValueError("people's votes differ from run to run; a comparison needs other rewards")
                training.validate(lists[0])
                evaluation.validate(lists[1])
            prompts[task, method] = lists
        found = []
        for seed in self.seeds:
            for task, method in pairs:
                config = self.config(task, method, seed)
                run = Run(folder / task / method / config.name, config, *prompts[task, method])
                found.append(Job(task, method, seed, run, self.budget_of(task)))
        return found

    def to_json(self) -> str:
        """The plan again."""
        data = asdict(self)
        budget = data.pop("budget")
        return json.dumps(data | budget, indent=2)


REQUIRED = ("name", "base", "tasks", "methods", "seeds")


def read_comparison(path: Path) -> Comparison:
    """The plan in a file; a ``noise_table`` may name a file beside it.

    Raises ValueError that says what is wrong and what is allowed.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"plan {path} does not exist; the shipped one is engine/demo/compare.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"plan {path} is not JSON: {problem}") from None
    if isinstance(data, dict) and isinstance(data.get("methods"), dict):
        folder = path.resolve().parent
        data = data | {"methods": {name: with_table(part, folder) for name, part in data["methods"].items()}}
    return make_comparison(data)


def with_table(part: Any, folder: Path) -> Any:
    """A method whose ``noise_table`` is no file name in ``folder`` any more but what the file holds."""
    method = part.get("method") if isinstance(part, dict) else None
    if not isinstance(method, dict) or not isinstance(method.get("noise_table"), str):
        return part
    return part | {"method": method | {"noise_table": read_table(folder / method["noise_table"])}}


def make_comparison(data: Any) -> Comparison:
    """A checked plan from plain JSON data."""
    check_keys(data)
    check_part("base", data["base"], ())
    check_parts("tasks", data["tasks"], ())
    check_parts("methods", data["methods"], METHOD_KEYS)
    name, base, tasks, methods = check_name(data["name"]), data["base"], data["tasks"], data["methods"]
    budget = make_budget({key: data[key] for key in options_of(Budget) if key in data})
    comparison = Comparison(name, base, tasks, methods, check_seeds(data["seeds"]), budget)
    for task in tasks:
        comparison.budget_of(task)
        for method in methods:
            for seed in comparison.seeds:
                comparison.config(task, method, seed)
    return comparison


def check_keys(data: Any) -> None:
    """Refuse what is no plan, keys it cannot have and a plan that lacks some."""
    if not isinstance(data, dict):
        raise ValueError(f"a plan must be a JSON object, got {type(data).__name__}")
    known = dict.fromkeys([*REQUIRED, *options_of(Budget)])
    for key in data:
        if key not in known:
            raise ValueError(f"the plan has no key {key!r}{suggest(key, known)}; it has: {', '.join(known)}")
    if missing := [key for key in REQUIRED if key not in data]:
        raise ValueError(f"the plan lacks {', '.join(missing)}")


def check_parts(title: str, parts: Any, allowed: Sequence[str]) -> None:
    """Check each of the named tasks or methods."""
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f'{title} must name at least one, e.g. {{"my name": {{...}}}}, got {parts!r}')
    for name, part in parts.items():
        with errors_named(title):
            check_name(name)
        check_part(f"{title}: {name}", part, allowed)


def check_part(title: str, part: Any, allowed: Sequence[str]) -> None:
    """Refuse what the comparison sets itself and, when ``allowed`` is given, any other key."""
    if not isinstance(part, dict):
        raise ValueError(f"{title} must be an object that holds parts of a configuration, got {part!r}")
    for key, value in part.items():
        if allowed and key not in allowed:
            raise ValueError(
                f"{title} may set {', '.join(allowed)}, not {key!r}: methods are compared on the same task; "
                "put it into base or tasks"
            )
        inside = [f"{key}.{option}" for option in OURS.get(key, ()) if isinstance(value, dict) and option in value]
        if taken := [key] if OURS.get(key) == () else inside:
            raise ValueError(f"{title}: {taken[0]} is set by the comparison itself; leave it out")


def check_seeds(seeds: Any) -> Sequence[int]:
    """The seeds; their range is checked with the configurations."""
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise ValueError(f"seeds must be a list of different whole numbers such as [0, 1, 2], got {seeds!r}")
    return seeds


def make_budget(given: Mapping[str, Any], title: str = "the plan") -> Budget:
    """A checked budget."""
    check(title, options_of(Budget), given)
    budget = Budget(**given)
    if not budget.evaluations and not budget.seconds:
        raise ValueError(f"{title} gives no budget; set evaluations or seconds above 0, or both")
    return budget


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; of two objects under the same key the options are put together."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            result[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return result
