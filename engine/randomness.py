"""All random numbers, each derived from what it is for: (purpose, run seed, iteration, prompt slot, chain, step).

There is no global generator and no state: results do not depend on chunking, on resuming, or on how many
processes share the work.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

Key = tuple[int, int, int]
"""(run seed, iteration, prompt slot): one group of one iteration."""


class Purpose(IntEnum):
    """Keeps streams apart whose other numbers are equal."""

    PROMPTS = 1
    START = 2
    STEP = 3
    TRAINED_STEPS = 4
    EVALUATION = 5
    LORA = 6
    SHUFFLE = 7
    WINDOW = 8
    CALIBRATION = 9


def rng(
    purpose: Purpose, seed: int, iteration: int = 0, slot: int = 0, chain: int = 0, step: int = 0
) -> np.random.Generator:
    """The generator of these numbers; different numbers give independent streams."""
    return np.random.default_rng(np.random.SeedSequence((purpose, seed, iteration, slot, chain, step)))


def normal(
    shape: Sequence[int],
    purpose: Purpose,
    seed: int,
    iteration: int = 0,
    slot: int = 0,
    chain: int = 0,
    step: int = 0,
) -> Tensor:
    """Standard normal noise of ``shape``, float32 on the CPU."""
    generator = rng(purpose, seed, iteration, slot, chain, step)
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))
