"""How well a picture shows the text that its prompt asks for, read by RapidOCR (PP-OCR models) on the CPU.

The optional packages rapidocr and onnxruntime are needed. The models are part of rapidocr and are named by path, so
nothing is ever downloaded.
"""

import importlib.util
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata as metadata_of_packages
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import torch
from torch import Tensor

from ..knobs import Knob
from ..packages import pip_install
from ..protocols import RewardBatch, RewardResult
from ..waiting import check_interrupts
from .files import Need
from .kept import Kept

PACKAGES = ("rapidocr", "onnxruntime")
OLDEST = (3, 9)
"""Of rapidocr: the first whose reader is today's; those before read worse, and some fetch files when they start."""
REINSTALL = f"install it again with:  {pip_install('--force-reinstall', '--no-deps', 'rapidocr')}"
QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201c\u201d]+)\u201d')
TYPEWRITER = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")
"""Typographic quotes and dashes -> those of a keyboard."""
LOCK = Lock()
"""The engine keeps state between its steps; onnxruntime is parallel inside of them."""

Box = Sequence[Sequence[float]]
"""Four corners (x, y) of a piece of text; y points down."""


@dataclass(frozen=True, slots=True)
class Ocr:
    """Share of the wanted text that can be read in the image, 0..1: 1 when it is there in full.

    The text is ``text`` of the prompt file, else what stands in the prompt's first pair of quotation marks. As in
    Flow-GRPO, spaces and case are ignored, and a text that is not there in full scores 1 - distance / its length, with
    the edit distance to everything that was read. Training on it alone empties the picture around the text: combine
    it with a reward that judges the whole image. Detail ``exact``: 1 when the text is there in full, else 0.
    """

    detector_side: Annotated[
        int, Knob(96, 2048, "longest side in pixels at which text is looked for; larger finds smaller text, slower")
    ] = 384
    threads: Annotated[int, Knob(1, 64, "processor threads that reading may use")] = 4

    def needs(self) -> tuple[Need, ...]:
        """No files of its own: the models come with the package."""
        return ()

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image. Raises ValueError when the packages are missing, Interrupted to stop."""
        engine = load_engine(self.detector_side, min(self.threads, os.cpu_count() or 1))
        scores, errors = torch.full((len(batch.prompts),), torch.nan), {}
        for i, (image, prompt, data) in enumerate(zip(batch.images, batch.prompts, batch.metadata, strict=True)):
            check_interrupts()  # hundreds of images take a minute
            found = score(engine, image, prompt, data)
            if isinstance(found, str):
                errors[i] = found
            else:
                scores[i] = found
        return RewardResult(scores, {"exact": (scores == 1).float().where(scores.isfinite(), torch.nan)}, errors)

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Missing packages, and prompts that ask for no text."""
        package = problem_with(model_files)
        texts = [(prompt, problem_with(target, prompt, data)) for prompt, data in zip(prompts, metadata, strict=True)]
        return [*filter(None, [package]), *(f"prompt {prompt!r}: {problem}" for prompt, problem in texts if problem)]


def problem_with(check: Callable[..., object], *given: Any) -> str | None:
    """What ``check`` complains about, or None."""
    try:
        check(*given)
    except ValueError as problem:
        return str(problem)
    return None


def score(engine: Any, image: Tensor, prompt: str, metadata: Mapping[str, Any]) -> float | str:
    """The score of one image [3, H, W], or why it has none."""
    try:
        return similarity(read(engine, image), target(prompt, metadata))
    except ValueError as problem:
        return str(problem)
    except Exception as problem:  # foreign code: its failure is that of one image
        return f"{type(problem).__name__}: {problem}"


def target(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text that the image should show. Raises ValueError when the prompt does not say."""
    if "text" in metadata:
        text = metadata["text"]
        if not isinstance(text, str) or not plain(text):
            raise ValueError(f"its 'text' {text!r} is not a text; write the words that the image should show")
        return text
    found = QUOTED.search(prompt)
    text = found[1] or found[2] if found else ""
    if not plain(text):
        raise ValueError('it has no text in quotation marks; write such as: a sign that says "OPEN"')
    return text


def plain(text: str) -> str:
    """Without spaces, in lower case, and in the one spelling of quotes, dashes and ligatures that the engine writes."""
    return "".join(unicodedata.normalize("NFKC", text).translate(TYPEWRITER).split()).lower()


def similarity(read_text: str, wanted: str) -> float:
    """How much of ``wanted`` is in ``read_text``, 0..1."""
    read_text, wanted = plain(read_text), plain(wanted)
    if wanted in read_text:
        return 1.0
    return 1.0 - min(edit_distance(read_text, wanted), len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """Fewest characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]


def in_reading_order(pieces: Sequence[tuple[Box, str]]) -> str:
    """Pieces of text from top to bottom, and from left to right where they stand in one line."""
    lines: list[tuple[float, float, list[tuple[float, str]]]] = []
    for box, text in sorted(pieces, key=lambda piece: middle(piece[0])[1]):
        x, y = middle(box)
        heights = [corner[1] for corner in box]
        # In one line: its middle is above the lower quarter of the piece the line began with.
        if not lines or y > lines[-1][1]:
            lines.append((y, y + (max(heights) - min(heights)) / 4, []))
        lines[-1][2].append((x, text))
    return " ".join(text for *_, line in lines for _, text in sorted(line))


def middle(box: Box) -> tuple[float, float]:
    """(x, y) of a box."""
    return sum(corner[0] for corner in box) / len(box), sum(corner[1] for corner in box) / len(box)


def read(engine: Any, image: Tensor) -> str:
    """All text in one image [3, H, W]. Raises ValueError for pixels that are not numbers."""
    if not image.isfinite().all():
        raise ValueError("the image has pixels that are not numbers")
    pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).flip(-1).contiguous().cpu().numpy()  # BGR
    with LOCK:
        found = engine(pixels)
    # Without a line that can be read the answer is of another class, which may lack both.
    boxes, texts = getattr(found, "boxes", None), getattr(found, "txts", None)
    if boxes is None or texts is None:
        return ""
    return in_reading_order(list(zip(boxes.tolist(), texts, strict=True)))


def model_files() -> tuple[Path, Path]:
    """Detector and recogniser inside the package. Raises ValueError when the packages are missing or damaged."""
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise ValueError(f"reading text needs {' and '.join(lacking)}; get it with:  {pip_install(*PACKAGES)}")
    try:
        import rapidocr
        from rapidocr import RapidOCR  # noqa: F401  # it is only now that its own libraries are imported
    except (ImportError, OSError) as problem:
        raise ValueError(f"rapidocr is installed but cannot be imported ({problem}); {REINSTALL}") from problem
    version = metadata_of_packages.version("rapidocr")
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise ValueError(
            f"rapidocr {version} is too old, it downloads parts; get 3.9 or newer:  {pip_install('-U', 'rapidocr')}"
        )
    folder = Path(str(rapidocr.__file__)).parent / "models"
    found = [sorted(folder.glob(pattern)) for pattern in ("*_det_*.onnx", "*_rec_*.onnx")]
    if not all(found):
        raise ValueError(f"rapidocr has no models in {folder}; {REINSTALL}")
    return found[0][0], found[1][0]


def load_engine(detector_side: int, threads: int) -> Any:
    """The engine with these settings; equal ones give the same."""
    with LOCK:
        return make_engine(detector_side, threads)


@Kept
def make_engine(detector_side: int, threads: int) -> Any:
    """Read the models. Raises ValueError when the packages are missing."""
    detector, recogniser = model_files()
    from rapidocr import RapidOCR

    settings = {
        "Global.log_level": "critical",
        "Global.use_cls": False,  # a third model, for lines upside down
        "Det.model_path": str(detector),
        "Det.limit_side_len": detector_side,
        "Det.limit_type": "max",  # never enlarge: a small image then costs little
        "Rec.model_path": str(recogniser),
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    return RapidOCR(params=settings)
