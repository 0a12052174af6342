"""What scoring costs on this machine: milliseconds and memory per image of each reward. A part of ``make bench``.

Rewards that need model files are measured with random weights in the published shapes, so nothing is downloaded, and
from the images to the scores: resizing is included, making tokens of a prompt is not.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.profiler import ProfilerActivity, profile

from .bench import best_seconds, say
from .demo.scenes import SceneSampler, all_prompts, cell_table
from .pictures import to_tensor
from .protocols import Reward, RewardBatch
from .rewards import VARIANTS, make_reward
from .rewards import hpsv2 as clip_h
from .rewards import imagereward as blip
from .rewards.aesthetic import apply
from .rewards.aesthetic_siglip import HEAD, Siglip
from .rewards.clip import Clip, crop
from .rewards.files import require_transformers
from .rewards.geneval_detector import Mask2Former, Network
from .rewards.geneval_words import COCO_CLASSES
from .rewards.ocr import model_files, problem_with
from .rewards.remote.picture import png_file
from .serve import DEFAULT_HOST, make_server

CPU = torch.device("cpu")
WITHOUT_MODEL = ("brightness", "colourfulness", "jpeg compressible", "shapes dense", "shapes partial")
BATCHES = (1, 8, 32)
SIZE = 512
"""Edge of the images that models see."""
GRAIN = 0.03
"""Without it, images would be compressed faster than pictures are."""
GENEVAL_SIZE = 800
"""Short edge of what GenEval's detector sees."""


class Scoring(NamedTuple):
    """What is measured of a model."""

    score: Callable[[Tensor], object]
    """Images [B, 3, H, W] in 0..1."""
    read: Callable[[int], object] | None = None
    """So many new prompts, where they are read once and kept."""


class Case(NamedTuple):
    """A model of one or more rewards."""

    title: str
    network: Callable[[], Any]
    """Made on the default device, with random weights."""
    scoring: Callable[[Any], Scoring]
    precisions: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    counted_on: str = "meta"
    """Device it is made on to count its weights; transformers 4 cannot make Mask2Former without memory."""


@dataclass(frozen=True)
class RandomTokens:
    """Stands for a tokenizer."""

    vocab_size: int

    def __call__(self, texts: Sequence[str], *, max_length: int, **options: Any) -> Any:
        """As many tokens of each text as there can be."""
        from transformers import BatchEncoding

        ids = torch.randint(self.vocab_size, (len(texts), max_length))
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def clip_network(text: dict[str, Any], vision: dict[str, Any], width: int) -> Any:
    """A CLIP whose features have ``width`` numbers."""
    from transformers import CLIPConfig, CLIPModel

    end = clip_h.END
    tokens = {"vocab_size": end + 1, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    shared = {"projection_dim": width}
    return CLIPModel(
        CLIPConfig(
            text_config={**text, **tokens, **shared, "max_position_embeddings": 77},
            vision_config={**vision, **shared},
            projection_dim=width,
        )
    )


def clip_scoring(model: Any) -> Scoring:
    """Features of images, and of prompts: their product costs nothing."""
    clip = Clip(model, RandomTokens(model.config.text_config.vocab_size), "resident")

    def read(num_prompts: int) -> None:
        clip.kept.clear()
        clip.text_features([f"prompt {i}" for i in range(num_prompts)])

    return Scoring(lambda images: clip.image_features(images, crop), read)


def siglip_network(**shape: Any) -> Any:
    """The image encoder of a SigLIP."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**shape))


def siglip_scoring(model: Any) -> Scoring:
    """Aesthetic predictor v2.5."""
    siglip, head = Siglip(model, "resident"), random_layers(model.config.hidden_size, HEAD.widths)
    return Scoring(lambda images: apply(head, siglip.features(images)))


def blip_network(text: dict[str, Any], vision: dict[str, Any]) -> nn.Module:
    """Both encoders of ImageReward."""
    from transformers import BlipConfig, BlipTextModel, BlipVisionModel

    config: Any = BlipConfig(text_config=text, vision_config=vision)
    return blip.Network(
        BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, add_pooling_layer=False)
    )


def blip_scoring(model: Any) -> Scoring:
    """ImageReward; it reads the prompt anew for each image."""
    config = model.text.config
    layers = random_layers(config.hidden_size, blip.WIDTHS)
    scorer = blip.Scorer(model, layers, RandomTokens(config.vocab_size), "resident")
    return Scoring(lambda images: scorer.score(images, ["a prompt"] * len(images)))


def detector_network(**shape: Any) -> nn.Module:
    """GenEval's detector, by default Mask2Former Swin-S."""
    from transformers import Mask2FormerConfig, Mask2FormerModel

    config = Mask2FormerConfig(**shape)
    return Network(Mask2FormerModel(config), nn.Linear(config.hidden_dim, len(COCO_CLASSES) + 1))


def detector_scoring(model: Any, size: int = GENEVAL_SIZE) -> Scoring:
    """It finds nothing with random weights, so cutting out objects is not measured."""
    detector = Mask2Former(model, COCO_CLASSES, "resident")
    return Scoring(lambda images: detector.find(images, size))


def random_layers(width: int, widths: Sequence[int]) -> tuple[tuple[Tensor, Tensor], ...]:
    """(weight, bias) of the layers behind a model."""
    return tuple((torch.randn(n, m), torch.randn(n)) for m, n in zip((width, *widths), widths, strict=False))


TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VISION_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
"""OpenAI's ViT-L/14."""
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
"""SigLIP's shape-optimised model."""

CLIP_L = Case(
    "CLIP-L/14: clipscore, aesthetic, colours of geneval",
    partial(clip_network, TEXT_L, {**VISION_L, **clip_h.INPUT}, 768),
    clip_scoring,
)
CASES = (
    CLIP_L,
    Case(
        "CLIP-H/14: pickscore, hpsv2",
        partial(clip_network, clip_h.TEXT, {**clip_h.VISION, **clip_h.INPUT}, 1024),
        clip_scoring,
    ),
    Case(
        "SigLIP so400m/14, 384 px: aesthetic_siglip",
        partial(siglip_network, **SO400M, image_size=384, patch_size=14),
        siglip_scoring,
    ),
    Case(
        "BLIP-large: imagereward",
        partial(blip_network, {**blip.TEXT, **blip.TOKENS}, {**blip.VISION, **blip.INPUT}),
        blip_scoring,
    ),
    Case("Mask2Former Swin-S, 800 px: geneval", detector_network, detector_scoring, (torch.float32,), counted_on="cpu"),
)


def bench_rewards() -> None:
    """Everything this machine can run."""
    say("\nrewards: milliseconds and memory (of torch, at its peak, beside images and weights) per image")
    local_table()
    reading_table()
    remote_table()
    try:
        require_transformers()
    except ValueError as problem:
        say(f"rewards with models: not measured; {problem}")
        return
    if torch.cuda.is_available():
        model_table(CASES, torch.device("cuda"), SIZE, BATCHES)
    else:
        size_table(CASES)
        say("no GPU here, so only CLIP-L/14 is timed, one image at a time; others take up to 10 s an image")
        model_row(CLIP_L, CPU, torch.float32, SIZE, (1,))


def local_table(sizes: Sequence[int] = (64, SIZE), num_images: int = 8) -> None:
    """Rewards without any model, on the CPU."""
    say(f"without a model, {num_images} images of coloured shapes with grain at once, CPU")
    batches = {size: scenes(size, num_images) for size in sizes}
    for label in WITHOUT_MODEL:
        reward = make_reward(**VARIANTS[label])
        cells = [f"{size:4} px {cost(scored(reward, batch), num_images, CPU)}" for size, batch in batches.items()]
        say(f"  {label:18} {'   '.join(cells)}")


def reading_table(sizes: Sequence[int] = (64, SIZE, 1024)) -> None:
    """Reading text, where the packages for it are installed."""
    problem = problem_with(model_files)
    if problem:
        say(f"ocr: not measured; {problem}")
        return
    reward = make_reward("ocr", threads=1)
    say("ocr, an image with two words, CPU, one thread; memory is not known, it is not torch's")
    seconds = {size: best_seconds(scored(reward, sign(size)), CPU) for size in sizes}
    say("  " + "   ".join(f"{size:4} px {seconds[size] * 1000:7.1f} ms" for size in sizes))


def remote_table(size: int = SIZE, num_images: int = 32, in_one: int = 4, at_a_time: Sequence[int] = (1, 2, 8)) -> None:
    """What asking a reward server costs beside the reward, all in this process."""
    batch = scenes(size, num_images)
    files = [png_file(image) for image in batch.images]
    plain = best_seconds(scored(make_reward("brightness"), batch), CPU) / num_images
    encoding = best_seconds(lambda: [png_file(image) for image in batch.images], CPU) / num_images
    say(
        f"a reward server on this machine (densegrpo serve --reward brightness), {num_images} images of {size} px, "
        f"{in_one} in a request; client and server share this process and its {os.cpu_count()} cores, and each request "
        "encodes its own images"
    )
    mean_size = sum(len(file or b"") for file in files) / num_images / 1e6
    say(f"  encoding a PNG file {encoding * 1000:7.1f} ms, {mean_size:.2f} MB; the reward itself {plain * 1000:.2f} ms")
    server = make_server([{"name": "brightness"}], DEFAULT_HOST, 0)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        for workers in at_a_time:
            url = f"http://{DEFAULT_HOST}:{server.server_address[1]}"
            reward = make_reward("remote_http", url=url, workers=workers, batch_size=in_one)
            more = best_seconds(scored(reward, batch), CPU) / num_images - plain
            say(f"  requests at a time {workers} {more * 1000:7.1f} ms more per image than without a server")
    finally:
        server.shutdown()
        server.server_close()


def size_table(cases: Sequence[Case]) -> None:
    """How large the models are."""
    say("with a model: size of the weights")
    for case in cases:
        with torch.device(case.counted_on):
            count = sum(p.numel() for p in case.network().parameters())
        sizes = [f"{count * precision.itemsize / 1e6:5.0f} MB in {short(precision)}" for precision in case.precisions]
        say(f"  {case.title:52} {count / 1e6:4.0f} M parameters: {', '.join(sizes)}")


def model_table(cases: Sequence[Case], device: torch.device, size: int, batches: Sequence[int]) -> None:
    """All models in all their precisions."""
    say(
        f"with a model, random weights, images of {size} px, {device.type}; without making tokens of a prompt. geneval "
        "adds one image of CLIP-L/14 for each object whose colour is asked for"
    )
    for case in cases:
        for precision in case.precisions:
            model_row(case, device, precision, size, batches)


def model_row(case: Case, device: torch.device, precision: torch.dtype, size: int, batches: Sequence[int]) -> None:
    """One model: time by images at once, memory at the most of them, and time of a prompt."""
    with device:
        model = case.network()
    model = model.to(precision).eval().requires_grad_(False)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    scoring = case.scoring(model)
    say(f"  {case.title}, {short(precision)}, weights {weights / 1e6:.0f} MB")
    for num_images in batches:
        images = scenes(size, num_images).images.to(device)
        try:
            say(f"    images at once {num_images:3} {cost(lambda i=images: scoring.score(i), num_images, device)}")
        except torch.OutOfMemoryError:
            say(f"    images at once {num_images:3}: out of memory")
            torch.cuda.empty_cache()
    if scoring.read:
        read = partial(scoring.read, 8)
        say(f"    each new prompt    {cost(read, 8, device)}")


def short(precision: torch.dtype) -> str:
    """``float32``."""
    return str(precision).removeprefix("torch.")


def scored(reward: Reward, batch: RewardBatch) -> Callable[[], object]:
    """The work of scoring a batch. Raises RuntimeError when it fails: that may be fast, but is not what is meant."""
    errors = reward(batch).errors
    if errors:
        raise RuntimeError(f"nothing was measured: {next(iter(errors.values()))}")
    return lambda: reward(batch)


def cost(work: Callable[[], object], count: int, device: torch.device) -> str:
    """Time and memory of each of ``count`` things that ``work`` does."""
    seconds, memory = best_seconds(work, device), peak_memory(work, device)
    return f"{seconds / count * 1000:8.2f} ms {memory / count / 1e6:7.2f} MB"


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch needs for ``work`` at most at a time, beside what it holds before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with without_notices(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            work()
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((one for one in events if one["name"] == "[memory]"), key=lambda one: one["ts"])
    return max(accumulate((one["args"]["Bytes"] for one in changes), initial=0))


@contextmanager
def without_notices() -> Iterator[None]:
    """Torch's profiler writes when it begins and ends, below Python's own stderr."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def scenes(size: int, num_images: int) -> RewardBatch:
    """Pictures of the demo model's grammar with their prompts, enlarged and with grain."""
    entries = list(all_prompts())
    chosen = torch.linspace(0, len(entries) - 1, num_images).long()
    random = torch.Generator().manual_seed(0)
    images = interpolate(SceneSampler(entries, cell_table())(chosen, random), (size, size), mode="bilinear")
    images = (images + GRAIN * torch.randn(images.shape, generator=random)).clamp(0, 1)
    wanted = [entries[i] for i in chosen.tolist()]
    return RewardBatch(images, [entry["prompt"] for entry in wanted], wanted)


def sign(size: int) -> RewardBatch:
    """A picture with two words on it."""
    picture = Image.new("RGB", (size, size), "white")
    font = ImageFont.load_default(size / 8)
    ImageDraw.Draw(picture).text((size / 2, size / 2), "OPEN NOW", fill="black", font=font, anchor="mm")
    return RewardBatch(to_tensor(picture)[None], ['a sign that says "OPEN NOW"'], [{}])
