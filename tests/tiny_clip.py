"""Tiny random CLIPs in the layouts that are published, and open_clip's model written out for reference."""

import json
import math
from collections import OrderedDict

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

SIZE, DIM, LENGTH = 28, 32, 77
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MERGES = ["r e", "re d</w>", "c a", "ca t</w>", "d o", "do g</w>"]
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def vocabulary():
    """All bytes, a few merges, and the two ends."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in plain]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(len(hidden))]
    words = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in MERGES)]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def write_tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    ends |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 8192, "do_lower_case": True, **ends}
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tiny_config(hidden_act="gelu"):
    end = len(vocabulary()) - 1
    tokens = {"vocab_size": end + 1, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    shared = {"projection_dim": DIM, "hidden_act": hidden_act}
    return CLIPConfig(
        projection_dim=DIM,
        text_config={**TEXT, **tokens, **shared, "max_position_embeddings": LENGTH},
        vision_config={**VISION, **shared, "image_size": SIZE, "patch_size": 7},
    )


def shuffled(model, seed):
    """Weights so large that images and prompts differ visibly."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                weight.copy_(torch.randn(weight.shape, generator=random) * 0.25)
        model.logit_scale.fill_(math.log(100))
    return model.eval()


def write_clip(folder, seed=0, hidden_act="gelu"):
    """A folder as on the hub: config.json, model.safetensors, tokenizer."""
    write_tokenizer(folder)
    model = shuffled(CLIPModel(tiny_config(hidden_act)), seed)
    model.save_pretrained(folder)
    return model


class Block(nn.Module):
    def __init__(self, width, inner, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        parts = [("c_fc", nn.Linear(width, inner)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(inner, width))]
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads):
        super().__init__()
        blocks = [Block(hidden_size, intermediate_size, num_attention_heads) for _ in range(num_hidden_layers)]
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        width = VISION["hidden_size"]
        self.conv1 = nn.Conv2d(3, width, 7, 7, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((SIZE // 7) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(**VISION)
        self.proj = nn.Parameter(torch.zeros(width, DIM))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """As in open_clip's model.py, with its names."""

    def __init__(self):
        super().__init__()
        width = TEXT["hidden_size"]
        self.visual = Visual()
        self.transformer = Transformer(**TEXT)
        self.token_embedding = nn.Embedding(len(vocabulary()), width)
        self.positional_embedding = nn.Parameter(torch.zeros(LENGTH, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, DIM))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_text(self, ids):
        """[B, 77], zero behind the end token, which is the largest."""
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        return x[torch.arange(len(x)), ids.argmax(1)] @ self.text_projection


def write_hps(folder, seed=3):
    """The published checkpoint's layout; the tiny shape is in config.json, which the real one does not have."""
    write_tokenizer(folder)
    model = shuffled(OpenClip(), seed)
    tiny_config().save_pretrained(folder)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return model


def write_heads(folder, seed=4):
    """LAION's two files -> (modules of v2, of v1)."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    v2 = nn.Module()
    parts = [nn.Linear(DIM, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64)]
    v2.layers = nn.Sequential(*parts, nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)).eval()
    v1 = nn.Linear(DIM, 1)
    torch.save(v2.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    torch.save(v1.state_dict(), folder / "sa_0_4_vit_l_14_linear.pth")
    return v2.layers, v1


def write_all(root):
    """Every model of the CLIP family -> what was written, by name of the reward."""
    v2, v1 = write_heads(root / "aesthetic")
    return {
        "pickscore": write_clip(root / "PickScore_v1", 1),
        "clipscore": write_clip(root / "clip-vit-large-patch14", 2, "quick_gelu"),
        "hpsv2": write_hps(root / "HPSv2.1"),
        "aesthetic": v2,
        "aesthetic v1": v1,
    }


def save_weights(path, weights):
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
