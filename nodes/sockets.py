"""The link types between our nodes, and what travels on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

from ..engine.data import Prompt
from ..engine.rewards.kept import Place

Prompts = io.Custom("DENSEGRPO_PROMPTS")
Reward = io.Custom("DENSEGRPO_REWARD")
Sampler = io.Custom("DENSEGRPO_SAMPLER")
NoiseTable = io.Custom("DENSEGRPO_NOISE_TABLE")
Probe = io.Custom("DENSEGRPO_PROBE")
Credit = io.Custom("DENSEGRPO_CREDIT")
Update = io.Custom("DENSEGRPO_UPDATE")

Options = Mapping[str, Any]
"""On Sampler, NoiseTable, Probe, Credit and Update links: options by name, as in a configuration."""


@dataclass(frozen=True)
class EncodedPrompts:
    """On a Prompts link."""

    prompts: tuple[Prompt, ...]
    conditioning: tuple[Any, ...]
    """One host CONDITIONING per prompt."""
    negative: Any
    """The CONDITIONING that guidance leads away from."""


@dataclass(frozen=True)
class RewardChoice:
    """On a Reward link."""

    entries: tuple[Options, ...]
    """Configured rewards with their weights."""
    mode: str = "each"
    kept: Place = field(default_factory=Place, compare=False, repr=False)
    """Holds the models that scored for it, so that they go when the host drops this choice from its cache."""
