"""Hyperparameters by method and model: ``"profile": "sd35"`` in a configuration fills in what it leaves open.

Values are those of the papers and of the authors' code where they give one; ``source`` says which. Their group counts
are for 8 to 48 GPUs: on one, lower ``training.groups`` and take more iterations.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .knobs import suggest

Sections = Mapping[str, Any]
"""Part of a configuration: section -> option -> value."""


class Profile(NamedTuple):
    """What a method uses with a model."""

    sections: Sections
    source: str


LORA_BLOCK = {
    "lora": {"rank": 32, "alpha": 64.0},
    "optimizer": {"lr": 3e-4, "weight_decay": 1e-4, "grad_clip": 1.0, "ema_decay": 0.9, "ema_every": 8},
}
MODELS: dict[str, Sections] = {
    "sd35": LORA_BLOCK
    | {
        "model": {
            "name": "diffusers",
            "path": "stabilityai/stable-diffusion-3.5-medium",
            "resolution": 512,
            "guidance": 4.5,
            "dtype": "float16",
        },
        "training": {"groups": 48, "num_steps": 10, "sample_batch": 12, "train_batch": 4},
        "evaluation": {"num_steps": 40},
    },
    "flux": LORA_BLOCK
    | {
        "model": {
            "name": "diffusers",
            "path": "black-forest-labs/FLUX.1-dev",
            "resolution": 720,
            "guidance": 3.5,
            "dtype": "bfloat16",
        },
        "training": {"groups": 32, "num_steps": 16, "sample_batch": 6, "train_batch": 1},
        "evaluation": {"num_steps": 28},
    },
    "demo": {
        "model": {"name": "demo"},
        "lora": {"rank": 8, "alpha": 16.0},
        "method": {"kl_weight": 0.0, "clip_range": 0.01},
        "optimizer": {"lr": 3e-4, "beta2": 0.99, "ema_decay": 0.9, "ema_every": 1},
        "training": {"iterations": 80, "groups": 4, "num_steps": 8, "sample_batch": 64, "train_batch": 64},
        "evaluation": {"every": 20, "images_per_prompt": 4, "num_steps": 8},
        "rewards": [{"name": "shapes", "score": "partial"}],
        "held_out_rewards": [{"name": "shapes", "score": "strict"}],
        "prompts": "demo:train",
        "held_out_prompts": "demo:held_out",
    },
}
"""What all methods share. The LoRA and the optimizer are Flow-GRPO's, which the SD3.5 runs of all papers took over."""

FULL_WEIGHTS = "; they train all weights, so rank and learning rate are Flow-GRPO's LoRA"
OURS = "not in the paper: its method on this model's Flow-GRPO settings"
PROFILES: dict[str, dict[str, Profile]] = {
    "flow_grpo": {
        "sd35": Profile({}, "arXiv 2505.05470 section 5; for PickScore kl_weight 0.01"),
        "flux": Profile(
            {"method": {"noise": 0.9}, "training": {"num_steps": 6}, "model": {"resolution": 512}},
            "the authors' FLUX configuration",
        ),
    },
    "flow_grpo_fast": {
        "sd35": Profile({"model": {"guidance": 1.0}}, "the authors' configuration without guidance"),
        "flux": Profile(
            {"training": {"num_steps": 6}, "model": {"resolution": 512}}, "the authors' FLUX configuration"
        ),
    },
    "dance_grpo": {
        "sd35": Profile({"method": {"num_updates": 1}}, OURS + "; one update, as the paper advises with guidance"),
        "flux": Profile({}, "the authors' FLUX script: 16 steps (paper: 25)" + FULL_WEIGHTS),
    },
    "mix_grpo": {
        "sd35": Profile(
            {"method": {"group_size": 24, "window_every": 150, "kl": "flow_grpo", "kl_weight": 0.001}},
            "arXiv 2507.21802, its SD3.5 experiment",
        ),
        "flux": Profile({"training": {"num_steps": 25}}, "arXiv 2507.21802" + FULL_WEIGHTS),
    },
    "mix_grpo_flash": {
        "sd35": Profile(
            {"method": {"group_size": 24, "window_every": 150, "kl": "flow_grpo", "kl_weight": 0.001}},
            "arXiv 2507.21802, its SD3.5 experiment; Flash was run on FLUX only",
        ),
        "flux": Profile({"training": {"num_steps": 25}}, "arXiv 2507.21802" + FULL_WEIGHTS),
    },
    "dense_grpo": {
        "sd35": Profile({}, "arXiv 2601.20218; for PickScore kl_weight 0.01; calibrate the noise first"),
        "flux": Profile(
            {"method": {"noise": 0.9}, "training": {"num_steps": 6}, "model": {"resolution": 512}},
            "the paper does not print its FLUX settings; these are Flow-GRPO's",
        ),
    },
    "tempflow_grpo": {
        "sd35": Profile({}, "arXiv 2508.04324; for PickScore kl_weight 0.001"),
        "flux": Profile(
            {"method": {"noise": 0.9}, "training": {"num_steps": 10}, "model": {"resolution": 1024}},
            "arXiv 2508.04324, its FLUX experiment",
        ),
    },
    "g2rpo": {
        "sd35": Profile({}, OURS),
        "flux": Profile({}, "arXiv 2510.01982 (the code has strides 1, 2)" + FULL_WEIGHTS),
    },
    "tp_grpo": {
        "sd35": Profile({}, "arXiv 2602.06422, appendix B; consistent = false is its other variant"),
        "flux": Profile(
            {"method": {"noise": 0.8}, "training": {"num_steps": 6}, "model": {"resolution": 512}},
            "the authors' FLUX configuration",
        ),
    },
}
DEMO: dict[str, Sections] = {
    # Coefficient-preserving noise has smaller ratios; the papers' clip ranges differ as much.
    "flow_grpo_fast": {"method": {"clip_range": 0.001}},
    "tp_grpo": {"method": {"clip_range": 0.001}},
    # 0.3 is meant for 16 and more steps; with 8 the images of a group hardly differ.
    "dance_grpo": {"method": {"noise": 0.7}},
    "tempflow_grpo": {"method": {"num_seeds": 2}},
}
"""What a method needs on the demo model beside what all share."""


def profile(method: str, name: str) -> Profile:
    """The profile of a known method. Raises ValueError that names what is known."""
    if name not in MODELS:
        raise ValueError(f"unknown profile {name!r}{suggest(name, MODELS)}; known: {', '.join(MODELS)}")
    if name == "demo":
        own = Profile(DEMO.get(method, {}), "what docs/comparison.md and the learning tests found to work")
    else:
        own = PROFILES[method][name]
    return Profile(merged(merged({"method": {"name": method}}, MODELS[name]), own.sections), own.source)


def merged(under: Sections, over: Sections) -> dict[str, Any]:
    """``over`` where it says something, ``under`` elsewhere, section by section."""
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
