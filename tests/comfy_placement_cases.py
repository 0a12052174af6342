"""A training whose MODEL the host loads on another device than the CPU; see pretended_accelerator.py."""

import tempfile
from contextlib import nullcontext
from pathlib import Path

import comfy.model_management as host
import torch
from comfy_families import CPU, FakeVAE, build, conditioning
from comfy_inside import SMALL, TEXTS, fingerprint, refusal, same
from comfy_memory_cases import CONFIG
from densegrpo.engine.data import Prompt
from densegrpo.engine.models.comfy_run import Encoded, train_model
from pretended_accelerator import ACCELERATOR, accelerator


def case_devices():
    """The same training on the CPU and on an accelerator."""
    usual, host.get_free_memory = host.get_free_memory, plenty
    try:
        with torch.inference_mode(False):  # there are no pretended tensors in that mode
            here, there = (trained_on(device) for device in (CPU, ACCELERATOR))
    finally:
        host.get_free_memory = usual
    lora, other = here.pop("lora"), there.pop("lora")
    apart = sum(float((lora[key] - other[key]).square().sum()) for key in lora)
    length = sum(float(lora[key].square().sum()) for key in lora)
    found = {"cpu": here, "accelerator": there, "difference": (apart / length) ** 0.5}
    return found | {"two devices": refusal(mixed, kind=RuntimeError)}


def trained_on(device):
    model = build("sd3")
    model.load_device = device
    plain, places = fingerprint(model), {}
    conds = {text: conditioning("sd3", 6 + i, i) for i, text in enumerate([*TEXTS, ""])}
    prompts = Encoded([Prompt(text, {}) for text in TEXTS], [conds[text] for text in TEXTS], conds[""])

    def follow(session, progress):
        learner, flow = session.learner, session.model
        moments = [value for state in learner.optimizer.state.values() for value in state.values() if value.ndim]
        network = flow.patcher.model.diffusion_model
        parts = {"lora": flow.lora.parameters(), "average": learner.ema.module.parameters()}
        parts |= {"moments": moments, "weights": [*network.parameters(), *network.buffers()]}
        for name, tensors in parts.items():
            places[name] = sorted({str(tensor.device) for tensor in tensors})

    with tempfile.TemporaryDirectory() as folder, accelerator() if device == ACCELERATOR else nullcontext():
        got = train_model(model, FakeVAE(model), prompts, prompts, SMALL, CONFIG, Path(folder), False, follow)
        host.free_memory(1e30, device)
    handed_out = [*got.lora.values(), got.curve, got.samples]
    return {
        "places": places,
        "handed out": sorted({f"{type(tensor).__name__} {tensor.device}" for tensor in handed_out}),
        "untouched": same(plain, fingerprint(model)),
        "lora": dict(got.lora),
    }


def plenty(device=None, torch_free_too=False):
    return (2**40, 2**40) if torch_free_too else 2**40


def mixed():
    with accelerator():
        return torch.ones(2, device=ACCELERATOR) + torch.ones(2)
