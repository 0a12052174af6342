"""CLIP as the rewards use it: own image preparation, text features kept per prompt, float32 scores.

Only torch and transformers are needed, and transformers is imported when the first model is loaded. A CLIP is shared by
all rewards with equal settings.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from ..knobs import Choice, Knob, Text
from ..protocols import RewardBatch, RewardResult
from .files import check_tensors, read_shapes, read_weights, require_transformers, some
from .images import broken, check_rgb
from .kept import Kept
from .placement import placed

if TYPE_CHECKING:
    from transformers import CLIPConfig

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_KEPT = 8192
"""Text features kept at most; the oldest are forgotten."""

ModelFolder = Annotated[str, Text("folder of the model inside the folders for reward models")]
Precision = Annotated[
    str, Choice(("float32", "bfloat16", "float16"), "type of the weights; scores are always computed in float32")
]
BatchSize = Annotated[int, Knob(1, 1024, "images that are scored at once")]
Prepare = Callable[[Tensor, int], Tensor]
"""(images [B, 3, H, W] in 0..1, edge of the input) -> normalised [B, 3, edge, edge]."""
Weights = dict[str, Tensor]

log = logging.getLogger("densegrpo.rewards")


def crop(images: Tensor, size: int) -> Tensor:
    """Shortest edge to ``size``, centre crop, normalised: as transformers' CLIPImageProcessor, to one grey level.

    Raises ValueError for anything but float [B, 3, H, W].
    """
    pixels = eight_bit(images)
    height, width = pixels.shape[-2:]
    shortest = min(height, width)
    rows, columns = int(size * height / shortest), int(size * width / shortest)
    pixels = resized_as_pillow(pixels, rows, columns)
    top, left = (rows - size) // 2, (columns - size) // 2
    return normalised(pixels[..., top : top + size, left : left + size] / 255)


def letterbox(images: Tensor, size: int) -> Tensor:
    """Longest edge to ``size``, black borders, normalised: open_clip's ResizeMaxSize, as HPSv2 prepares images.

    The resize is on float values and antialiased, so it may overshoot 0..1 a little, as in the original. Raises
    ValueError for anything but float [B, 3, H, W].
    """
    pixels = eight_bit(images) / 255
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    down, right = size - rows, size - columns
    borders = (right // 2, right - right // 2, down // 2, down - down // 2)
    return normalised(pad(resized(pixels, (rows, columns)), borders))


def eight_bit(images: Tensor) -> Tensor:
    """0..1 -> whole numbers in 0..255 as float32, what a PNG file of the image holds."""
    check_rgb(images)
    return (images.float().clamp(0, 1) * 255).round()


def resized(pixels: Tensor, shape: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Antialiased resize."""
    if pixels.shape[-2:] == shape:
        return pixels
    return interpolate(pixels, shape, mode=mode, antialias=True, align_corners=False)


def resized_as_pillow(pixels: Tensor, rows: int, columns: int, mode: str = "bicubic") -> Tensor:
    """Antialiased resize of whole numbers in 0..255 to such numbers, on any device.

    Pillow resizes 8-bit images along the width first and rounds and clips after each direction; so does this.
    """
    for shape in ((pixels.shape[-2], columns), (rows, columns)):
        pixels = resized(pixels, shape, mode).round().clamp(0, 255)
    return pixels


def normalised(pixels: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Zero mean and unit deviation over the training images, OpenAI's unless told otherwise."""
    return (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)


class Loaded(Protocol):
    """A model in memory."""

    model: Any
    placement: str


@dataclass(eq=False)
class Clip:
    """A loaded CLIP with the features of the prompts it has seen."""

    model: Any
    tokenizer: Any
    placement: str
    clean: Callable[[str], str] = str
    """What is done to a prompt before the tokenizer, which itself makes it lower case."""
    scale: float = 100.0
    """exp(logit_scale), about 100, as the file has it: rounded to bfloat16 it is 1 % less."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Prompt -> [D] unit float32 on the CPU."""

    def cosine(self, images: Tensor, prompts: Sequence[str], prepare: Prepare) -> Tensor:
        """Cosine [B] of each image [B, 3, H, W] and its own prompt, float32 on the CPU."""
        return (self.image_features(images, prepare) * self.text_features(prompts)).sum(1)

    def image_features(self, images: Tensor, prepare: Prepare) -> Tensor:
        """[B, 3, H, W] in 0..1 -> unit features [B, D], float32 on the CPU."""
        pixels = prepare(images.to(self.model.device), self.model.config.vision_config.image_size)
        return unit(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit features [B, D] of prompts, float32 on the CPU; each distinct prompt is encoded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.kept]
        if new:
            found = unit(self.model.get_text_features(**self.tokens(new).to(self.model.device)))
            self.kept |= dict(zip(new, found, strict=True))
        answer = torch.stack([self.kept[prompt] for prompt in prompts])
        for oldest in list(self.kept)[: max(0, len(self.kept) - MAX_KEPT)]:
            del self.kept[oldest]
        return answer

    def tokens(self, prompts: Sequence[str]) -> Any:
        """Token ids and mask, padded and cut to the length the model was trained with, 77."""
        length = self.model.config.text_config.max_position_embeddings
        texts = [self.clean(prompt) for prompt in prompts]
        return self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


def unit(found: Any) -> Tensor:
    """Projected features of transformers 4 (a tensor) or 5 (an object) -> unit length, float32 on the CPU."""
    features = found if torch.is_tensor(found) else found.pooler_output
    return normalize(features.detach().float().cpu(), dim=-1)


def score_batch(
    loaded: Loaded, batch: RewardBatch, batch_size: int, score: Callable[[Tensor, Sequence[str]], Tensor]
) -> RewardResult:
    """Score the images in parts; one with pixels that are no numbers gets NaN with a reason.

    ``score``: (images [B, 3, H, W], prompts [B]) -> [B].
    """
    errors = broken(batch.images)
    scores = torch.full((len(batch.prompts),), torch.nan)
    good = torch.tensor([i for i in range(len(scores)) if i not in errors], dtype=torch.long)
    with placed(loaded.model, batch.images.device, loaded.placement):
        for rows in good.split(batch_size):
            if len(rows):
                prompts = [batch.prompts[int(i)] for i in rows]
                scores[rows] = score(batch.images[rows.to(batch.images.device)], prompts)
    return RewardResult(scores, {}, errors)


def problems_of(
    check: Callable[[], Path], prompts: Sequence[str], read: Callable[[Path], Any] | None = None, length: int = 77
) -> list[str]:
    """What keeps a reward from comparing images with these prompts; also logs prompts that are too long.

    ``check``: raises ValueError when the files are no good, returns the folder of the tokenizer, which ``read`` reads;
    CLIP's by default. ``length``: tokens the model sees.
    """
    try:
        require_transformers()
        tokenizer_folder = check()
    except ValueError as problem:
        return [str(problem)]
    if prompts:
        warn_of_long(prompts, (read or read_tokenizer)(tokenizer_folder), length)
    return [f"prompt {i} is empty; it compares an image with a text" for i, p in enumerate(prompts, 1) if not p.strip()]


def warn_of_long(prompts: Sequence[str], tokenizer: Any, length: int) -> None:
    """Log how many prompts the model sees only the beginning of."""
    encoded = tokenizer(list(prompts), truncation=False)["input_ids"]
    long = [prompt for prompt, ids in zip(prompts, encoded, strict=True) if len(ids) > length]
    if long:
        log.warning(
            "%d of %d prompts have more than %d tokens; the model sees only their beginning. The first: %.60s...",
            *(len(long), len(prompts), length, long[0]),
        )


def model_type(folder: Path) -> str | None:
    """What config.json says the model is, or None. Raises ValueError when it is damaged."""
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ValueError(f"{folder / 'config.json'} cannot be read ({problem}); get it again") from None
    return data.get("model_type") if isinstance(data, dict) else None


def read_config(folder: Path) -> "CLIPConfig":
    """The model's shape. Raises ValueError when config.json is damaged or describes something else."""
    from transformers import CLIPConfig

    kind = model_type(folder)
    if kind != "clip":
        raise ValueError(f"{folder / 'config.json'} describes a model of type {kind!r}, this reward needs 'clip'")
    return CLIPConfig.from_pretrained(folder, local_files_only=True)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; code that comes with it is never run. Raises ValueError when it is damaged."""
    from transformers import CLIPTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    try:
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # the library of tokenizers raises nothing more specific
        raise ValueError(f"the tokenizer in {folder} cannot be read ({problem}); get its files again") from problem


def check_end(config: "CLIPConfig", tokenizer: Any, folder: Path) -> None:
    """Raise ValueError unless the model looks for the tokenizer's end token; it reads a prompt's features there."""
    text: Any = config.text_config
    end = text.eos_token_id  # 2 in old configurations: transformers then takes the largest id
    if end not in (2, tokenizer.eos_token_id):
        raise ValueError(
            f"the model's eos_token_id is {end}, that of the tokenizer in {folder} is {tokenizer.eos_token_id}; every "
            "prompt would get the same features. Use the tokenizer that belongs to the model"
        )


def check_clip(config: "CLIPConfig", weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless ``weights`` are all those of the model; transformers would fill gaps at random."""
    from transformers import CLIPModel

    with torch.device("meta"):
        expected = CLIPModel(config).state_dict()
    check_tensors(path, weights, {name: value for name, value in expected.items() if "position_ids" not in name})
    more = [name for name in weights if name.startswith(("text_model.", "vision_model.")) and name not in expected]
    more = [name for name in more if not name.endswith("position_ids")]
    if more:
        raise ValueError(f"{path} has more than the model that config.json describes: {some(more)}")


def build(
    config: "CLIPConfig", weights: Weights, tokenizer_folder: Path, path: Path, precision: str, placement: str
) -> Clip:
    """A CLIP of the weights that were read from ``path``. Raises ValueError when the parts do not fit."""
    from transformers import CLIPModel

    check_clip(config, weights, path)
    tokenizer = read_tokenizer(tokenizer_folder)
    check_end(config, tokenizer, tokenizer_folder)
    with torch.random.fork_rng(devices=[]):  # transformers 4 draws weights before it reads them
        model: Any = CLIPModel.from_pretrained(None, config=config, state_dict=weights)
    model = model.to(getattr(torch, precision)).eval().requires_grad_(False)
    return Clip(model, tokenizer, placement, scale=weights["logit_scale"].float().exp().item())


@Kept
@torch.inference_mode(False)
def load_clip(folder: Path, precision: str, placement: str) -> Clip:
    """The CLIP in a folder with config.json, model.safetensors and tokenizer; equal arguments give the same one.

    Weights made in inference mode, where ComfyUI runs nodes, could not be moved outside of it.
    """
    require_transformers()
    path = folder / "model.safetensors"
    return build(read_config(folder), read_weights(path), folder, path, precision, placement)


def check_folder(folder: Path) -> Path:
    """The same folder; ValueError when ``load_clip`` would raise one. The weights are not read."""
    config = read_config(folder)
    check_clip(config, read_shapes(folder / "model.safetensors"), folder / "model.safetensors")
    check_end(config, read_tokenizer(folder), folder)
    return folder
