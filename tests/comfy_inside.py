"""The inside of a real ComfyUI: imported first by every ``comfy_*_cases.py``, it loads the host and this package.

``sys.argv`` is that of comfy_cases.py. Also what the cases share.
"""

# ruff: noqa: E402

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

COMFYUI, PACKAGE, ANSWER, *WANTED = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, COMFYUI)
try:
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import torch
    from comfy_families import FakeVAE, conditioning

    import nodes as stock  # noqa: TID251
except ModuleNotFoundError as problem:
    print(problem, file=sys.stderr)
    sys.exit(3)

spec = importlib.util.spec_from_file_location("densegrpo", Path(PACKAGE) / "__init__.py")
sys.modules["densegrpo"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["densegrpo"])

from densegrpo.engine.lora import LoraSettings
from densegrpo.engine.models.comfy import training_session
from densegrpo.engine.models.comfy_settings import ComfySettings

SMALL = ComfySettings(width=64, height=64)
RANK4 = LoraSettings(rank=4)
TEXTS = ["a red circle", "two blue squares and a green triangle", "three yellow stars"]
ROWS = torch.tensor([0, 2, 1, 0, 2, 1])
SIGMA = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.6])
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def normal(shape, seed=0, scale=1.0):
    with torch.inference_mode(False):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def encoded(clip, texts=(*TEXTS, "")):
    return {text: stock.CLIPTextEncode().encode(clip, text)[0] for text in texts}


def demo_session(demo, settings=SMALL, lora=RANK4, **changes):
    prompts = encoded(demo.clip)
    return training_session(demo.model, demo.vae, prompts, prompts[""], replace(settings, **changes), lora)


def family_session(model, family, settings=SMALL, lora=RANK4):
    """Two prompts of 6 tokens, one of 9."""
    prompts = {
        text: conditioning(family, tokens, seed) for text, tokens, seed in (("a", 6, 0), ("b", 9, 1), ("c", 6, 2))
    }
    return training_session(model, FakeVAE(model), prompts, conditioning(family, 6, 9), settings, lora)


def spoil(lora, scale=0.02):
    """As if it had been trained."""
    with torch.no_grad():
        for i, up in enumerate(lora.up):
            up.copy_(normal(up.shape, i, scale))


def velocity(flow, texts=TEXTS, scale=1.0):
    with torch.no_grad():
        return flow.velocity(normal((len(ROWS), *flow.latent_shape), 5) * scale, SIGMA, flow.encode(texts), ROWS)


def gap(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def fingerprint(model):
    network = model.model.diffusion_model
    return {
        "weights": {k: v.detach().clone() for k, v in model.model.state_dict().items()},
        "flags": {k: p.requires_grad for k, p in network.named_parameters()},
        "hooks": {k: [len(vars(m)[kind]) for kind in HOOKS] for k, m in network.named_modules()},
        "methods": {k: "forward" in vars(m) for k, m in network.named_modules()},
        "options": repr(model.model_options),
    }


def same(before, after):
    def equal(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)

    whole = {k: v[None] if v.ndim == 0 else v for k, v in before["weights"].items()}
    now = {k: v[None] if v.ndim == 0 else v for k, v in after["weights"].items()}
    return equal(whole, now) and all(before[k] == after[k] for k in before if k != "weights")


def refusal(action, *arguments, kind=ValueError):
    try:
        action(*arguments)
    except kind as problem:
        return str(problem)
    return "not refused"
