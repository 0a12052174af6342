"""What a judge is asked and how its answer becomes a number; the presets are those of published judges."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .atoms import Question, atoms
from .reply import Reply, level, rating, yes_probability


class Plan(NamedTuple):
    """One way to judge."""

    mode: str
    question: str = ""
    """With ``{prompt}`` where the prompt goes; unused by the mode ``atoms``."""
    labels: tuple[str, ...] = ()
    """What stands before each number in the answer."""
    low: float = 1.0
    high: float = 5.0
    """The scale of these numbers."""

    def questions(self, prompt: str, metadata: Mapping[str, Any]) -> list[Question]:
        """What is asked about one image. Raises ValueError when the metadata does not serve."""
        return atoms(metadata) if self.mode == "atoms" else [Question(self.question.replace("{prompt}", prompt))]

    def values(self, reply: Reply) -> tuple[float, ...]:
        """The numbers in an answer, 0..1. Raises UnusableError."""
        return READERS[self.mode](self, reply)

    @property
    def names(self) -> tuple[str, ...]:
        """The sub-scores that are recorded."""
        if self.mode == "atoms":
            return ("strict",)
        return tuple(label.lower().removesuffix(" score") for label in self.labels) if self.mode == "several" else ()

    def details(self, values: Sequence[float]) -> tuple[float, ...]:
        """A sub-score for each of ``names``; strict: 1 when every answer is rather right than wrong."""
        return (float(min(values) > 0.5),) if self.mode == "atoms" else tuple(values[: len(self.names)])


READERS: dict[str, Callable[[Plan, Reply], tuple[float, ...]]] = {
    "yesno": lambda plan, reply: (yes_probability(reply),),
    "score": lambda plan, reply: (rating(reply, plan.labels[0] if plan.labels else "", plan.low, plan.high),),
    "levels": lambda plan, reply: (level(reply),),
    "several": lambda plan, reply: tuple(rating(reply, label, plan.low, plan.high) for label in plan.labels),
    "atoms": lambda plan, reply: (yes_probability(reply),),
}
TOKENS = {"yesno": 1, "atoms": 1, "levels": 16}
"""Length of the answer where only the first words matter; they are read with their probabilities."""

PRESETS = {
    # arXiv 2404.01291; wording of linzhiqiu/t2v_metrics
    "vqascore": Plan("yesno", 'Does this figure show "{prompt}"? Please answer Yes or No.'),
    # arXiv 2503.05236; the model is trained on this wording, here as yifan123/flow_grpo asks it
    "unifiedreward": Plan(
        "score",
        "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
        "based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the "
        "provided caption. Consider the accuracy of depicted objects, their relationships, and attributes as described "
        "in the caption.\n2. Overall Image Quality: Examine the visual quality of this image, including clarity, "
        "detail preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a "
        "score from 1 to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]",
        ("Final Score",),
    ),
    # UnifiedReward-2.0, wording of its point_score_ACS_image_generation.py
    "unifiedreward2": Plan(
        "several",
        "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
        "across multiple dimensions in relation to the caption. Specifically:\nProvide overall assessments for the "
        "image along the following axes (each rated from 1 to 5):\n- Alignment Score: How well the image matches the "
        "caption in terms of content.\n- Coherence Score: How logically consistent the image is (absence of visual "
        "glitches, object distortions, etc.).\n- Style Score: How aesthetically appealing the image looks, regardless "
        "of caption accuracy.\n\nOutput your evaluation using the format below:\n\nAlignment Score (1-5): X\n"
        "Coherence Score (1-5): Y\nStyle Score (1-5): Z\n\nYour task is provided as follows:\nText Caption: [{prompt}]",
        ("Alignment Score", "Coherence Score", "Style Score"),
    ),
    # the five levels of DeQA-Score, asked of any judge
    "quality_levels": Plan(
        "levels",
        "How would you rate the quality of this image? Answer with one word: excellent, good, fair, poor or bad.",
    ),
    "geneval_atoms": Plan("atoms"),
}
OWN = "own"
"""The preset that is none: the options say everything."""
