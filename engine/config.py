"""The configuration of a run: one JSON object, every key known, every value checked before anything is loaded."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from .knobs import Choice, Knob, Option, check, flag, options_of, suggest
from .learner import OptimizerSettings
from .lora import LoraSettings
from .models import model_options
from .noise_table import check_table, read_table
from .profiles import merged, profile
from .recipes import make_recipe, recipe_options
from .rewards import COMMON, MODES, reward_class, reward_options
from .train import TrainSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """How progress on held-out prompts is measured; ``rewards`` here are never trained on."""

    every: Annotated[int, Knob(0, 1_000_000, "iterations between evaluations; 0 = only before and after")] = 0
    images_per_prompt: Annotated[int, Knob(1, 1024, "images of each held-out prompt")] = 4
    num_steps: Annotated[int, Knob(1, 200, "ODE steps of each evaluation image")] = 10
    alarm_after: Annotated[
        int, Knob(0, 100, "evaluations in a row that must show gaming before the alarm; 0 = no alarm")
    ] = 2
    stop_when_gamed: Annotated[bool, flag("end the run at the alarm; what was learnt is kept")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SavingSettings:
    """What is kept while training."""

    every: Annotated[int, Knob(1, 1_000_000, "iterations between checkpoints")] = 20
    keep: Annotated[int, Knob(1, 10_000, "newest checkpoints that are kept")] = 3


Named = Mapping[str, Any]
"""``name`` and that thing's own options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that determines a run."""

    name: str
    """Also the name of its folder."""
    model: Named
    method: Named
    rewards: tuple[Named, ...]
    """Each with an optional ``weight``; their sum is what is trained on."""
    prompts: Any
    """A file, a built-in list such as ``demo:train``, or a list of texts."""
    held_out_prompts: Any = None
    """Likewise; none means no evaluation."""
    held_out_rewards: tuple[Named, ...] = ()
    """Scored in evaluations, never trained on."""
    reward_mode: str = "each"
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    saving: SavingSettings = field(default_factory=SavingSettings)

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return json.dumps(asdict(self), indent=2) + "\n"


SECTIONS = {
    "lora": LoraSettings,
    "optimizer": OptimizerSettings,
    "training": TrainSettings,
    "evaluation": EvaluationSettings,
    "saving": SavingSettings,
}
REWARD_MODE = Option(
    str,
    Choice(MODES, "normalise each reward and add, the same over the batch as well, or add the scores first"),
    "each",
)
FORBIDDEN = set('<>:"/\\|?*')


def read_config(path: Path) -> RunConfig:
    """The configuration in a file. Raises ValueError that says what is wrong and what is allowed.

    The option ``noise_table`` may name a file, relative to ``path``: its contents are put in place, so that the
    configuration a run saves stands alone.
    """
    data = read_data(path)
    method = data.get("method") if isinstance(data, dict) else None
    if isinstance(method, dict) and isinstance(method.get("noise_table"), str):
        table = read_table(path.resolve().parent / method["noise_table"])
        data = data | {"method": method | {"noise_table": table}}
    return make_config(data)


def read_data(path: Path) -> Any:
    """The plain data in a configuration file. Raises ValueError when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"configuration {path} does not exist; `densegrpo recipes` shows what one can hold") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"configuration {path} is not JSON: {problem}") from None


def make_config(data: Any) -> RunConfig:
    """A checked configuration from plain JSON data."""
    if not isinstance(data, dict):
        raise ValueError(f"a configuration must be a JSON object, got {type(data).__name__}")
    data = with_profile(data)
    known = RunConfig.__dataclass_fields__
    for key in data:
        if key not in known:
            raise ValueError(f"the configuration has no key {key!r}{suggest(key, known)}; it has: {', '.join(known)}")
    missing = [key for key in ("name", "model", "method", "rewards", "prompts") if key not in data]
    if missing:
        raise ValueError(f"the configuration lacks {', '.join(missing)}")
    values = dict(data)
    values["name"] = check_name(data["name"])
    values["model"] = named("model", data["model"], model_options)
    values["method"] = named("method", data["method"], recipe_options)
    values |= checked_rewards(data)
    for key, section in SECTIONS.items():
        given = data.get(key, {})
        if not isinstance(given, dict):
            raise ValueError(f"{key} must be an object, got {given!r}")
        check(key, options_of(section), given)
        values[key] = section(**given)
    config = RunConfig(**values)
    # A window that does not fit is refused now, not after the model has been loaded.
    make_recipe(**config.method).explore((1,), torch.ones(config.training.num_steps), (0, 0, 0))
    check_table(config.method.get("noise_table"), config.model, config.training.num_steps)
    return config


def with_profile(data: dict[str, Any]) -> dict[str, Any]:
    """What a ``"profile"`` says of the named method, under what the configuration itself says."""
    if "profile" not in data:
        return data
    method = data.get("method")
    named("method", method, recipe_options)
    given = {key: value for key, value in data.items() if key != "profile"}
    model = given.get("model")
    found = dict(profile(data["method"]["name"], data["profile"]).sections)
    if isinstance(model, dict) and model.get("name", found["model"]["name"]) != found["model"]["name"]:
        found.pop("model")
    return merged(found, given)


def named(title: str, entry: Any, options: Any, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check ``{"name": ..., **options}``; keys in ``extra`` are allowed beside the options."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f'{title} must be an object with a "name", got {entry!r}')
    known = options(entry["name"])
    check(f"{title} {entry['name']}", known, {k: v for k, v in entry.items() if k not in ("name", *extra)})
    return dict(entry)


def checked_rewards(data: Mapping[str, Any]) -> dict[str, tuple[Named, ...]]:
    """The rewards of a configuration, and how they are combined, checked."""
    values = {}
    for key in ("rewards", "held_out_rewards"):
        if not isinstance(data.get(key, []), list):
            raise ValueError(f'{key} must be a list such as [{{"name": "brightness"}}], got {data[key]!r}')
        values[key] = tuple(check_reward(key, entry) for entry in data.get(key, []))
    if not values["rewards"]:
        raise ValueError('rewards must name at least one reward, e.g. [{"name": "brightness"}]')
    for entry in values["rewards"]:
        if entry.get("weight") == 0:
            raise ValueError(f"rewards: {entry['name']} has weight 0; remove it, or put it into held_out_rewards")
    for entry in values["held_out_rewards"]:
        if getattr(reward_class(entry["name"]), "interactive", False):
            raise ValueError(f"held_out_rewards: {entry['name']} asks people, who are not asked in evaluations")
    mode = data.get("reward_mode", "each")
    check("configuration", {"reward_mode": REWARD_MODE}, {"reward_mode": mode})
    for entry in values["rewards"] if mode == "sum" else ():
        if entry.get("rank") or entry.get("min_std"):
            raise ValueError(
                f"rewards: {entry['name']} has rank or min_std, but reward_mode 'sum' adds scores before their groups "
                "are looked at; use 'each' or 'gdpo'"
            )
    return values


def check_reward(title: str, entry: Any) -> dict[str, Any]:
    """Check one reward, its weight and what else all rewards have."""
    checked = named(title, entry, reward_options, tuple(COMMON))
    check(f"{title} {checked['name']}", COMMON, {key: checked[key] for key in COMMON if key in checked})
    return checked


def check_name(name: Any) -> str:
    """A run name that is a plain folder name on every system."""
    plain = isinstance(name, str) and name.strip() == name and name not in ("", ".", "..")
    if not plain or FORBIDDEN & set(name) or any(ord(c) < 32 for c in name) or len(name) > 100 or name.endswith("."):
        raise ValueError(
            f"name {name!r} must be a folder name: 1 to 100 characters, none of {' '.join(sorted(FORBIDDEN))}"
        )
    return name
