"""The panel: asks several rewards safely, and puts what they say together."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import Prompt, ViewRules
from ..protocols import Reward, RewardBatch, RewardResult
from ..waiting import Interrupted, Worker, result_of
from .images import broken, check_rgb
from .remote.parallel import stop_all

MODES = ("each", "gdpo", "sum")
"""How several rewards become one advantage.

``each``: normalise every reward within its group, then add. ``gdpo``: the same, then normalise over the whole batch
(arXiv 2601.05242). ``sum``: add the scores, then normalise.
"""


class Member(NamedTuple):
    """A reward and what it counts."""

    label: str
    reward: Reward
    weight: float = 1.0
    cap: float = float("inf")
    """Scores above count as this much: nothing is gained beyond good enough."""
    min_std: float = 0.0
    """Where a group's scores differ less, they teach nothing."""
    rank: bool = False
    """Train on the rank within the group instead of the score."""


class Scored(NamedTuple):
    """What a panel says of N images."""

    scores: Tensor
    """[M, N] float32; NaN = no score."""
    by_reward: Mapping[str, Tensor]
    """Label -> [N] raw scores and sub-scores, for the record."""
    reasons: Mapping[str, Sequence[str]]
    """Label -> why, for each image that it could not score."""
    passed_over: Mapping[str, Tensor]
    """Label -> [N] bool: a person chose to pass over it."""

    @property
    def errors(self) -> list[str]:
        """All reasons, each with its reward."""
        return [f"{label}: {reason}" for label, reasons in self.reasons.items() for reason in reasons]

    @property
    def skipped(self) -> Tensor:
        """[N] bool: passed over, for whichever reward."""
        return torch.stack([*self.passed_over.values()]).any(0)


class Panel:
    """Several weighted rewards: Members, or (label, reward, weight).

    Whatever one of them does, the answer is float32, in order, and finite or NaN.
    """

    def __init__(self, members: Sequence[tuple[Any, ...]], mode: str = "each"):
        if not members:
            raise ValueError("the list of rewards is empty; name at least one, e.g. brightness")
        self.members = [Member(*member) for member in members]
        self.member_weights = torch.tensor([float(member.weight) for member in self.members])
        self.mode = mode
        self.weights = self.member_weights if mode != "sum" else torch.ones(1)

    @property
    def labels(self) -> list[str]:
        """Of the members, in order."""
        return [member.label for member in self.members]

    @property
    def remote(self) -> bool:
        """Whether somebody else computes, so that scoring can overlap with sampling."""
        return any(getattr(member.reward, "remote", False) for member in self.members)

    @property
    def interactive(self) -> bool:
        """Whether a person answers."""
        return any(getattr(member.reward, "interactive", False) for member in self.members)

    def rules(self, num_grids: int) -> ViewRules:
        """How the views are normalised; views are ordered grid by grid, within a grid reward by reward."""
        if self.mode == "sum":
            return ViewRules()
        min_std, rank = zip(*((member.min_std, member.rank) for member in self.members), strict=True)
        return ViewRules(min_std * num_grids, rank * num_grids, self.mode == "gdpo")

    @contextmanager
    def scoring(self) -> Iterator["Scoring"]:
        """Images are added in parts and collected at the end; remote rewards work on them meanwhile."""
        scoring = Scoring(self)
        try:
            yield scoring
        except BaseException as stop:
            scoring.close()  # first: what is stopped must not make room for the next
            stop_all()
            if isinstance(stop, Interrupted):
                raise stop.reason from None
            raise
        finally:
            scoring.close()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt], groups: Tensor | None = None) -> Scored:
        """[N, 3, H, W] in 0..1 -> [M, N] scores."""
        with self.scoring() as scoring:
            scoring.add(images, prompts, groups)
            return scoring.collect()

    @contextmanager
    def session(self, folder: Path) -> Iterator[None]:
        """While a run in ``folder`` is trained."""
        with ExitStack() as stack:
            for member in self.members:
                if hasattr(member.reward, "session"):
                    stack.enter_context(member.reward.session(folder))  # pyright: ignore[reportAttributeAccessIssue]
            yield

    def validate(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError with the first problems any reward has with these prompts."""
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        found = [
            (member.label, problem) for member in self.members for problem in member.reward.validate(texts, metadata)
        ]
        if found:
            problems = [f"reward {label}: {located(problem, prompts)}" for label, problem in found[:3]]
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            raise ValueError("; ".join(problems) + more)


def located(problem: str, prompts: Sequence[Prompt]) -> str:
    """The problem, with file and line of the prompt whose text it begins with: ``prompt 'a cat': ...``."""
    places = [p.place for p in prompts if p.place and problem.startswith(f"prompt {p.text!r}:")]
    return f"{' or '.join(dict.fromkeys(places))}: {problem}" if places else problem


class Scoring:
    """Images on their way through a panel."""

    def __init__(self, panel: Panel):
        self.panel = panel
        self.batches: list[RewardBatch] = []
        self.answers: list[list[RewardResult | Future[RewardResult]]] = [[] for _ in panel.members]
        self.workers = [Worker() if getattr(m.reward, "remote", False) else None for m in panel.members]

    def add(self, images: Tensor, prompts: Sequence[Prompt], groups: Tensor | None = None) -> None:
        """Score some more images [N, 3, H, W]; ``groups`` [N] says which of them compete."""
        batch = RewardBatch(images, [p.text for p in prompts], [p.metadata for p in prompts], groups)
        if self.panel.interactive:  # the others have seen it: an iteration's images fill gigabytes
            self.batches.append(batch)
        for member, worker, answers in zip(self.panel.members, self.workers, self.answers, strict=True):
            if worker:
                answers.append(worker.submit(lambda member=member: ask(member.label, member.reward, batch)))
            elif not getattr(member.reward, "interactive", False):
                answers.append(ask(member.label, member.reward, batch))

    def collect(self) -> Scored:
        """What the panel says of all images, in the order they were added. Raises Interrupted while it waits."""
        for member, answers in zip(self.panel.members, self.answers, strict=True):
            if not answers:
                answers.append(ask(member.label, member.reward, joined(self.batches)))
        results = [
            join_results([result_of(a) if isinstance(a, Future) else a for a in answers]) for answers in self.answers
        ]
        by_reward: dict[str, Tensor] = {}
        for label, result in zip(self.panel.labels, results, strict=True):
            by_reward |= {label: result.scores, **{f"{label}/{k}": v for k, v in result.details.items()}}
        capped = [r.scores.clamp(max=m.cap) for m, r in zip(self.panel.members, results, strict=True)]
        scores = torch.stack(capped)
        if self.panel.mode == "sum":
            scores = (self.panel.member_weights[:, None] * scores).sum(0, keepdim=True)
        named = dict(zip(self.panel.labels, results, strict=True))
        reasons = {label: list(result.errors.values()) for label, result in named.items()}
        passed_over = {label: torch.zeros(scores.shape[1], dtype=torch.bool) for label in named}
        for label, result in named.items():
            passed_over[label][list(result.skipped)] = True
        return Scored(scores, by_reward, reasons, passed_over)

    def close(self) -> None:
        """Drop what nobody waits for any more."""
        for worker in filter(None, self.workers):
            worker.close()


def ask(label: str, reward: Reward, batch: RewardBatch) -> RewardResult:
    """Call one reward; an exception, an infinite score or a broken image becomes NaN with a reason, never 0.

    Raises RuntimeError when the reward answers with something else than a number for each image, sub-scores included:
    that is a bug of the reward. Running out of memory is not the reward's failure either: smaller batches may help.
    """
    num_images = len(batch.prompts)
    try:
        check_rgb(batch.images)
        result = call(reward, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # a reward is foreign code; its failure must not end a run
        reason = f"{type(problem).__name__}: {problem}"
        return RewardResult(torch.full((num_images,), torch.nan), {}, dict.fromkeys(range(num_images), reason))
    if not isinstance(result, RewardResult):
        raise RuntimeError(f"reward {label} returned {type(result).__name__}; it must return a RewardResult")
    bad = broken(batch.images)  # some rewards would see a colour where there is none
    seen = torch.tensor([0.0 if i not in bad else torch.nan for i in range(num_images)])
    scores = numbers(f"reward {label}", result.scores, num_images) + seen
    details = {name: numbers(f"reward {label}, {name}", v, num_images) + seen for name, v in result.details.items()}
    missing = unscored(scores)
    why = {**dict.fromkeys(missing, "the score is not a finite number"), **bad, **result.errors}
    reasons = {i: why[i] or "it does not say why" for i in missing if i not in result.skipped}
    return RewardResult(scores.where(scores.isfinite(), torch.nan), details, reasons, result.skipped & set(missing))


def numbers(who: str, found: Any, num_images: int) -> Tensor:
    """What was returned, as float32 on the CPU; RuntimeError when it is not one number for each image."""
    if not isinstance(found, Tensor):
        raise RuntimeError(f"{who} returned {type(found).__name__}; it must return a tensor")
    if found.shape != (num_images,):
        raise RuntimeError(f"{who} returned shape {tuple(found.shape)} for {num_images} images")
    return found.detach().float().cpu()


def call(reward: Reward, batch: RewardBatch) -> RewardResult:
    """Without gradients, and so that random numbers elsewhere stay what they are."""
    if getattr(reward, "remote", False):  # other threads draw random numbers meanwhile: hands off
        with torch.no_grad():
            return reward(batch)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return reward(batch)


def joined(batches: Sequence[RewardBatch]) -> RewardBatch:
    """Parts as one batch."""
    groups = [batch.groups for batch in batches if batch.groups is not None]
    return RewardBatch(
        torch.cat([batch.images for batch in batches]),
        [prompt for batch in batches for prompt in batch.prompts],
        [metadata for batch in batches for metadata in batch.metadata],
        torch.cat(groups) if len(groups) == len(batches) else None,
    )


def join_results(parts: Sequence[RewardResult]) -> RewardResult:
    """What was said of parts, as said of the whole; a sub-score that a part lacks is NaN there."""
    if len(parts) == 1:
        return parts[0]
    starts = torch.tensor([0, *(len(part.scores) for part in parts)]).cumsum(0).tolist()
    numbered = list(zip(starts[:-1], parts, strict=True))
    names = dict.fromkeys(name for part in parts for name in part.details)
    nothing = torch.tensor(torch.nan)
    return RewardResult(
        torch.cat([part.scores for part in parts]),
        {n: torch.cat([p.details.get(n, nothing.expand(len(p.scores))) for p in parts]) for n in names},
        {start + i: reason for start, part in numbered for i, reason in part.errors.items()},
        frozenset(start + i for start, part in numbered for i in part.skipped),
    )


def unscored(scores: Tensor) -> list[int]:
    """Indices without a finite score."""
    return (~scores.isfinite()).nonzero().flatten().tolist()
