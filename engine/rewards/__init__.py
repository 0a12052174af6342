"""Rewards by name, and the panel that asks several of them safely.

To add one: write a module here with a frozen dataclass that satisfies ``Reward`` and name it in ``REWARDS``,
or in ``MODEL_REWARDS`` when it needs files that do not come with this package.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import Prompt
from ..knobs import Option, check, options_of, suggest
from ..protocols import Reward, RewardBatch, RewardResult

REWARDS = {
    "brightness": ".brightness:Brightness",
    "colourfulness": ".colourfulness:Colourfulness",
    "jpeg": ".jpeg:Jpeg",
    "shapes": ".shapes:Shapes",
}
MODEL_REWARDS = {
    "aesthetic": ".aesthetic:Aesthetic",
    "clipscore": ".clipscore:ClipScore",
    "hpsv2": ".hpsv2:Hpsv2",
    "pickscore": ".pickscore:PickScore",
}
"""Those that need model files and transformers; their method ``needs`` says which files."""
VARIANTS: dict[str, dict[str, Any]] = {
    "brightness": {"name": "brightness"},
    "darkness": {"name": "brightness", "target": 0.0},
    "colourfulness": {"name": "colourfulness"},
    "jpeg compressible": {"name": "jpeg", "direction": "compressible"},
    "jpeg incompressible": {"name": "jpeg", "direction": "incompressible"},
    "shapes dense": {"name": "shapes", "score": "dense"},
    "shapes partial": {"name": "shapes", "score": "partial"},
    "shapes strict": {"name": "shapes", "score": "strict"},
}
"""What a menu offers: label -> configuration of the reward."""
MODES = ("each", "sum")
"""Normalise each reward and then add (``each``), or add the scores first (``sum``)."""


def reward_class(name: str) -> type[Any]:
    """Import the reward's module only now, so that optional libraries stay optional."""
    known = dict(sorted(REWARDS.items()) + sorted(MODEL_REWARDS.items()))
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


class Scored(NamedTuple):
    """What a panel says of N images."""

    scores: Tensor
    """[M, N] float32; NaN = no score."""
    by_reward: Mapping[str, Tensor]
    """Label -> [N] raw scores and sub-scores, for the record."""
    errors: Sequence[str]
    """One reason for each image that got no score."""

    @staticmethod
    def join(parts: Sequence["Scored"]) -> "Scored":
        """Put chunks of images together."""
        labels = parts[0].by_reward
        return Scored(
            torch.cat([p.scores for p in parts], 1),
            {label: torch.cat([p.by_reward[label] for p in parts]) for label in labels},
            [error for p in parts for error in p.errors],
        )


class Panel:
    """Several weighted rewards. Whatever one of them does, the answer is float32, in order, and finite or NaN."""

    def __init__(self, members: Sequence[tuple[str, Reward, float]], mode: str = "each"):
        if not members:
            raise ValueError("the list of rewards is empty; name at least one, e.g. brightness")
        self.members = [(label, reward) for label, reward, _ in members]
        self.member_weights = torch.tensor([float(weight) for *_, weight in members])
        self.mode = mode
        self.weights = self.member_weights if mode == "each" else torch.ones(1)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scored:
        """[N, 3, H, W] in 0..1 -> [M, N] scores."""
        batch = RewardBatch(images, [p.text for p in prompts], [p.metadata for p in prompts])
        rows, by_reward, errors = [], {}, []
        for label, reward in self.members:
            result = ask(label, reward, batch)
            rows.append(result.scores)
            by_reward[label] = result.scores
            by_reward |= {f"{label}/{name}": values for name, values in result.details.items()}
            errors += [f"{label}: {reason}" for reason in result.errors.values()]
        scores = torch.stack(rows)
        if self.mode == "sum":
            scores = (self.member_weights[:, None] * scores).sum(0, keepdim=True)
        return Scored(scores, by_reward, errors)

    def validate(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError with the first problems any reward has with these prompts."""
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        problems = [f"reward {label}: {p}" for label, r in self.members for p in r.validate(texts, metadata)]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise ValueError("; ".join(problems[:3]) + more)


def make_panel(entries: Sequence[Mapping[str, Any]], mode: str = "each") -> Panel:
    """A panel of configured rewards: ``{"name": ..., "weight": 1.0, **options}`` each."""
    return Panel([member(entry) for entry in entries], mode)


def member(entry: Mapping[str, Any], prefix: str = "") -> tuple[str, Reward, float]:
    """(label, reward, weight); the label tells equal rewards with other options apart."""
    options = {k: v for k, v in entry.items() if k not in ("name", "weight")}
    plain = " ".join([entry["name"], *(str(v) for v in options.values())])
    label = prefix + next((k for k, v in VARIANTS.items() if v == {"name": entry["name"], **options}), plain)
    return label, make_reward(entry["name"], **options), float(entry.get("weight", 1.0))


def ask(label: str, reward: Reward, batch: RewardBatch) -> RewardResult:
    """Call one reward; an exception or an infinite score becomes NaN with a reason, never 0.

    Raises RuntimeError when the reward answers with a wrong shape: that is a bug of the reward.
    """
    num_images = len(batch.prompts)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = reward(batch)
    except Exception as problem:  # a reward is foreign code; its failure must not end a run
        reason = f"{type(problem).__name__}: {problem}"
        return RewardResult(torch.full((num_images,), torch.nan), {}, dict.fromkeys(range(num_images), reason))
    scores = result.scores.detach().float().cpu()
    if scores.shape != (num_images,):
        raise RuntimeError(f"reward {label} returned shape {tuple(scores.shape)} for {num_images} images")
    reasons = {i: result.errors.get(i, "the score is not a finite number") for i in unscored(scores)}
    return RewardResult(scores.where(scores.isfinite(), torch.nan), result.details, reasons)


def unscored(scores: Tensor) -> list[int]:
    """Indices without a finite score."""
    return (~scores.isfinite()).nonzero().flatten().tolist()
