"""ImageReward-v1.0 (Xu et al., arXiv 2304.05977): human preference. The published checkpoint, without its package.

BLIP's image encoder, a BERT that reads the prompt and looks at the image, and five linear layers on its first state.
It runs on transformers' own BLIP; the tokens [DEC] and [ENC] that the package adds never occur in a prompt.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..protocols import RewardBatch, RewardResult
from .aesthetic import apply, linear_layers
from .clip import BatchSize, ModelFolder, Precision, Weights, crop, model_type, problems_of, score_batch
from .files import Need, check_tensors, choose, locate, read_shapes, read_weights, require_transformers
from .kept import Kept
from .placement import Placement
from .pretrained import COMPUTED, pretrained

WEIGHTS = ("ImageReward.safetensors", "ImageReward.pt")
IMAGE_REWARD = Need(
    "ImageReward",
    (WEIGHTS,),
    "zai-org/ImageReward",
    "1.8 GB",
    "Apache-2.0",
    "hf download zai-org/ImageReward ImageReward.pt --local-dir {folder}",
)
VOCABULARY = Need(
    IMAGE_REWARD.folder,
    (("vocab.txt",),),
    "google-bert/bert-base-uncased",
    "0.2 MB",
    "Apache-2.0",
    "hf download google-bert/bert-base-uncased vocab.txt --local-dir {folder}",
)
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores of the images it was trained on."""
LENGTH = 35
"""Tokens of a prompt that it sees."""
LAYERS = ("mlp.layers.0.", "mlp.layers.2.", "mlp.layers.4.", "mlp.layers.6.", "mlp.layers.7.")
WIDTHS = (1024, 128, 64, 16, 1)
"""Names and outputs of the last layers; there is no activation between them."""
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
INPUT = {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TOKENS = {"vocab_size": 30524, "max_position_embeddings": 512, "pad_token_id": 0}
"""BLIP-large's ViT and BERT-base with two more tokens."""
NAMES = (
    (r"text\.", "blip.text_encoder."),
    (r"vision\.embeddings\.class_embedding", "blip.visual_encoder.cls_token"),
    (r"vision\.embeddings\.position_embedding", "blip.visual_encoder.pos_embed"),
    (r"vision\.embeddings\.patch_embedding\.", "blip.visual_encoder.patch_embed.proj."),
    (r"vision\.post_layernorm\.", "blip.visual_encoder.norm."),
    (r"vision\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blip.visual_encoder.blocks.\1.norm\2."),
    (r"vision\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blip.visual_encoder.blocks.\1.attn.qkv."),
    (r"vision\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blip.visual_encoder.blocks.\1.attn.proj."),
    (r"vision\.encoder\.layers\.(\d+)\.mlp\.", r"blip.visual_encoder.blocks.\1.mlp."),
)
"""Beginning of a name in ``Network`` -> in the checkpoint."""


@dataclass(frozen=True, slots=True)
class ImageReward:
    """ImageReward-v1.0's human preference for image and prompt, about -2.3..2; 0 is the mean of its training data.

    Training against it alone is known to spoil images; it is best as one of several rewards, or held out.
    """

    model: ModelFolder = IMAGE_REWARD.folder
    precision: Precision = "float32"
    placement: Placement = "swap"
    batch_size: BatchSize = 16

    def needs(self) -> tuple[Need, ...]:
        """Its files."""
        return IMAGE_REWARD.for_folder(self.model), VOCABULARY.for_folder(self.model)

    def __call__(self, batch: RewardBatch) -> RewardResult:
        """Score every image. Raises ValueError when the model cannot be loaded."""
        scorer = load_scorer(weights_file(self), self.precision, self.placement)
        return score_batch(scorer, batch, self.batch_size, scorer.score)

    def validate(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Missing or wrong files, and empty prompts."""

        def check() -> Path:
            path = weights_file(self)
            config = blip_config(path.parent)
            check_weights(config, read_shapes(path), path)
            check_vocabulary(config, path.parent)
            return path.parent

        return problems_of(check, prompts, read_tokenizer, LENGTH)


class Network(nn.Module):
    """Both encoders."""

    def __init__(self, vision: nn.Module, text: nn.Module):
        super().__init__()
        self.vision, self.text = vision, text

    def forward(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """[B, 3, H, W] and the B prompts' tokens -> first state of each prompt [B, D]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,  # all tokens see each other; True in the configuration lets them see the image at all
        )
        return read.last_hidden_state[:, 0]


@dataclass(eq=False)
class Scorer:
    """A loaded ImageReward."""

    model: Network
    layers: Sequence[tuple[Tensor, Tensor]]
    """(weight, bias) of each, float32 on the CPU."""
    tokenizer: Any
    placement: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in 0..1 and their own prompts [B] -> [B], float32 on the CPU."""
        vision: Any = self.model.vision
        pixels = crop(images.to(vision.device), vision.config.image_size)
        options = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options).to(vision.device)
        states = self.model(pixels.to(vision.dtype), tokens)
        return (apply(self.layers, states.detach().float().cpu()) - MEAN) / STD


def weights_file(reward: ImageReward) -> Path:
    """The checkpoint. Raises ValueError when it or the vocabulary is not there."""
    path = choose(locate(reward.needs())[0], WEIGHTS)
    assert path is not None, "locate found it"
    return path


def blip_config(folder: Path) -> Any:
    """A BlipConfig of ImageReward's shape, or what a transformers config.json beside the checkpoint says."""
    from transformers import BlipConfig

    if (folder / "config.json").is_file() and model_type(folder) == "blip":
        return BlipConfig.from_pretrained(folder, local_files_only=True)
    return BlipConfig(text_config={**TEXT, **TOKENS}, vision_config={**VISION, **INPUT})


@Kept
@torch.inference_mode(False)
def load_scorer(path: Path, precision: str, placement: str) -> Scorer:
    """The model in a checkpoint with vocab.txt beside it; equal arguments give the same one."""
    require_transformers()
    from transformers import BlipTextModel, BlipVisionModel

    config, weights = blip_config(path.parent), read_weights(path)
    parts: dict[str, Weights] = {"vision": {}, "text": {}}
    for name in check_weights(config, weights, path):
        part, _, rest = name.partition(".")
        parts[part][rest] = weights[published(name)]
    network = Network(
        pretrained(BlipVisionModel, config.vision_config, parts["vision"], path),
        pretrained(BlipTextModel, config.text_config, parts["text"], path, add_pooling_layer=False),
    )
    layers = linear_layers(weights, path, LAYERS, WIDTHS, config.text_config.hidden_size)
    check_vocabulary(config, path.parent)
    return Scorer(network.to(getattr(torch, precision)), layers, read_tokenizer(path.parent), placement)


def check_weights(config: Any, weights: Mapping[str, Tensor], path: Path) -> list[str]:
    """The names in ``Network``. Raises ValueError unless the checkpoint has all their tensors and the last layers."""
    from transformers import BlipTextModel, BlipVisionModel

    with torch.device("meta"):
        network = Network(
            BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, add_pooling_layer=False)
        )
    own = {name: value for name, value in network.state_dict().items() if not name.endswith(COMPUTED)}
    check_tensors(path, weights, {published(name): value for name, value in own.items()})
    linear_layers(weights, path, LAYERS, WIDTHS, config.text_config.hidden_size)
    return list(own)


def published(name: str) -> str:
    """What the checkpoint calls a tensor of ``Network``."""
    pattern, replacement = next(pair for pair in NAMES if re.match(pair[0], name))
    return re.sub(pattern, replacement, name, count=1)


def check_vocabulary(config: Any, folder: Path) -> None:
    """Raise ValueError unless vocab.txt is one of BERT that fits the model; transformers would add what it lacks."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    lacking = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in words]
    if lacking or len(words) > config.text_config.vocab_size + 1:  # there is an end of line behind the last word
        raise ValueError(
            f"{folder / 'vocab.txt'} is not the vocabulary of bert-base-uncased: it has {len(words)} words"
            f"{' without ' + ', '.join(lacking) if lacking else ''}, the model knows {config.text_config.vocab_size}"
        )


def read_tokenizer(folder: Path) -> Any:
    """BERT's tokenizer of vocab.txt. Raises ValueError when it is damaged."""
    from transformers import BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    try:
        return BertTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # the library of tokenizers raises nothing more specific
        raise ValueError(f"{folder / 'vocab.txt'} cannot be read ({problem}); get it again") from problem
