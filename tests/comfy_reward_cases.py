"""Reward models in the host: where it looks for them, how it manages their memory, and that it can stop what waits."""

import tempfile
from pathlib import Path

import comfy.model_management as host
import folder_paths
import torch
from comfy_families import CPU
from comfy_inside import refusal
from comfy_placement_cases import plenty
from densegrpo.engine.models import comfy_rewards
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards import make_reward, placement
from densegrpo.engine.rewards.clip import load_clip, read_tokenizer
from densegrpo.engine.rewards.files import ROOT_SOURCES, roots
from densegrpo.engine.rewards.hpsv2 import TOKENIZER_SOURCES
from densegrpo.engine.waiting import INTERRUPTS, Interrupted, check_interrupts
from pretended_accelerator import ACCELERATOR, accelerator
from tiny_clip import write_clip


def batch():
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    return RewardBatch(images, ["red", "cat", "dog"], [{}] * 3)


def register(folder):
    """As the nodes do, with a folder of the user's before, as from extra_model_paths.yaml."""
    folder_paths.folder_names_and_paths.pop(comfy_rewards.FOLDER, None)
    folder_paths.add_model_folder_path(comfy_rewards.FOLDER, str(folder))
    comfy_rewards.register()


def unregister():
    for hooks in (ROOT_SOURCES, placement.MANAGERS, INTERRUPTS, TOKENIZER_SOURCES):
        hooks.pop()
    comfy_rewards.patcher_of.cache_clear()
    load_clip.cache_clear()


def case_reward_models():
    reward = make_reward("clipscore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clip(folder / "clip-vit-large-patch14")
        register(folder)
        try:
            return used(reward) | {
                "listed": folder_paths.get_filename_list(comfy_rewards.FOLDER),
                "roots": [str(path) for path in roots()].index(str(folder)),
                "hpsv2 needs": [need.repository for need in make_reward("hpsv2").needs()],
                "ids": read_tokenizer(TOKENIZER_SOURCES[-1]())("a red circle").input_ids,
                "last root": Path(folder_paths.get_folder_paths(comfy_rewards.FOLDER)[-1]).name,
            }
        finally:
            unregister()


def used(reward):
    first, alone = reward(batch()).scores.tolist(), make_reward("clipscore", placement="cpu")(batch()).scores.tolist()
    held = [one for one in host.current_loaded_models if isinstance(one.model, comfy_rewards.WholePatcher)]
    again = reward(batch()).scores.tolist()
    twice = [one for one in host.current_loaded_models if isinstance(one.model, comfy_rewards.WholePatcher)]
    host.free_memory(1e30, host.get_torch_device())  # in inference mode, as when a node asks for room
    with torch.inference_mode(False), torch.no_grad():
        training = reward(batch()).scores.tolist()
    with torch.inference_mode(False):
        host.free_memory(1e30, host.get_torch_device())
    return {
        "first": first,
        "alone": alone,
        "again": again,
        "training": training,
        "loaded": len(held),
        "loaded twice": len(twice),
        "name": held[0].model.model.model.__class__.__name__,
    }


def case_reward_models_on_an_accelerator():
    usual = host.get_free_memory, host.get_torch_device
    expected, places = None, {}
    with tempfile.TemporaryDirectory() as name, torch.inference_mode(False), torch.no_grad():
        write_clip(Path(name) / "clip-vit-large-patch14")
        register(Path(name))
        try:
            expected = make_reward("clipscore", placement="cpu")(batch()).scores.tolist()
            host.get_free_memory, host.get_torch_device = plenty, lambda: ACCELERATOR
            with accelerator():
                found = make_reward("clipscore")(batch()).scores
                (patcher,) = [
                    m.model for m in host.current_loaded_models if isinstance(m.model, comfy_rewards.WholePatcher)
                ]
                places["scoring"] = devices(patcher)
                part = patcher.partially_unload(CPU, 1)
                host.free_memory(1e30, ACCELERATOR)
                places["unloaded"] = devices(patcher)
            return {"expected": expected, "found": found.tolist(), "places": places, "freed in part": part}
        finally:
            host.get_free_memory, host.get_torch_device = usual
            unregister()


def devices(patcher):
    return sorted({str(tensor.device) for tensor in [*patcher.model.parameters(), *patcher.model.buffers()]})


def case_cancel_while_waiting():
    with tempfile.TemporaryDirectory() as name:
        register(Path(name))
        try:
            before = refusal(check_interrupts, kind=Interrupted)
            host.interrupt_current_processing()
            return {"before": before, "after": refusal(check_interrupts, kind=Interrupted)}
        finally:
            unregister()
