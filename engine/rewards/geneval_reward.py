"""GenEval (Ghosh et al., arXiv 2310.11513): does the image show the objects, colours, counts and places asked for?

Unlike the official benchmark: counts must be exact (geneval.py), and the detector's weights are others
(geneval_detector.py). Thresholds, the number of objects and the question for a colour are the official ones.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from ..knobs import Choice, Knob, Text
from ..protocols import RewardBatch, RewardResult
from .clip import BatchSize, ModelFolder, Precision, check_folder, load_clip
from .clipscore import CLIP_L
from .files import Need, locate, require_transformers
from .geneval import Detection, judge, problems
from .geneval_colour import colours_of, on_grey
from .geneval_detector import DETECTOR, LOWEST, Detector, Found, check_detector, load_detector
from .geneval_words import CLASSES, COLOURS
from .images import broken
from .placement import Placement, placed

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTING_SCORE = 0.9
"""What is counted must have a higher score; for other tags ``LOWEST`` is enough."""
MAX_OBJECTS = 16
"""Of a class; more of them are left out, those with the lowest scores."""


@dataclass(frozen=True, slots=True)
class GenEval:
    """How much of a GenEval prompt the image shows, 0..1, by Mask2Former and for colours CLIP-L/14.

    ``partial``: share of counts, colours and relations that hold, for training as in Flow-GRPO. ``strict``: 1 when
    all hold. Both are in the details. Prompts need GenEval metadata, a .jsonl file.
    """

    score: Annotated[str, Choice(("partial", "strict"), "which score is the reward")] = "partial"
    detector: Annotated[str, Text("folder of the detector inside the folders for reward models")] = DETECTOR.folder
    model: ModelFolder = CLIP_L.folder
    precision: Precision = "float32"
    """Of CLIP; the detector is always float32."""
    placement: Placement = "swap"
    batch_size: BatchSize = 8
    size: Annotated[int, Knob(64, 2048, "short edge of the image as the detector sees it; official: 800")] = 800

    def needs(self) -> tuple[Need, ...]:
        """Its files."""
        return DETECTOR.for_folder(self.detector), CLIP_L.for_folder(self.model)

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image. Raises ValueError when a model cannot be loaded."""
        detector_folder, clip_folder = locate(self.needs())
        wrong = {i: reason for i, data in enumerate(batch.metadata) if (reason := problem_of(data))}
        errors = wrong | broken(batch.images)
        rows = [i for i in range(len(batch.prompts)) if i not in errors]
        metadata, images = [batch.metadata[i] for i in rows], batch.images[rows]
        detector = load_detector(detector_folder, self.placement)
        with placed(detector.model, images.device, self.placement):
            found = detect(partial(detector.find, size=self.size), images, metadata, self.batch_size)
        colours = self.colours(clip_folder, images, found, metadata)
        scores = torch.full((len(batch.prompts), 2), torch.nan)
        for i, row in enumerate(rows):
            objects = [Detection(one.name, colours.get((i, k), ""), one.box) for k, one in enumerate(found[i])]
            scores[row] = torch.tensor(judge(objects, metadata[i]))
        details = {"strict": scores[:, 0], "partial": scores[:, 1]}
        return RewardResult(details[self.score].clone(), details, errors)

    def colours(
        self, clip_folder: Path, images: Tensor, found: Sequence[Sequence[Found]], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[tuple[int, int], str]:
        """(image, object) -> colour, of objects whose class a prompt wants in a colour; without any, CLIP rests."""
        classes = [{clause["class"] for clause in data["include"] if "color" in clause} for data in metadata]
        asked = [(i, k) for i, objects in enumerate(found) for k, one in enumerate(objects) if one.name in classes[i]]
        if not asked:
            return {}
        clip = load_clip(clip_folder, self.precision, self.placement)
        with placed(clip.model, images.device, self.placement):
            pieces = [on_grey(images[i], found[i][k].box, found[i][k].mask) for i, k in asked]
            colours = colours_of(clip, pieces, [found[i][k].name for i, k in asked], self.batch_size)
        return dict(zip(asked, colours, strict=True))

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Missing or wrong files, and prompts without good GenEval metadata."""
        try:
            require_transformers()
            detector_folder, clip_folder = locate(self.needs())
            check_detector(detector_folder)
            check_folder(clip_folder)
        except ValueError as problem:
            return [str(problem)]
        pairs = zip(prompts, metadata, strict=True)
        return [f"prompt {prompt!r}: {problem}" for prompt, data in pairs if (problem := problem_of(data))]


def problem_of(metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with the metadata of a prompt, or None."""
    if "include" not in metadata:
        return (
            "it has no GenEval metadata; use a .jsonl file of prompts with lines such as "
            '{"prompt": "a photo of two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}], '
            '"exclude": [{"class": "cat", "count": 3}]}'
        )
    if metadata.get("tag") not in TAGS:
        return f"tag {metadata.get('tag')!r} is not one of {', '.join(TAGS)}"
    return problems(metadata, CLASSES, COLOURS)


def detect(
    detector: Detector, images: Tensor, metadata: Sequence[Mapping[str, Any]], batch_size: int
) -> list[list[Found]]:
    """The objects that matter for the prompt of each image [B, 3, H, W], the best first."""
    found = [objects for part in images.split(batch_size) if len(part) for objects in detector(part)]
    return [wanted(*pair) for pair in zip(found, metadata, strict=True)]


def wanted(found: Sequence[Found], metadata: Mapping[str, Any]) -> list[Found]:
    """Those of the prompt's classes that are certain enough for its tag, at most ``MAX_OBJECTS`` of a class."""
    names = {clause["class"] for clause in (*metadata["include"], *metadata.get("exclude", ()))}
    least = COUNTING_SCORE if metadata["tag"] == "counting" else LOWEST
    kept, num_kept = [], Counter()
    for one in sorted(found, key=lambda one: one.score, reverse=True):
        if one.name in names and one.score > least and num_kept[one.name] < MAX_OBJECTS:
            num_kept[one.name] += 1
            kept.append(one)
    return kept
