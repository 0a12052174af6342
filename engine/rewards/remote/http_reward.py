"""A reward that a JSON server computes, such as ``densegrpo serve`` or a reward server of Flow-Factory.

``POST {url}/compute`` with ``{"prompt": [...], "image": [base64 of PNG files], "metadata": [{...}]}`` is answered by
``{"rewards": [number or null]}``, null where there is no score; ``"errors": {"index": "reason"}`` may say why.
``GET {url}/health`` is answered by any 2xx status. Without metadata, null and errors that is Flow-Factory's protocol
(X-GenGroup/Flow-Factory, reward_server/example_server.py), whose servers ignore the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import Annotated, Any, ClassVar

from ...knobs import Knob, Text
from ...protocols import RewardBatch, RewardResult
from ..images import check_rgb
from .address import Server, connect
from .parallel import Failure, Workers, in_parallel, interruptibly
from .patience import Limits, PatienceOption, RemoteError, Timeout
from .picture import NOT_NUMBERS, png_file, spread, text_of
from .reply import UnusableError, number
from .transport import KeyVariable, excerpt, exchange
from .trial import HEALTH_SECONDS, tried


@dataclass(frozen=True, slots=True)
class RemoteHttp:
    """The scores that a JSON reward server gives, in whatever range it has; `densegrpo serve` is one."""

    remote: ClassVar[bool] = True

    url: Annotated[str, Text("address of the reward server, without /compute")] = "http://127.0.0.1:8090"
    api_key_variable: KeyVariable = ""
    batch_size: Annotated[int, Knob(1, 1024, "images in one request")] = 16
    workers: Workers = 2
    timeout: Timeout = 60.0
    patience: PatienceOption = 300.0

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image. Raises ValueError when the server may not be asked."""
        server, num_images = connect(self.url, self.api_key_variable), len(batch.prompts)
        check_rgb(batch.images)
        starts = range(0, num_images, self.batch_size)
        parts = [range(num_images)[start : start + self.batch_size] for start in starts]
        answers = in_parallel([partial(self.compute, server, batch, part) for part in parts], self.workers)
        found: dict[int, float | Failure] = {}
        for part, answer in zip(parts, answers, strict=True):
            found |= dict.fromkeys(part, answer) if isinstance(answer, Failure) else answer
        errors = {index: value.reason for index, value in found.items() if isinstance(value, Failure)}
        scored = {index: value for index, value in found.items() if not isinstance(value, Failure)}
        return RewardResult(spread(list(scored), list(scored.values()), num_images), {}, errors)

    def compute(
        self, server: Server, batch: RewardBatch, part: Sequence[int], given_up: Event
    ) -> dict[int, float | Failure]:
        """The score of each image of one request, or why it has none."""
        files = {index: png_file(batch.images[index]) for index in part}
        texts = {index: text_of(file) for index, file in files.items() if file is not None}
        found: dict[int, float | Failure] = dict.fromkeys(files.keys() - texts.keys(), Failure(NOT_NUMBERS))
        if texts:
            payload = {
                "prompt": [batch.prompts[index] for index in texts],
                "image": list(texts.values()),
                "metadata": [dict(batch.metadata[index]) for index in texts],
            }
            answer = exchange(server, "/compute", payload, Limits(self.timeout, self.patience), given_up)
            found |= dict(zip(texts, scores_in(answer, len(texts)), strict=True))
        return found

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """An address that may not be asked, or a server that is not there; any prompt will do."""
        try:
            interruptibly(self.health)
        except (ValueError, RemoteError) as problem:
            return [str(problem)]
        return []

    def health(self) -> None:
        """Ask once whether the server is there. Raises ValueError or RemoteError that says what to do."""
        server = connect(self.url, self.api_key_variable)
        try:
            exchange(server, "/health", None, Limits(min(self.timeout, HEALTH_SECONDS), 0), Event(), parse=len)
        except RemoteError as problem:
            raise RemoteError(
                f"{problem}. Start the reward server (an example: densegrpo serve --reward NAME --port 8090), or "
                "correct url"
            ) from None

    def test_connection(self) -> str:
        """Whether it works, as a paragraph for a person. Raises only what the host raises to stop."""
        return tried(self.url, self.health, replace(self, patience=0.0))


def scores_in(answer: Any, num_images: int) -> list[float | Failure]:
    """The scores in the server's answer; what is not a finite number is a Failure.

    Raises UnusableError when it does not hold one entry for each image.
    """
    data = answer if isinstance(answer, dict) else {}
    if isinstance(problem := data.get("error"), str) and problem:
        raise UnusableError(f"the reward server reports an error: {excerpt(problem)}")
    values = data.get("rewards")
    if not isinstance(values, list):
        raise UnusableError('the reward server\'s answer has no list "rewards"')
    if len(values) != num_images:
        raise UnusableError(f"the reward server gave {len(values)} rewards for {num_images} images")
    reasons = data.get("errors")
    reasons = reasons if isinstance(reasons, dict) else {}
    return [score_or_reason(value, reasons.get(str(index))) for index, value in enumerate(values)]


def score_or_reason(value: Any, reason: Any) -> float | Failure:
    """One entry of ``rewards``."""
    if value is None:
        return Failure(excerpt(reason) if isinstance(reason, str) else "the reward server has no score for this image")
    try:
        return number(value)
    except UnusableError as problem:
        return Failure(f"the reward server's answer is no score: {problem}")
