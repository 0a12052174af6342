"""Text encoding of the demo model: a table of word vectors, no learning.

A prompt becomes at most 8 words (lower case, singular, without articles and the like); each word is hashed
to one of 512 rows of a fixed table and gets its position's vector added.
"""

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

NUM_TOKENS, NUM_WORDS, WIDTH, POOLED = 8, 512, 64, 128
STOP_WORDS = frozenset({"a", "an", "the", "of", "and", "is", "on", "to", "in", "with"})
PADDING = 0


def tokens(prompt: str) -> list[int]:
    """8 rows of the word table; an empty prompt is all padding, longer ones are cut."""
    words = [w for w in re.findall(r"[a-z0-9]+", prompt.lower()) if w not in STOP_WORDS]
    ids = [_row(w[:-1] if len(w) > 3 and w.endswith("s") else w) for w in words[:NUM_TOKENS]]
    return ids + [PADDING] * (NUM_TOKENS - len(ids))


def _row(word: str) -> int:
    return 1 + int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little") % (NUM_WORDS - 1)


def make_tables(seed: int = 0) -> dict[str, Tensor]:
    """The tensors of ``text.safetensors``."""
    generator = torch.Generator().manual_seed(seed)
    flat = NUM_TOKENS * WIDTH
    return {
        "word": torch.randn(NUM_WORDS, WIDTH, generator=generator),
        "position": torch.randn(NUM_TOKENS, WIDTH, generator=generator) * 0.5,
        "pooled": torch.randn(POOLED, flat, generator=generator) * flat**-0.5,
    }


def encode(prompts: Sequence[str], tables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(context [B, 8, 64], pooled [B, 128])."""
    ids = torch.tensor([tokens(p) for p in prompts], dtype=torch.long).view(-1, NUM_TOKENS)
    context = tables["word"][ids] + tables["position"]
    return context, context.flatten(1) @ tables["pooled"].T
