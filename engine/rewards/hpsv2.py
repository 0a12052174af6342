"""HPSv2.1 (Wu et al., arXiv 2306.09341): human preference. The published open_clip checkpoint, without open_clip."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..protocols import RewardBatch, RewardResult
from .clip import (
    BatchSize,
    Clip,
    ModelFolder,
    Precision,
    Weights,
    build,
    check_clip,
    check_end,
    letterbox,
    model_type,
    problems_of,
    read_config,
    read_tokenizer,
    score_batch,
)
from .clipscore import CLIP_L
from .files import TOKENIZER, Need, choose, locate, read_shapes, read_weights, require_transformers, resolve
from .kept import Kept
from .pickscore import PICKSCORE
from .placement import Placement

if TYPE_CHECKING:
    from transformers import CLIPConfig

WEIGHTS = ("HPS_v2.1_compressed.safetensors", "HPS_v2.1_compressed.pt", "model.safetensors")
HPS = Need(
    "HPSv2.1",
    (WEIGHTS,),
    "xswu/HPSv2",
    "2.0 GB",
    "Apache-2.0",
    "hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir {folder}",
)
TOKENIZER_NEED = Need(
    HPS.folder,
    (TOKENIZER,),
    "openai/clip-vit-large-patch14",
    "3 MB",
    "MIT, as OpenAI's CLIP",
    "hf download openai/clip-vit-large-patch14 tokenizer.json tokenizer_config.json vocab.json merges.txt "
    "--local-dir {folder}",
)
TOKENIZER_FOLDERS = (CLIP_L.folder, PICKSCORE.folder)
"""All these models have the same tokenizer, so another one's will do."""
TOKENIZER_SOURCES: list[Callable[[], Path]] = []
"""A host that brings that tokenizer appends its folder, which may be outside of the roots."""
END = 49407
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
INPUT = {"image_size": 224, "patch_size": 14}
"""open_clip's ViT-H-14."""
NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
"""open_clip -> transformers, beside the blocks."""
TRANSPOSED = ("text_projection", "visual.proj")
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


@dataclass(frozen=True, slots=True)
class Hpsv2:
    """Cosine of HPSv2.1's features of image and prompt, -1..1, usually 0.20..0.36.

    Images are letterboxed, not cropped. Scores of version 2.0 cannot be compared with these.
    """

    model: ModelFolder = HPS.folder
    precision: Precision = "float32"
    placement: Placement = "swap"
    batch_size: BatchSize = 16

    def needs(self) -> tuple[Need, ...]:
        """Its files; the tokenizer may be that of another CLIP."""
        own = (HPS.for_folder(self.model), TOKENIZER_NEED.for_folder(self.model))
        return own if tokenizer_folder(self.model) is None else own[:1]

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image. Raises ValueError when the model cannot be loaded."""
        path, tokenizer = hps_files(self)
        clip = load_hps(path, tokenizer, self.precision, self.placement)
        return score_batch(clip, batch, self.batch_size, lambda i, prompts: clip.cosine(i, prompts, letterbox))

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Missing or wrong files, and empty prompts."""

        def check() -> Path:
            path, tokenizer = hps_files(self)
            config = hps_config(path.parent)
            check_clip(config, to_transformers(read_shapes(path)), path)
            check_end(config, read_tokenizer(tokenizer), tokenizer)
            return tokenizer

        return problems_of(check, prompts)


def hps_files(reward: Hpsv2) -> tuple[Path, Path]:
    """Weights and tokenizer folder. Raises ValueError when there are none."""
    path = choose(locate(reward.needs())[0], WEIGHTS)
    tokenizer = tokenizer_folder(reward.model)
    assert path is not None, "locate found it"
    assert tokenizer is not None, "or needs would have named it"
    return path, tokenizer


def tokenizer_folder(model: str) -> Path | None:
    """The model's own folder, another CLIP's, or a host's that has a tokenizer."""
    folders = [folder for name in (model, *TOKENIZER_FOLDERS) if (folder := resolve(name))]
    found = [folder for folder in folders if choose(folder, TOKENIZER)]
    found += [folder for source in TOKENIZER_SOURCES if (folder := source()).joinpath("vocab.json").is_file()]
    return next(iter(found), None)


@Kept
@torch.inference_mode(False)
def load_hps(path: Path, tokenizer: Path, precision: str, placement: str) -> Clip:
    """The model in a checkpoint; equal arguments give the same one."""
    require_transformers()
    config, weights = hps_config(path.parent), to_transformers(read_weights(path))
    clip = build(config, weights, tokenizer, path, precision, placement)
    clip.clean = open_clip_text
    return clip


def hps_config(folder: Path) -> "CLIPConfig":
    """ViT-H-14, or what a transformers config.json beside the checkpoint says."""
    from transformers import CLIPConfig

    if (folder / "config.json").is_file() and model_type(folder) == "clip":
        return read_config(folder)
    tokens = {"vocab_size": END + 1, "bos_token_id": END - 1, "eos_token_id": END, "pad_token_id": END}
    shared = {"hidden_act": "gelu", "projection_dim": 1024}
    return CLIPConfig(
        text_config={**TEXT, **shared, **tokens, "max_position_embeddings": 77},
        vision_config={**VISION, **shared, **INPUT},
        projection_dim=1024,
    )


def open_clip_text(prompt: str) -> str:
    """Undo HTML entities twice, as open_clip's tokenizer does; it also repairs broken Unicode, which this does not."""
    return html.unescape(html.unescape(prompt)).strip()


def to_transformers(weights: Weights) -> Weights:
    """open_clip's names, with or without ``model.`` in front, to those of CLIPModel; these pass unchanged."""
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    if "visual.proj" not in weights:
        return weights
    converted: Weights = {}
    for name, value in weights.items():
        block = BLOCK.fullmatch(name)
        if block:
            converted |= block_weights(block, value)
        elif name in NAMES:
            converted[NAMES[name]] = value.T.contiguous() if name in TRANSPOSED else value
    return converted


def block_weights(name: "re.Match[str]", value: Tensor) -> Weights:
    """One tensor of a transformer block; that of query, key and value in one becomes three."""
    tower, number, part, kind = name.groups()
    prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
    if part == "attn.in_proj":
        thirds = zip("qkv", value.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{letter}_proj.{kind}": third.contiguous() for letter, third in thirds}
    return {f"{prefix}.{BLOCK_NAMES.get(part, part)}.{kind}": value}
