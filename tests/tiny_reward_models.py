"""Tiny random ImageReward, SigLIP with its head, and Mask2Former, saved in the layouts that are published."""

from zlib import crc32

import torch
from densegrpo.engine.rewards.geneval_words import COCO_CLASSES
from safetensors.torch import save_file
from tiny_clip import write_all
from torch import nn
from torch.nn.functional import interpolate
from transformers import BlipConfig, Mask2FormerConfig, Mask2FormerModel, SiglipConfig, SiglipModel, SwinConfig

WORDS = ["a", "red", "cat", "dog", "photo", "of"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BERT_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"##{c}" for c in LETTERS), *LETTERS[1:]]
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
PATCH, SIZE = 8, 32
DETECTOR_SIZE = 64


def random_weights(module, seed, scale=0.25, published=str):
    """Weights so large that images and prompts differ visibly; equal for equal published names."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "norm" not in name.lower():
                random = torch.Generator().manual_seed(crc32(published(name).encode()) + seed)
                weight.copy_(torch.randn(weight.shape, generator=random) * scale)
    return module.eval()


def some_images(num=4, height=48, width=48, seed=0):
    """Smooth, as photographs are."""
    coarse = torch.rand(num, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


class Attention(nn.Module):
    """As in timm's vision_transformer.py and BLIP's vit.py: query, key and value in one layer."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, inner, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Vision(nn.Module):
    """BLIP's VisionTransformer, with its names."""

    def __init__(self):
        super().__init__()
        width = VIT["hidden_size"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2 + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, PATCH, PATCH)
        shape = (width, VIT["intermediate_size"], VIT["num_attention_heads"])
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(VIT["num_hidden_layers"]))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def named(**parts):
    """A module that only holds others by name."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


class BertAttention(nn.Module):
    """As in BLIP's med.py: to the tokens themselves, or to the image."""

    def __init__(self, width, other, heads):
        super().__init__()
        self.heads = heads
        self.self = named(query=nn.Linear(width, width), key=nn.Linear(other, width), value=nn.Linear(other, width))
        self.output = named(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x, seen, mask):
        q, k, v = (
            part(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part, y in ((self.self.query, x), (self.self.key, seen), (self.self.value, seen))
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1)
        return self.output.LayerNorm(self.output.dense((weights @ v).transpose(1, 2).flatten(2)) + x)


class BertLayer(nn.Module):
    def __init__(self, width, inner, heads):
        super().__init__()
        self.attention = BertAttention(width, width, heads)
        self.crossattention = BertAttention(width, VIT["hidden_size"], heads)
        self.intermediate = named(dense=nn.Linear(width, inner))
        self.output = named(dense=nn.Linear(inner, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x, mask, image):
        x = self.crossattention(self.attention(x, x, mask), image, 0)
        inner = nn.functional.gelu(self.intermediate.dense(x))
        return self.output.LayerNorm(self.output.dense(inner) + x)


class Text(nn.Module):
    """BLIP's BertModel without pooling, with its names; its mask hides the padding only."""

    def __init__(self):
        super().__init__()
        width = BERT["hidden_size"]
        self.embeddings = named(
            word_embeddings=nn.Embedding(len(BERT_VOCABULARY) + 2, width),
            position_embeddings=nn.Embedding(64, width),
            LayerNorm=nn.LayerNorm(width, eps=1e-12),
        )
        self.embeddings.register_buffer("position_ids", torch.arange(64)[None])
        shape = (width, BERT["intermediate_size"], BERT["num_attention_heads"])
        self.encoder = named(layer=nn.ModuleList(BertLayer(*shape) for _ in range(BERT["num_hidden_layers"])))

    def forward(self, ids, mask, image):
        positions = self.embeddings.position_embeddings.weight[: ids.shape[1]]
        x = self.embeddings.LayerNorm(self.embeddings.word_embeddings(ids) + positions)
        hidden = (1 - mask[:, None, None].float()) * -10000
        for layer in self.encoder.layer:
            x = layer(x, hidden, image)
        return x


class PublishedImageReward(nn.Module):
    """The formulas of the published package, with the names of its checkpoint."""

    def __init__(self):
        super().__init__()
        self.blip = named(visual_encoder=Vision(), text_encoder=Text(), vision_proj=nn.Linear(VIT["hidden_size"], 4))
        parts = [nn.Linear(BERT["hidden_size"], 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)]
        parts += [nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
        self.mlp = named(layers=nn.Sequential(*parts))

    def forward(self, pixels, ids, mask):
        states = self.blip.text_encoder(ids, mask, self.blip.visual_encoder(pixels))
        return (self.mlp.layers(states[:, 0]).squeeze(1) - 0.16717362830052426) / 1.0333394966054072


def write_imagereward(folder, seed=5):
    """ImageReward.pt and vocab.txt; the tiny shape is in config.json, which the real one does not have."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n")
    text = {**BERT, "vocab_size": len(BERT_VOCABULARY) + 2, "max_position_embeddings": 64}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    vision = {**VIT, "image_size": SIZE, "patch_size": PATCH, "layer_norm_eps": 1e-6}
    BlipConfig(text_config=text, vision_config=vision).save_pretrained(folder)
    model = random_weights(PublishedImageReward(), seed)
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    return model


def siglip_config():
    text = {**BERT, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 48, "eos_token_id": 49}
    return SiglipConfig(text_config=text, vision_config={**VIT, "image_size": SIZE, "patch_size": PATCH})


def write_siglip(folder, seed=6):
    """The whole model, as on the hub: config.json and model.safetensors -> its image encoder."""
    folder.mkdir(parents=True)
    model = random_weights(SiglipModel(siglip_config()), seed)
    model.save_pretrained(folder)
    return model.vision_model


def write_siglip_head(folder, seed=7):
    """The published file of aesthetic predictor v2.5 -> its layers."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [nn.Linear(VIT["hidden_size"], 1024), nn.Dropout(0.5), nn.Linear(1024, 128), nn.Dropout(0.5)]
    parts += [nn.Linear(128, 64), nn.Dropout(0.5), nn.Linear(64, 16), nn.Dropout(0.2), nn.Linear(16, 1)]
    head = random_weights(named(scoring_head=nn.Sequential(*parts)), seed, 0.1)
    torch.save(head.state_dict(), folder / "aesthetic_predictor_v2_5.pth")
    return head.scoring_head


def mask2former_config(labels=COCO_CLASSES):
    swin = SwinConfig(
        image_size=DETECTOR_SIZE,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    widths = dict.fromkeys(["feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim"], 32)
    return Mask2FormerConfig(
        backbone_config=swin,
        **widths,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=12,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )


def published_name(name):
    """What the file on the hub calls a tensor of transformers' Mask2FormerModel; transformers 5 says it otherwise."""
    renames = {
        "encoder.swin.": "encoder.",
        "attention.q_proj": "attention.self.query",
        "attention.k_proj": "attention.self.key",
        "attention.v_proj": "attention.self.value",
        "attention.relative_position_bias.": "attention.self.",
        "attention.o_proj": "attention.output.dense",
    }
    if "pixel_level_module.encoder." in name:
        renames |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
        for new, old in renames.items():
            name = name.replace(new, old)
    return f"model.{name}"


def write_mask2former(folder, seed=8, labels=COCO_CLASSES, certainty=2.0):
    """config.json and model.safetensors as on the hub -> (network, layer behind it)."""
    folder.mkdir(parents=True)
    config = mask2former_config(labels)
    config.save_pretrained(folder)
    model = random_weights(Mask2FormerModel(config), seed, 0.3, published_name)
    head = random_weights(nn.Linear(config.hidden_dim, len(labels) + 1), seed, certainty)
    weights = {published_name(n): v for n, v in model.state_dict().items() if "swin.layernorm" not in n}
    weights |= {f"class_predictor.{name}": value for name, value in head.state_dict().items()}
    weights |= {"criterion.empty_weight": torch.ones(len(labels) + 1)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return model, head


def write_every_model(root):
    """All models of all rewards -> what was written, by name of the reward."""
    written = write_all(root)
    written["imagereward"] = write_imagereward(root / "ImageReward")
    written["aesthetic_siglip"] = (
        write_siglip(root / "siglip-so400m-patch14-384"),
        write_siglip_head(root / "aesthetic"),
    )
    written["geneval"] = write_mask2former(root / "mask2former-swin-small-coco-instance")
    return written
