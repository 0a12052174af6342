"""Rewards by name.

To add one: write a module here with a frozen dataclass that satisfies ``Reward`` and name it in ``REWARDS``, in
``MODEL_REWARDS`` when it needs files that do not come with this package, or in ``OTHER_REWARDS``.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from ..knobs import Knob, Option, check, flag, options_of, suggest
from ..protocols import Reward
from .panel import MODES, Member, Panel, Scored, ask

__all__ = ["MODES", "Member", "Panel", "Scored", "ask"]

REWARDS = {
    "brightness": ".brightness:Brightness",
    "colourfulness": ".colourfulness:Colourfulness",
    "jpeg": ".jpeg:Jpeg",
    "shapes": ".shapes:Shapes",
}
MODEL_REWARDS = {
    "aesthetic": ".aesthetic:Aesthetic",
    "aesthetic_siglip": ".aesthetic_siglip:AestheticSiglip",
    "clipscore": ".clipscore:ClipScore",
    "geneval": ".geneval_reward:GenEval",
    "hpsv2": ".hpsv2:Hpsv2",
    "imagereward": ".imagereward:ImageReward",
    "pickscore": ".pickscore:PickScore",
}
"""Those that need model files and transformers; their method ``needs`` says which files."""
OTHER_REWARDS = {
    "human_vote": ".human_vote:HumanVote",
    "ocr": ".ocr:Ocr",
    "remote_http": ".remote.http_reward:RemoteHttp",
    "vlm_judge": ".remote.judge:VlmJudge",
}
"""Those that need a package of their own, a server, or people."""
VARIANTS: dict[str, dict[str, Any]] = {
    "brightness": {"name": "brightness"},
    "darkness": {"name": "brightness", "target": 0.0},
    "colourfulness": {"name": "colourfulness"},
    "jpeg compressible": {"name": "jpeg", "direction": "compressible"},
    "jpeg incompressible": {"name": "jpeg", "direction": "incompressible"},
    "shapes dense": {"name": "shapes", "score": "dense"},
    "shapes partial": {"name": "shapes", "score": "partial"},
    "shapes strict": {"name": "shapes", "score": "strict"},
    "pickscore": {"name": "pickscore"},
    "hpsv2": {"name": "hpsv2"},
    "clipscore": {"name": "clipscore"},
    "aesthetic": {"name": "aesthetic"},
    "aesthetic v2.5": {"name": "aesthetic_siglip"},
    "imagereward": {"name": "imagereward"},
    "geneval partial": {"name": "geneval", "score": "partial"},
    "geneval strict": {"name": "geneval", "score": "strict"},
    "ocr": {"name": "ocr"},
}
"""What a menu offers: label -> configuration of the reward."""
COMMON = {
    "weight": Option(float, Knob(-1000.0, 1000.0, "weight in the sum; negative punishes"), 1.0),
    "cap": Option(float, Knob(-1e9, 1e9, "scores above count as this much: good enough"), None),
    "min_std": Option(
        float, Knob(0.0, 1e9, "where a group's scores (step-wise: gains) differ less they teach nothing"), 0.0
    ),
    "rank": Option(bool, flag("train on the rank within the group instead of the score"), False),
}
"""What every reward of a run can have beside its own options."""
COMPUTING = (
    *("placement", "precision", "batch_size", "threads", "workers"),
    *("api_key_variable", "timeout", "patience", "port", "min_voters"),
)
"""Options that say how a reward is computed, not what it is."""


def reward_class(name: str) -> type[Any]:
    """Import the reward's module only now, so that optional libraries stay optional."""
    known = REWARDS | MODEL_REWARDS | OTHER_REWARDS
    if name not in known:
        raise ValueError(f"unknown reward {name!r}{suggest(name, known)}; known: {', '.join(known)}")
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module, __package__), attribute)


def reward_options(name: str) -> dict[str, Option]:
    """The options of a reward."""
    return options_of(reward_class(name))


def make_reward(name: str, **options: Any) -> Reward:
    """The reward of that name; ValueError names what is allowed."""
    check(f"reward {name}", reward_options(name), options)
    return reward_class(name)(**options)


def make_panel(entries: Sequence[Mapping[str, Any]], mode: str = "each") -> Panel:
    """A panel of configured rewards: ``{"name": ..., "weight": 1.0, **options}`` each."""
    return Panel(members(entries), mode)


def members(entries: Sequence[Mapping[str, Any]], prefix: str = "") -> list[Member]:
    """The rewards of a panel; no two have the same label, which is ``prefix`` and what tells them apart."""
    found: list[Member] = []
    for entry in entries:
        options = {key: value for key, value in entry.items() if key not in ("name", *COMMON)}
        reward = make_reward(entry["name"], **options)
        label, taken = prefix + label_of(entry["name"], options), {one.label for one in found}
        numbered = (f"{label} ({n})" for n in range(2, len(entries) + 1))
        label = next(name for name in (label, *numbered) if name not in taken)
        common = {key: entry[key] for key in COMMON if key in entry}
        found.append(Member(label, reward, **common))
    return found


def label_of(name: str, options: Mapping[str, Any]) -> str:
    """As the menu calls it, or the name and what differs from its defaults; how it is computed does not matter."""
    meaning = meaning_of(name, options)
    for label, variant in VARIANTS.items():
        if variant["name"] == name and meaning == meaning_of(name, {k: v for k, v in variant.items() if k != "name"}):
            return label
    defaults = meaning_of(name, {})
    words = " ".join([name, *(str(value) for key, value in meaning.items() if value != defaults[key])])
    return " ".join(words.split())  # on one line: it heads columns and stands beside progress bars


def what_is_scored(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A configured reward without the options that only say how it is computed."""
    return {key: value for key, value in entry.items() if key not in COMPUTING}


def published(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A configured reward as a LoRA's header may show it to the world: without addresses and names of keys."""
    return {key: value for key, value in what_is_scored(entry).items() if key not in ("url", "base_url")}


def meaning_of(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide what is scored, with their defaults."""
    known = {key: option.default for key, option in reward_options(name).items()}
    return what_is_scored({**known, **options})
