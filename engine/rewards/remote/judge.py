"""A vision-language model that judges images, behind any server with OpenAI's chat completions.

vLLM, SGLang, llama.cpp, Ollama and LM Studio are such servers. Answers are asked for at temperature 0 with a seed, so
one that was given is remembered and not asked for again.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from threading import Event, Lock
from typing import Annotated, Any, ClassVar

from ...knobs import Choice, Knob, Text
from ...protocols import RewardBatch, RewardResult
from ..images import check_rgb
from .address import Server, connect
from .atoms import Question, problem_with
from .parallel import Failure, Workers, in_parallel, interruptibly
from .patience import Limits, PatienceOption, RemoteError, Timeout
from .picture import NOT_NUMBERS, Picture, spread, text_of, trial_batch
from .plans import OWN, PRESETS, READERS, TOKENS, Plan
from .reply import UnusableError, read_reply
from .transport import KeyVariable, excerpt, exchange
from .trial import HEALTH_SECONDS, tried

SEED = 0
PLAN_OPTIONS = ("mode", "question", "labels", "low", "high")
"""What a preset settles."""


@dataclass(frozen=True, slots=True)
class VlmJudge:
    """What a vision-language model says of an image, 0..1: yes or no, a mark, several marks, or a level.

    yesno: P(yes) against P(no). score: the last number after a label. levels: excellent .. bad. several: mean of the
    numbers after several labels. atoms: one yes/no question for each thing the GenEval metadata ask for.
    """

    remote: ClassVar[bool] = True

    base_url: Annotated[str, Text("address of the server, without /chat/completions")] = "http://127.0.0.1:8000/v1"
    model: Annotated[str, Text("name of the model on that server")] = ""
    preset: Annotated[
        str, Choice((*PRESETS, OWN), "a published way to ask and score; own: mode, question, labels, low, high say it")
    ] = "vqascore"
    mode: Annotated[str, Choice(tuple(READERS), "how the answer becomes a score; for preset own")] = "yesno"
    question: Annotated[str, Text("what is asked, {prompt} stands for the prompt; for preset own")] = ""
    labels: Annotated[str, Text("what stands before the number in the answer; of several marks: A, B, C")] = ""
    low: Annotated[float, Knob(-1e6, 1e6, "the worst mark, worth 0; for preset own")] = 1.0
    high: Annotated[float, Knob(-1e6, 1e6, "the best mark, worth 1; for preset own")] = 5.0
    max_tokens: Annotated[int, Knob(1, 65536, "longest answer of the modes score and several")] = 512
    thinking: Annotated[
        str, Choice(("default", "off"), "off: tell the server's chat template that the model shall not think")
    ] = "default"
    api_key_variable: KeyVariable = ""
    workers: Workers = 8
    timeout: Timeout = 60.0
    patience: PatienceOption = 300.0

    def __post_init__(self):
        """Refuse options that contradict each other."""
        defaults = {field.name: field.default for field in fields(self)}
        changed = [name for name in PLAN_OPTIONS if getattr(self, name) != defaults[name]]
        if self.preset != OWN and changed:
            raise ValueError(
                f"vlm_judge: {', '.join(changed)} has no effect with preset {self.preset!r}; set preset to {OWN!r}"
            )
        if self.preset == OWN and self.mode != "atoms" and not self.question.strip():
            raise ValueError(f"vlm_judge: preset {OWN!r} needs a question, such as 'Is this {{prompt}}? Yes or no?'")
        unknown = set(re.findall(r"{(\w+)}", self.question)) - {"prompt"}
        if unknown:
            raise ValueError(f"vlm_judge: question has {{{min(unknown)}}}; only {{prompt}} stands for something")
        if self.low >= self.high:
            raise ValueError(f"vlm_judge: low must be below high, got {self.low} and {self.high}")
        if self.mode == "several" and len(set(self.plan.names)) < 2:
            raise ValueError(f"vlm_judge: mode several needs different labels, such as 'A, B', got {self.labels!r}")

    @property
    def plan(self) -> Plan:
        """What is asked and how it is read."""
        if self.preset != OWN:
            return PRESETS[self.preset]
        labels = tuple(filter(None, (label.strip() for label in self.labels.split(","))))
        return Plan(self.mode, self.question, labels, self.low, self.high)

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image. Raises ValueError when the server may not be asked."""
        return self.judged(batch, KEPT)

    def judged(self, batch: RewardBatch, kept: "Answers") -> RewardResult:
        """Score every image; answers in ``kept`` are not asked for again."""
        server = connect(self.base_url, self.api_key_variable)
        check_rgb(batch.images)
        errors: dict[int, str] = {}
        asked: list[int] = []
        jobs: list[Callable[[Event], tuple[float, ...]]] = []
        for index, (prompt, metadata) in enumerate(zip(batch.prompts, batch.metadata, strict=True)):
            try:
                questions = self.plan.questions(prompt, metadata)
            except ValueError as problem:
                errors[index] = f"prompt {excerpt(prompt)!r}: {problem}"
                continue
            picture = Picture(batch.images[index], len(questions))
            jobs += [partial(self.answer, server, picture, question, kept) for question in questions]
            asked += [index] * len(questions)
        values: dict[int, list[float]] = {}
        for index, answer in zip(asked, in_parallel(jobs, self.workers), strict=True):
            if isinstance(answer, Failure):
                errors.setdefault(index, answer.reason)
            else:
                values.setdefault(index, []).extend(answer)
        return self.result({i: found for i, found in values.items() if i not in errors}, errors, len(batch.prompts))

    def result(self, values: Mapping[int, Sequence[float]], errors: Mapping[int, str], num_images: int) -> RewardResult:
        """The mean of each image's values; an image that lacks one of them has no score at all."""
        good = list(values)
        scores = spread(good, [sum(found) / len(found) for found in values.values()], num_images)
        rows = [self.plan.details(found) for found in values.values()]
        details = {n: spread(good, [row[i] for row in rows], num_images) for i, n in enumerate(self.plan.names)}
        return RewardResult(scores, details, errors)

    def answer(
        self, server: Server, picture: Picture, question: Question, kept: "Answers", given_up: Event
    ) -> tuple[float, ...]:
        """The numbers in the answer to one question about one image, 0..1. Raises RemoteError."""
        file = picture.read()
        if file is None:
            raise UnusableError(NOT_NUMBERS)
        key = (self, question, hashlib.sha256(file).digest())
        found = kept.get(key)
        if found is None:
            limits = Limits(self.timeout, self.patience)
            reply = read_reply(
                exchange(server, "/chat/completions", self.request(file, question.text), limits, given_up)
            )
            found = tuple(value if question.expected else 1 - value for value in self.plan.values(reply))
            kept.put(key, found)
        return found

    def request(self, file: bytes, question: str) -> dict[str, Any]:
        """The body of a chat completion."""
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text_of(file)}"}},
            {"type": "text", "text": question},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "seed": SEED,
            "max_tokens": TOKENS.get(self.plan.mode, self.max_tokens),
        }
        body |= {"logprobs": True, "top_logprobs": 20} if self.plan.mode in TOKENS else {}
        return body | ({"chat_template_kwargs": {"enable_thinking": False}} if self.thinking == "off" else {})

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """An address that may not be asked, a server or model that is not there, metadata that do not serve."""
        found = []
        if self.plan.mode == "atoms":
            wrong = [(number, problem_with(data)) for number, data in enumerate(metadata, 1)]
            found = [f"prompt {number} ({prompts[number - 1]!r}): {problem}" for number, problem in wrong if problem]
        try:
            interruptibly(self.health)
        except (ValueError, RemoteError) as problem:
            found.insert(0, str(problem))
        return found

    def health(self) -> None:
        """Ask once for the models of the server. Raises ValueError or RemoteError that says what to do."""
        server = connect(self.base_url, self.api_key_variable)
        limits = Limits(min(self.timeout, HEALTH_SECONDS), 0)
        try:
            names = model_names(exchange(server, "/models", None, limits, Event()))
        except RemoteError as problem:
            raise RemoteError(f"{problem}. Start the server, or correct base_url (most end in /v1)") from None
        if self.model not in names:
            raise RemoteError(
                f"vlm_judge: {self.base_url} has no model {self.model!r}; it has: "
                f"{excerpt(', '.join(names), 1000) if names else 'none'}"
            )

    def test_connection(self) -> str:
        """Whether it works, as a paragraph for a person. Raises only what the host raises to stop."""
        batch = trial_batch({"include": [{"class": "grey surface", "count": 1}]})
        name = f"Model {self.model} on {self.base_url}"
        return tried(name, self.health, lambda trial: replace(self, patience=0.0).judged(trial, Answers()), batch)


def model_names(answer: Any) -> list[str]:
    """The names in the answer to ``GET /models``. Raises RemoteError when it is another answer."""
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise RemoteError("/models answered, but not with a list of models: is this an OpenAI-compatible server?")
    names = [entry.get("id") for entry in entries if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str)]


class Answers:
    """The answers that were used last. Safe in several threads."""

    def __init__(self, most: int = 16384):
        self.most = most
        self.values: OrderedDict[Any, tuple[float, ...]] = OrderedDict()
        self.lock = Lock()

    def get(self, key: Any) -> tuple[float, ...] | None:
        """The answer, or None."""
        with self.lock:
            if key in self.values:
                self.values.move_to_end(key)
            return self.values.get(key)

    def put(self, key: Any, value: tuple[float, ...]) -> None:
        """Keep an answer; the one that was not used for the longest time is forgotten."""
        with self.lock:
            self.values[key] = value
            while len(self.values) > self.most:
                self.values.popitem(last=False)


KEPT = Answers()
"""All judges of this process."""
